"""A census of the image files of a folder, by their headers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def is_cut(mode: str) -> bool:
    """Tell whether Pillow reads 8 of 16 bits, by a mode of a :class:`Census`."""
    return mode.endswith(";16") and mode != "I;16"


@dataclass(frozen=True)
class Census:
    """Counts over all image files of a folder.

    Attributes:
        files: number of files, unreadable ones included.
        sizes: files by (width, height) in pixels, as they are shown: after turning.
        modes: files by Pillow mode, such as "RGB", "L" or "I;16"; "RGB;16" and the like where 8 of 16 bits are read.
        turned: files whose EXIF orientation is applied.
        transparent: files with an alpha channel or a transparent colour, which are composited on white.
        bits: bits per value of the deepest file, 8 or 16.
        classes: files of each class, by name, in label order.
        unreadable: files that are not readable images.
        channels: 1 if all training images are grey, else 3.
        size: height and width in pixels that they get if none is asked for: the shorter side of the most common size of
            the training images, so that no detail is made up.
    """

    files: int
    sizes: Mapping[tuple[int, int], int]
    modes: Mapping[str, int]
    turned: int
    transparent: int
    bits: int
    classes: Mapping[str, int]
    unreadable: int
    channels: int
    size: int

    def lines(self) -> list[str]:
        """Describe the files in one line, and in a second one how they are changed, if they are.

        Example:
            >>> sizes, classes = {(64, 48): 3, (32, 32): 2}, {"cat": 4, "dog": 1}
            >>> first, second = Census(5, sizes, {"RGB": 4, "L": 1}, 2, 1, 8, classes, 0, 3, 48).lines()
            >>> first
            '5 images of 32 x 32 to 64 x 48 px in colour; 2 classes of 1 (dog) to 4 (cat)'
            >>> second
            '2 are turned upright by EXIF orientation; 1 is transparent, composited on white'
        """
        ends = [f"{width} x {height}" for width, height in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        size = " to ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else "unknown size"
        few, many = (pick(self.classes, key=lambda name: self.classes[name]) for pick in (min, max))
        least, most = self.classes[few], self.classes[many]
        each = f"{most} each" if least == most else f"{least} ({few}) to {most} ({many})"
        depth = "" if self.bits <= 8 else f", up to {self.bits} bits per value"
        colour = "in grey" if self.channels == 1 else "in colour"
        first = f"{self.files:,} images of {size} px {colour}{depth}; {len(self.classes)} classes of {each}"
        done = {
            "turned upright by EXIF orientation": self.turned,
            "transparent, composited on white": self.transparent,
            "read with 8 of their 16 bits": sum(self.modes[mode] for mode in self.modes if is_cut(mode)),
            "unreadable": self.unreadable,
        }
        told = [f"{count:,} {'is' if count == 1 else 'are'} {what}" for what, count in done.items() if count]
        return [first, "; ".join(told)] if told else [first]

    def resizing(self, size: int) -> str | None:
        """Say how resizing to squares changes the images; None where all have that size.

        Args:
            size: height and width in pixels that the images are resized to.
        """
        return resizing(self.sizes, size)

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON holds them."""
        return {**vars(self), "sizes": [[*size, count] for size, count in sorted(self.sizes.items())]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Census:
        """Build it again from what :meth:`as_json` returned."""
        sizes = Counter({(width, height): count for width, height, count in fields["sizes"]})
        return cls(**{**fields, "sizes": sizes})


def resizing(sizes: Mapping[tuple[int, int], int], size: int) -> str | None:
    """Say how many images are enlarged to squares, and how much their aspect ratio changes.

    Args:
        sizes: images by (width, height) in pixels.
        size: height and width in pixels that they are resized to.

    Returns:
        The line; None where no image is enlarged or squashed.

    Example:
        >>> resizing({(16, 16): 60, (64, 48): 45}, 48)
        'images become 48 x 48 px: 60 of 105 are enlarged; 45 of 105 are squashed, aspect ratio changed by up to 1.33'
    """
    count = sum(sizes.values())
    enlarged = sum(times for sides, times in sizes.items() if min(sides) < size)
    squashed = sum(times for sides, times in sizes.items() if sides[0] != sides[1])
    told = [f"{enlarged:,} of {count:,} are enlarged"] if enlarged else []
    if squashed:
        most = max(max(sides) / min(sides) for sides in sizes)
        told.append(f"{squashed:,} of {count:,} are squashed, aspect ratio changed by up to {most:.2f}")
    return f"images become {size} x {size} px: {'; '.join(told)}" if told else None
