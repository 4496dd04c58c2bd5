"""Pictures of sets: each one's own, and all of them one below the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from ftd_lightning.callbacks.tensorboard import picture_grid
from ftd_lightning.data.files import replacing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ftd_lightning.data import SyntheticSet


def set_picture(synthetic: SyntheticSet, *, ema: bool = False) -> Image.Image:
    """Lay a set's images out as a grid, one column per class, at most ten images of each; see ``picture_grid``.

    Raises:
        InputError: if averaged images are asked for and there are none.
    """
    grid = picture_grid(synthetic.pictures(ema=ema), synthetic.labels, class_names=synthetic.class_names)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def write_sheet(rows: Mapping[str, Image.Image], path: Path) -> None:
    """Write pictures as one PNG, one below the other, each with its name on its left."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(96, *(round(pen.textlength(name)) + 16 for name in rows))
    size = (margin + max(picture.width for picture in rows.values()), sum(p.height for p in rows.values()))
    sheet, top = Image.new("RGB", size, "white"), 0
    for name, picture in rows.items():
        sheet.paste(picture, (margin, top))
        ImageDraw.Draw(sheet).text((8, top + picture.height // 2 - 6), name, fill="black")
        top += picture.height
    with replacing(path) as part:
        sheet.save(part, format="PNG")
