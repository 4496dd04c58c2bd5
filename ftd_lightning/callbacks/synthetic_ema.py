"""The exponential moving average of the synthetic images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback

from ftd_lightning.bounds import check_bounds
from ftd_lightning.contracts import LearnsSet
from ftd_lightning.core.resume import refuse_changes
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class SyntheticEMA(Callback):
    """Averages the images after every update: ``S_ema <- d * S_ema + (1 - d) * S``, from the initial images on.

    Images only, or a decoder's parameters: an average of labels means nothing, and the set keeps the last step size.
    After k updates the initial images still weigh d^k: with decay 0.9999, 0.86 after 1,500 updates and 0.61 after
    5,000. The set records this weight (metadata ``ema_initial_weight``) and the settings of the average (``ema``).

    Args:
        decay: d in [0, 1).
        bias_correction: average the updated images alone, with the weights of the same decay: ``(S_ema - d^k S_0) /
            (1 - d^k)``, as Adam corrects its averages (Kingma and Ba, ICLR 2015).
    """

    def __init__(self, decay: float = 0.9995, bias_correction: bool = False) -> None:
        check_bounds(SyntheticEMA, locals())
        self.settings = {"decay": decay, "bias_correction": bias_correction}
        self.average: dict[str, torch.Tensor] = {}
        self.updates, self.initial_weight = torch.tensor(0), torch.tensor(1.0)
        self._module: LearnsSet | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; the checkpoint of this one is loaded later."""
        if stage == "fit":
            self.average, self.updates, self.initial_weight = {}, torch.tensor(0), torch.tensor(1.0)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the images as they are, unless a checkpoint contained an average."""
        self._module = pl_module if isinstance(pl_module, LearnsSet) else None
        if self._module is None:
            return
        values = self._module.averaged()
        self.average = {
            name: self.average.get(name, value).detach().to(value.device, copy=True) for name, value in values.items()
        }
        self.initial_weight = self.initial_weight.to(next(iter(values.values())).device, copy=True)
        # The module holds these very tensors, which are updated in place.
        self._module.keep_average(self.average, self.initial_weight, self.settings)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, except after a skipped step, which was no update."""
        if self._module is None:
            return
        # Only the device knows whether it was an update, and the host does not wait to learn it.
        updated = self._module.step_was_applied().to(self.initial_weight.device)
        self.updates = self.updates + updated
        weight = updated * self._weight()
        for name, value in self._module.averaged().items():
            self.average[name].lerp_(value.detach(), weight.to(value.dtype))
        self.initial_weight.mul_(1 - weight)

    def _weight(self) -> float | torch.Tensor:
        """Weigh the present images."""
        decay = self.settings["decay"]
        if not self.settings["bias_correction"]:
            return 1 - decay
        log = math.log(decay) if decay else -math.inf
        # 1 - d^k by expm1: in float32 the difference would lose all digits for the first updates.
        return ((1 - decay) / -torch.expm1(self.updates.clamp(min=1) * log)).clamp(max=1)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without an average: it cannot begin in the middle of a distillation."""
        if isinstance(pl_module, LearnsSet) and self.state_key not in checkpoint["callbacks"]:
            raise InputError("SyntheticEMA: the checkpoint has no average, which begins with the fit; leave it out")

    def state_dict(self) -> dict[str, Any]:
        """Keep the average."""
        numbers = {"updates": int(self.updates), "initial_weight": float(self.initial_weight)}
        return {**self.settings, "average": self.average, **numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the average; refuse a state of other settings."""
        refuse_changes(state_dict, self.settings, prefix="SyntheticEMA.")
        self.average, self.updates = state_dict["average"], torch.tensor(state_dict["updates"])
        self.initial_weight = torch.tensor(state_dict["initial_weight"])
