"""Sizes of images in pixels: a number for squares, and (height, width) for others, which files hold as a list."""

from __future__ import annotations

from collections.abc import Sequence

from ftd_lightning.errors import InputError

ImageSize = int | tuple[int, int]


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a size, or of a pair such as a file holds."""
    if not isinstance(size, Sequence):
        return size, size
    if len(size) != 2:
        raise InputError(f"image_size={list(size)} must be one number, or two: [height, width]")
    return size[0], size[1]


def as_size(value: int | Sequence[int]) -> ImageSize:
    """Turn a number or a pair into a size; a pair of equal numbers becomes one number."""
    height, width = sides(value)
    return height if height == width else (height, width)


def plain(size: ImageSize) -> int | list[int]:
    """Return a size as JSON and YAML hold it."""
    return size if isinstance(size, int) else list(size)


def size_text(size: int | Sequence[int]) -> str:
    """Write a size for people: "32 x 32 px", or "24 x 32 px (height x width)"."""
    height, width = sides(size)
    return f"{height} x {width} px{' (height x width)' if height != width else ''}"
