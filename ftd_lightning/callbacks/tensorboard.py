"""What TensorBoard shows beside the modules' scalars: pictures, histograms, hyper-parameters with their results."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image, ImageDraw, ImageFont

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.evaluation import is_due, is_last_epoch
from ftd_lightning.contracts import LearnsSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


WIDTH = 96  # of a picture in a grid, in pixels, at least: smaller ones cannot be made out
GAP = 2
COLUMNS = 10  # classes side by side: a wider grid is shrunk wherever it is shown
NAME_SIZE, NAME_HEIGHT = 14, 20


def picture_grid(pictures: Tensor, labels: Tensor, *, class_names: Sequence[str] = (), per_class: int = 10) -> Tensor:
    """Lay pictures out for eyes: in real colours, one column per class under its name, ten columns side by side.

    Pictures narrower than 96 pixels are enlarged by a whole factor, pixel by pixel. The next ten classes follow below.
    Three channels are red, green and blue, one is grey. Of more than three the first three are shown, of two the first.

    Args:
        pictures: (N, C, H, W) in [0, 1].
        labels: (N,) classes, or (N, K) probabilities.
        class_names: in label order, without accents and shortened to what fits; classes beyond them, and those whose
            names have no ASCII letters, are numbered.
        per_class: rows at most; a class with fewer images leaves the rest of its column white.

    Returns:
        (3, height, width) uint8, on the CPU.

    Example:
        >>> picture_grid(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]), class_names=["cat", "dog"]).shape
        torch.Size([3, 218, 198])
    """
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    columns = {label: (classes == label).nonzero().squeeze(1)[:per_class] for label in classes.unique().tolist()}
    # Labels of teachers may give one class two images and another none: all of them are shown.
    rows = max(len(index) for index in columns.values())
    factor = -(-WIDTH // pictures.shape[-1])
    height, width = (factor * size for size in pictures.shape[-2:])
    visible = pictures[:, : 3 if pictures.shape[1] >= 3 else 1]
    bands = -(-len(columns) // COLUMNS)
    band_height = NAME_HEIGHT + rows * (height + GAP)
    size = (GAP + min(len(columns), COLUMNS) * (width + GAP), GAP + bands * band_height)
    grid, font = Image.new("RGB", size, "white"), ImageFont.load_default(NAME_SIZE)
    pen = ImageDraw.Draw(grid)
    for place, (label, index) in enumerate(columns.items()):
        band, column = divmod(place, COLUMNS)
        left, top = GAP + column * (width + GAP), GAP + band * band_height
        name = _printable(class_names[label]) if label < len(class_names) else ""
        text = _shortened(name or str(label), width - 3 * GAP, font)  # neighbours do not touch
        pen.text((left + width // 2, top), text, fill="black", font=font, anchor="ma")
        shown = (visible[index].detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        for row, picture in enumerate(shown.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)):
            enlarged = Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling.NEAREST)
            grid.paste(enlarged, (left, top + NAME_HEIGHT + row * (height + GAP)))
    return torch.from_numpy(np.array(grid)).permute(2, 0, 1)


def _printable(name: str) -> str:
    """Reduce a name to one line of what Pillow's font can draw, which is ASCII: letters lose their accents."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return " ".join("".join(sign if sign.isprintable() else " " for sign in plain).split())


def _shortened(name: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Cut the end off a name that is wider than so many pixels."""
    if font.getlength(name) <= width:
        return name
    kept = name[:width]
    while kept and font.getlength(f"{kept}...") > width:
        kept = kept[:-1]
    return f"{kept.rstrip()}..."


def _boards(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class TensorBoardPictures(Callback):
    """Shows the synthetic images in real colours, whitening undone, and histograms of their values.

    Of images with two channels the first is shown, of those with more than three the first three.

    Args:
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``, and at the beginning and the end;
            None: ten times in a fit; 0: never between.
        per_class: pictures of each class at most.
    """

    def __init__(self, every_n_epochs: int | None = None, per_class: int = 10) -> None:
        check_bounds(TensorBoardPictures, locals())
        self.every_n_epochs = every_n_epochs
        self.per_class = per_class

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the initial images."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the present images."""
        if is_last_epoch(trainer) or is_due(trainer, self.every_n_epochs, times=10):
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, LearnsSet) or not (boards := _boards(trainer)):
            return
        synthetic, step = module.synthetic_set(), trainer.global_step
        kinds = (
            {"raw": synthetic.images}
            if synthetic.ema_images is None
            else {
                "raw": synthetic.images,
                "ema": synthetic.ema_images,
            }
        )
        for board in (logger.experiment for logger in boards):
            for name, images in kinds.items():
                grid = picture_grid(
                    synthetic.pictures(ema=name == "ema"),
                    synthetic.labels,
                    class_names=synthetic.class_names,
                    per_class=self.per_class,
                )
                board.add_image(f"synthetic/{name}", grid, step)
                board.add_histogram(f"values/{name}", images, step)


def _settings(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Drop what LightningCLI keeps among the hyper-parameters for itself, ``_class_path`` and ``_instantiator``."""
    own = {key: value for key, value in values.items() if not str(key).startswith("_")}
    return {key: _settings(value) if isinstance(value, Mapping) else value for key, value in own.items()}


class HyperparameterReport(Callback):
    """Writes the hyper-parameters with the run's last scalars to TensorBoard's HPARAMS page, once, at the end.

    Nested ones have names like ``network_options/width``, the scalars names that begin with ``hp/``. Lightning's own
    entry is made before there is a result to show.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, unless the result is yet to come: that of an evaluation is its test's."""
        if not is_overridden("test_step", pl_module):
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of an evaluation."""
        self._write(trainer, pl_module)

    @staticmethod
    def _write(trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {f"hp/{name}": float(value) for name, value in trainer.callback_metrics.items()}
        for logger in _boards(trainer):
            logger.log_hyperparams(_settings(pl_module.hparams), metrics, trainer.global_step)
