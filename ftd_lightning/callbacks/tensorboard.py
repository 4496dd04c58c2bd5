"""What TensorBoard shows beside the modules' scalars: pictures, histograms, hyper-parameters with their results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torchvision.utils import make_grid

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.last_epoch import is_due, is_last_epoch
from ftd_lightning.contracts import LearnsSet

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor


def picture_grid(pictures: Tensor, labels: Tensor, *, per_class: int = 10, smallest: int = 32) -> Tensor:
    """Lay pictures out, one column per class, in real colours.

    Args:
        pictures: (N, C, H, W) in [0, 1].
        labels: (N,) classes, or (N, K) probabilities.
        per_class: rows at most.
        smallest: pictures below this size are enlarged to it, pixel by pixel.

    Returns:
        (3, height, width) uint8.

    Example:
        >>> picture_grid(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1])).shape
        torch.Size([3, 70, 70])
    """
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    columns = [(classes == label).nonzero().squeeze(1)[:per_class] for label in classes.unique()]
    rows = min(len(column) for column in columns)
    index = torch.stack([column[:rows] for column in columns], dim=1).flatten()
    factor = -(-smallest // pictures.shape[-1])
    chosen = pictures[index].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid: Tensor = make_grid(chosen, nrow=len(columns), padding=2)
    return (grid.clamp(0, 1) * 255).round().to(torch.uint8)


def _boards(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class TensorBoardPictures(Callback):
    """Shows the synthetic images in real colours, whitening undone, and histograms of their values.

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
                grid = picture_grid(synthetic.pictures(ema=name == "ema"), synthetic.labels, per_class=self.per_class)
                board.add_image(f"synthetic/{name}", grid, step)
                board.add_histogram(f"values/{name}", images, step)


class HyperparameterReport(Callback):
    """Writes the hyper-parameters with the run's last scalars to TensorBoard's HPARAMS page, once, at the end.

    Lightning's own entry is made before there is a result to show.
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
            logger.log_hyperparams(pl_module.hparams, metrics, trainer.global_step)
