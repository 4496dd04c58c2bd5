"""The exponential moving average of the synthetic images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import LearnsSet

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SyntheticEMA(Callback):
    """Averages the images after every update: ``S_ema <- d * S_ema + (1 - d) * S``, from the initial images on.

    Images only: an average of labels means nothing, and the step size that travels is the last one. With decay 0.9999
    and 5000 updates the initial images still weigh 0.61; ``warmup`` lets d grow to its value instead.

    Args:
        decay: d in [0, 1).
        warmup: after update k (from 1) use ``min(decay, k / (k + 9))``.

    Raises:
        InputError: for a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.9995, warmup: bool = False) -> None:
        check_bounds(SyntheticEMA, locals())
        self.decay = decay
        self.warmup = warmup
        self.average: torch.Tensor | None = None
        self.updates = torch.tensor(0)
        self._loaded = False
        self._module: LearnsSet | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the images as they are, unless this module's average continues or a checkpoint contained one."""
        self._module = pl_module if isinstance(pl_module, LearnsSet) else None
        if self._module is None:
            return
        learned = self._module.learned_images()
        continues = self.average is not None and (self._loaded or learned.get("ema") is self.average)
        if not continues:  # also after a fit of another module
            self.average, self.updates = learned["raw"], torch.tensor(0)
        self._loaded = False
        assert self.average is not None
        self.average = self.average.detach().to(learned["raw"].device, copy=True)
        self._module.keep_average(self.average)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, except after a skipped step, which was no update."""
        if self._module is None:
            return
        assert self.average is not None
        images = self._module.learned_images()["raw"].detach()
        # Whether it was an update is known on the device alone, and the host does not wait to learn it.
        updated = self._module.step_was_applied().to(images.device)
        self.updates = self.updates.to(images.device) + updated
        weight: float | torch.Tensor = 1 - self.decay
        if self.warmup:
            weight = (9 / (self.updates + 9)).clamp(min=weight)
        self.average.lerp_(images, (updated * weight).to(images.dtype))

    def state_dict(self) -> dict[str, Any]:
        """Keep the average."""
        return {"average": self.average, "updates": int(self.updates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the average."""
        self.average, self.updates = state_dict["average"], torch.tensor(state_dict["updates"])
        self._loaded = self.average is not None
