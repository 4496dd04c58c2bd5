"""TensorBoard, beside the modules' scalars: pictures, histograms, hyper-parameters with their results."""

from __future__ import annotations

import unicodedata
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.evaluation import is_due, is_last_epoch
from ftd_lightning.contracts import LearnsSet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

WIDTH = 96  # least width of a picture in a grid, in pixels
GAP = 2
COLUMNS = 10  # classes side by side: a wider grid is shrunk wherever it is shown
NAME_SIZE, NAME_HEIGHT = 14, 20


def picture_grid(pictures: Tensor, labels: Tensor, *, class_names: Sequence[str] = (), per_class: int = 10) -> Tensor:
    """Lay pictures out with one column per class under its name, ten columns side by side, the next ten below.

    Pictures narrower than 96 pixels are enlarged by a whole factor. Three channels are red, green and blue, one is
    grey. Of more than three the first three are shown, of two the first.

    Args:
        pictures: (N, C, H, W) in [0, 1].
        labels: (N,) classes, or (N, K) probabilities.
        class_names: in label order, written without accents and as far as they fit; classes without a name in ASCII
            are numbered.
        per_class: rows at most; a class with fewer images leaves the rest of its column white.

    Returns:
        (3, height, width) uint8, on the CPU.
    """
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    columns = {label: (classes == label).nonzero().squeeze(1)[:per_class] for label in classes.unique().tolist()}
    factor = -(-WIDTH // pictures.shape[-1])
    visible = pictures[:, : 3 if pictures.shape[1] >= 3 else 1].detach().cpu().clamp(0, 1)
    visible = (visible * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    visible = visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    # Labels of teachers may give one class two images and another none: all of them are shown.
    rows, width, bands = max(len(index) for index in columns.values()), min(len(columns), COLUMNS), []
    for first in range(0, len(columns), COLUMNS):
        band = list(columns.items())[first : first + COLUMNS]
        cells = torch.full((rows, width, *visible.shape[1:]), 255, dtype=torch.uint8)
        for column, (_, index) in enumerate(band):
            cells[: len(index), column] = visible[index]
        grid = make_grid(cells.flatten(0, 1), nrow=width, padding=GAP, pad_value=255)
        names = [class_names[label] if label < len(class_names) else "" for label, _ in band]
        texts = [_printable(name) or str(label) for name, (label, _) in zip(names, band, strict=True)]
        bands += [_heading(texts, visible.shape[-1], grid.shape[-1]), grid]
    return torch.cat(bands, 1)


def _printable(name: str) -> str:
    """Reduce a name to one line of ASCII, which Pillow's font can draw; letters lose their accents."""
    return " ".join(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().split())


def _heading(texts: Sequence[str], column: int, width: int) -> Tensor:
    """Write texts above columns of so many pixels each, (3, 20, width) uint8."""
    strip, font = Image.new("RGB", (width, NAME_HEIGHT), "white"), ImageFont.load_default(NAME_SIZE)
    for place, text in enumerate(texts):
        while font.getlength(text) > column - 3 * GAP:  # neighbours do not touch
            text = text[:-1]
        middle = GAP + place * (column + GAP) + column // 2
        ImageDraw.Draw(strip).text((middle, GAP), text, fill="black", font=font, anchor="ma")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def _boards(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class TensorBoardPictures(Callback):
    """Shows the synthetic images by :func:`picture_grid`, whitening undone, and histograms of their values.

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
        arrange = partial(picture_grid, class_names=synthetic.class_names, per_class=self.per_class)
        for name, images in {"raw": synthetic.images, "ema": synthetic.ema_images}.items():
            if images is None:
                continue
            grid = arrange(synthetic.pictures(ema=name == "ema"), synthetic.labels)
            for logger in boards:
                logger.experiment.add_image(f"synthetic/{name}", grid, step)
                logger.experiment.add_histogram(f"values/{name}", images, step)


class HyperparameterReport(Callback):
    """Writes the hyper-parameters with the run's last scalars to TensorBoard's HPARAMS page, once, at the end.

    Nested ones have names like ``network_options/width``, the scalars names that begin with ``hp/``. Lightning's own
    entry is made before there is a result to show.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, unless a test with the result follows."""
        if not is_overridden("test_step", pl_module):
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them with the result of the test."""
        self._write(trainer, pl_module)

    @staticmethod
    def _write(trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {f"hp/{name}": float(value) for name, value in trainer.callback_metrics.items()}
        # LightningCLI's own entries are _class_path and _instantiator.
        settings = {key: value for key, value in pl_module.hparams.items() if not key.startswith("_")}
        for logger in _boards(trainer):
            logger.log_hyperparams(settings, metrics, trainer.global_step)
