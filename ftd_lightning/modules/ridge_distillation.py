"""Parts of KIP and FRePo: the loss and the accuracy of ridge regression on a synthetic set."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftd_lightning.callbacks.evaluation import PARTS
from ftd_lightning.core.evaluation import mean_and_std
from ftd_lightning.functional.kernels import half_squared_error, ridge_predictions, ridge_weights
from ftd_lightning.functional.seeding import to_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftd_lightning.contracts import Images
    from ftd_lightning.modules.distillation import Distillation

BATCH = 2048  # real images whose kernel with the set is in memory at a time


def ridge_loss(k_ts: Tensor, k_ss: Tensor, targets: Tensor, real_targets: Tensor, reg: float) -> Tensor:
    """Return half the mean squared distance of predictions for real images from their targets.

    Args:
        k_ts: (M, N) kernel of real and synthetic images, float64.
        k_ss: (N, N), float64.
        targets: of the synthetic images, (N, K).
        real_targets: (M, K).
        reg: as for ``functional.ridge_predictions``.
    """
    return half_squared_error(ridge_predictions(k_ts, k_ss, targets, reg=reg), real_targets)


def ridge_accuracy(cross: Callable[[Tensor], Tensor], own: Tensor, targets: Tensor, reg: float, real: Images) -> Tensor:
    """Measure the share of real images that ridge regression classifies correctly, in [0, 1]: a scalar.

    Args:
        cross: maps real images (M, C, H, W) to their kernel with the set, (M, N).
        own: kernel of the set, (N, N).
        targets: of the set, (N, K).
        reg: as for ``functional.ridge_predictions``.
        real: on any device.
    """
    right, weights = torch.zeros((), device=own.device), ridge_weights(own, targets, reg=reg)
    for images, labels in zip(real.images.split(BATCH), real.labels.split(BATCH), strict=True):
        predictions = cross(to_device(images, own.device)).double() @ weights
        right += (predictions.argmax(1) == to_device(labels, own.device)).sum()
    return right / len(real.labels)


def record_accuracies(module: Distillation, name: str, measure: Callable[[Images], Tensor], every: int) -> None:
    """Measure by the method's own protocol where that is due or the fit ends, at the end of a batch.

    The accuracy is logged (``evaluation/ridge_test_accuracy``) and recorded in the set's scores.

    Args:
        module: KIP or FRePo.
        name: of the protocol, in the scores.
        measure: returns the accuracy of each kernel on real images, (n,).
        every: Lightning epochs between measurements; 0: only when the fit ends.
    """
    trainer, source = module.trainer, module.source
    due = (every and (trainer.current_epoch + 1) % every == 0) or trainer.current_epoch + 1 == trainer.max_epochs
    ends = trainer.should_stop or trainer.global_step == trainer.max_steps
    if source is None or not (ends or (due and trainer.is_last_batch)):
        return
    for part, (in_words, on_file) in PARTS.items():
        real = source.part(part)
        if not len(real.labels):
            continue
        with torch.no_grad():
            summary = mean_and_std(measure(real))
        module.record_scores({f"{name}, {in_words}": summary})
        log = partial(module.log, sync_dist=True, batch_size=1)  # equal on all ranks; Lightning warns if not said
        log(f"evaluation/ridge_{on_file}_accuracy", summary["mean"], prog_bar=part == "val")
