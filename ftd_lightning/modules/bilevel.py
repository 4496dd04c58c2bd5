"""DD, BPTT, RaT-BPTT and GTN: images on which a fresh network trains best, differentiated through its training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ftd_lightning.core.arguments import inner_optimizer
from ftd_lightning.core.labels import StudentLabels
from ftd_lightning.core.networks import Network
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.decoders.generator import Generator
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.inner_optimizers import InnerAdam, InnerOptimizer, InnerSGD
from ftd_lightning.functional.inner_step import Precision, loss_in, student_logits
from ftd_lightning.functional.matching import chunked_permutations
from ftd_lightning.functional.seeding import derive_seed, to_device
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.functional.unroll import flatten_parameters, unroll
from ftd_lightning.modules.distillation import Distillation, Init, common
from ftd_lightning.rules.base import MatchingRule, having

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

    from ftd_lightning.files.synthetic_set import SyntheticSet


@torch.no_grad()
def clip_by_average(gradient: Tensor, average: Tensor, *, factor: float, decay: float = 0.9) -> None:
    """Scale a gradient down to ``factor`` times the moving average of its norm, in place and without synchronising.

    As in the code of RaT-BPTT (Feng et al., ICLR 2024): the average, a scalar that is 0 before the first call, is
    updated in place by the unclipped norm first. A norm that is not finite leaves it as it is.
    """
    norm = gradient.norm()
    moved = torch.where(average > 0, decay * average + (1 - decay) * norm, norm)
    average.copy_(torch.where(torch.isfinite(norm), moved, average))
    limit = factor * average
    gradient.mul_(torch.where(norm > limit, limit / norm, torch.ones_like(norm)))


Schedule = Literal["shuffled", "fixed"]
# Rule hooks that need teachers; this method has none.
OF_TEACHERS = ("begin", "compared", "keep", "distance", "start_epochs", "initial_images")
LARGEST_MOMENTUM = 0.999
EVALUATION_LR = 0.01  # of SGD with its own momentum, for sets whose inner optimizer is another


class BilevelDistillation(Distillation):
    """Learns the set on which a fresh network trains best, without teachers.

    In every iteration a fresh network is trained on the set for some steps, and the cross entropy of real images at its
    weights is differentiated through these steps, exactly and in the activation memory of one. By settings this is

    - **DD** (Wang et al., arXiv 1811.10959): ``schedule="fixed"``, a mini-batch and a learned step size for every step;
      ``init="noise"``. With ``LearnedLabels(init="one_hot")`` it is SLDD (Sucholutsky and Schonlau, 2021).
    - **BPTT**: ``schedule="shuffled"``, all steps are differentiated.
    - **RaT-BPTT** (Feng et al., ICLR 2024): only ``window`` steps at a random place; ``InnerAdam``; ``clip=2``.
    - **GTN** (Such et al., ICML 2020): ``schedule="fixed"``, ``decoder=Generator()``, ``path=True``, and a learned
      momentum for every step: ``InnerSGD(momentum=0.5)`` with ``lr_momentum``.

    Images, step size, momentum and labels are learned by one Adam. Under DDP every rank trains other networks and the
    gradient is averaged: W ranks with s networks per step learn the set of one process with W * s.

    Args:
        network: a name, an import path, or a function that builds one.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random real images of each class), "noise" (standard normal), or a set or its file to continue.
        syn_steps: T, inner steps.
        window: M, the steps that are differentiated: those before a step drawn from {M .. T}; None: all T.
        optimizer: of the inner steps, an ``InnerSGD``, an ``InnerAdam``, or as in a config.
        syn_batch: synthetic images per inner step; None takes all of them.
        schedule: "shuffled" draws mini-batches anew in every iteration; "fixed" gives step i always the i-th one, made
            of one image of each class after the other, and the i-th step size and learned momentum.
        step_size_init: inner learning rate at the start, > 0.
        fixed_network: train the same initial network in every iteration.
        batch_real: real images per network and iteration.
        lr_images: learning rate of the pixels, or of a decoder's parameters.
        lr_step_size: learning rate of the step sizes; 0 keeps them.
        lr_momentum: learning rate of the momentum of an ``InnerSGD``, which stays in [0, 0.999]; 0 keeps it.
        path: add the losses after all other steps of the window, each of real images of its own.
        clip: clip the gradients of images and of learned labels, each at this multiple of its norm's moving average
            (decay 0.9); None does not clip.
        rules: a ``LabelRule`` that learns, a ``LossGate``; those that ask teachers are refused.
        augment: of synthetic and of real images: an ``Augmentation``, its fields as a mapping, or a strategy.
        networks_per_step: networks per iteration on each rank, whose losses are averaged.
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images, networks, batches and augmentation.
        real: images (N, C, H, W) and labels (N,), where there is no DistillationDataModule.
        compile: compile the inner steps: True, False, "auto" or "cuda_graphs"; see ``TrajectoryMatching``.
        precision: of the inner steps and of their derivatives, "float32" or "bf16"; see ``functional.unroll``.
        decoder: learn parameters that images are decoded from, in place of pixels; see ``decoders.Decoder``.
    """

    gradient_averages: Tensor

    def __init__(
        self,
        network: Network = "convnet",
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        syn_steps: int = 30,
        window: int | None = None,
        optimizer: InnerOptimizer | dict[str, Any] = InnerSGD(),  # noqa: B008  frozen
        syn_batch: int | None = None,
        schedule: Schedule = "shuffled",
        step_size_init: float = 0.01,
        fixed_network: bool = False,
        batch_real: int = 1024,
        lr_images: float = 0.01,
        lr_step_size: float = 0.001,
        lr_momentum: float = 0.0,
        path: bool = False,
        clip: float | None = None,
        rules: list[MatchingRule] | list[dict[str, Any]] | None = None,
        augment: Augmentation | dict[str, Any] | str = "",
        networks_per_step: int = 1,
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        compile: Compile = "auto",  # noqa: A002
        precision: Precision = "float32",
        decoder: Decoder | dict[str, Any] | None = None,
    ) -> None:
        augment = Augmentation.of(augment)
        super().__init__(
            **common(locals()),
            step_size=[float(step_size_init)] * syn_steps if schedule == "fixed" else float(step_size_init),
        )
        compiles(compile, torch.device("cpu"))  # refuses an unknown setting
        loss_in(precision)  # as well
        if schedule not in get_args(Schedule):
            raise InputError(f"schedule={schedule!r} is unknown: choose from {list(get_args(Schedule))}")
        if window is not None and window > syn_steps:
            raise InputError(f"window={window} must be at most syn_steps={syn_steps}")
        self.optimizer = inner_optimizer(optimizer)
        if lr_momentum and not (isinstance(self.optimizer, InnerSGD) and self.optimizer.momentum):
            raise InputError("lr_momentum: there is no momentum to learn: give optimizer an InnerSGD(momentum=...)")
        self._of_its_own = isinstance(self.optimizer, InnerAdam) or lr_momentum > 0  # step sizes are for it alone
        if self.continued is not None and self._of_its_own:
            self.continued.step_size = None  # see ``synthetic_set``
        self.save_arguments(locals(), optimizer=self.optimizer)
        for hook in OF_TEACHERS:
            if asking := having(self.rules, hook):
                raise InputError(f"rules: {type(asking[0]).__name__} asks teachers ({hook}), but there are none here")

    def build(self) -> None:
        """Make the student, the initial synthetic set and its labels."""
        # In a tuple, no submodule: its weights are neither in checkpoints nor among DDP's parameters.
        self._student = (self.fresh.architecture().requires_grad_(False).train(),)
        super().build()
        self.momentum: nn.Parameter | None = None
        if self.hparams["lr_momentum"] and isinstance(self.optimizer, InnerSGD):
            self.momentum = nn.Parameter(torch.full_like(self.step_size, float(self.optimizer.momentum)))
        self.soft_labels = labels = self.student_labels(self._no_teachers)
        if labels is not None and not labels.learned():
            raise InputError("rules: labels come from teachers, but there are none here")
        # Norms of the gradient of the images, or of each of a decoder's parameters, and of the labels.
        self.register_buffer("gradient_averages", torch.zeros(len(self.averaged()) + 1))

    @staticmethod
    def _no_teachers() -> list[Tensor]:
        raise InputError("rules: labels start from teachers, but there are none here: give init='one_hot'")

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the student to the device; the real images too, where they fit."""
        self._student[0].to(self.device, self.images.dtype)
        self._real = self.real_on_device()

    def training_step(self, batch: dict[str, int], batch_idx: int) -> Tensor:
        """Average the losses of this rank's networks."""
        with torch.autocast(self.device.type, enabled=False):  # the backward run is not under it either
            losses = [self._loss_of(batch["iteration"], slot) for slot in self._slots()]
            return self.log_loss(torch.stack(losses).mean())

    def _slots(self) -> range:
        """Return the numbers of this rank's networks."""
        count = self.hparams["networks_per_step"]
        return range(self.global_rank * count, (self.global_rank + 1) * count)

    def used_images(self, batch: dict[str, int]) -> Tensor | None:
        """Return the images in the mini-batches of the inner steps, those before the window too."""
        if self.hparams["syn_batch"] is None:
            return None
        drawn = [index for slot in self._slots() for index in self._batches(batch["iteration"], slot)]
        return torch.cat(drawn).unique()

    def _loss_of(self, iteration: int, slot: int) -> Tensor:
        """Train a network on the set, and measure real images at its weights."""
        hparams, student, keys = self.hparams, self._student[0], (iteration, slot)
        steps, skip = self.draw_window(*keys)
        start = self.fresh.build(self.seed, "network", *((0, 0) if hparams["fixed_network"] else keys))
        labels = self.soft_labels.learned_labels() if isinstance(self.soft_labels, StudentLabels) else self.labels
        path = unroll(
            student,
            to_device(flatten_parameters(start), self.device, self.images.dtype),
            self.images,
            labels,
            self.step_size[:steps] if self.step_size.ndim else self.step_size,
            batches=self._batches(*keys),
            augment=self.augment or None,
            seed=derive_seed(self.seed, "dsa", *keys),
            compile=hparams["compile"],
            precision=hparams["precision"],
            optimizer=self._inner_optimizer(),
            skip=skip,
            path=hparams["path"],
        )
        *before, last = path if hparams["path"] else [path]
        total = self._real_loss(last, *keys)
        for step, weights in enumerate(before):
            # Each is differentiated up to its weights at once, which frees its graph; the adjoint takes it on.
            found = weights.detach().requires_grad_()
            loss = self._real_loss(found, *keys, step)
            (gradient,) = torch.autograd.grad(loss, found)
            total = total + loss.detach() + torch.dot(weights - weights.detach(), gradient)
        return total

    def _inner_optimizer(self) -> InnerOptimizer:
        """Return the inner optimizer, with its momentum where that is learned."""
        if self.momentum is None or not isinstance(self.optimizer, InnerSGD):
            return self.optimizer
        return replace(self.optimizer, momentum=self.momentum)

    def _real_loss(self, weights: Tensor, *keys: int) -> Tensor:
        """Return the loss of real images, drawn by the keys, at weights (P,)."""
        real = self.draw_real(self._real, self.hparams["batch_real"], *keys)
        images = self.augment(real.images, self.generator("real dsa", *keys))
        return cross_entropy(student_logits(self._student[0], weights, images), real.labels)

    def draw_window(self, iteration: int, slot: int) -> tuple[int, int]:
        """Return how many steps are made, and how many of them come before the window."""
        steps, window = self.hparams["syn_steps"], self.hparams["window"]
        if window is None:
            return steps, 0
        generator = self.generator("window", iteration, slot)
        skip = int(torch.randint(steps - window + 1, (1,), generator=generator))
        return skip + window, skip

    def _batches(self, iteration: int, slot: int) -> list[Tensor]:
        """Return the mini-batches of the inner steps up to the window's end."""
        count, (steps, _), size = len(self.labels), self.draw_window(iteration, slot), self.hparams["syn_batch"]
        if self.hparams["schedule"] == "shuffled":
            return chunked_permutations(count, steps, self.generator("batches", iteration, slot), batch_size=size)
        # The first image of every class, then the second of every class, and so on.
        ranks = torch.cat([torch.arange(of_class) for of_class in self.images_of_class])
        chunks = ranks.argsort(stable=True).split(size or count)
        return [chunks[step % len(chunks)] for step in range(steps)]

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by name, the momentum too."""
        return super().learned() | ({} if self.momentum is None else {"momentum": self.momentum})

    def configure_optimizers(self) -> Optimizer:
        """Give the momentum a parameter group, too."""
        optimizer = super().configure_optimizers()
        if self.momentum is not None:
            optimizer.add_param_group({"params": [self.momentum], "lr": self.hparams["lr_momentum"]})
        return optimizer

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Update, and project the momentum, too."""
        super().optimizer_step(*arguments, **options)
        if self.momentum is not None:
            with torch.no_grad():
                self.momentum.clamp_(0, LARGEST_MOMENTUM)

    def configure_gradient_clipping(self, optimizer: Optimizer, *arguments: Any, **options: Any) -> None:
        """Clip images and labels at multiples of their average norms, then as the trainer says."""
        if self.hparams["clip"] is not None:  # not step sizes and momentum, as published
            learned = self.learned()
            for name, average in zip((*self.averaged(), "labels"), self.gradient_averages, strict=True):
                if name in learned and (gradient := learned[name].grad) is not None:
                    clip_by_average(gradient, average, factor=self.hparams["clip"])
        super().configure_gradient_clipping(optimizer, *arguments, **options)

    @property
    def method(self) -> str:
        """Name by the settings: "gtn", "dd", "bptt" or "rat-bptt", and by the rules: "dd+labels" is SLDD."""
        kind = "rat-bptt" if self.hparams["window"] is not None else "bptt"
        kind = "dd" if self.hparams["schedule"] == "fixed" else kind
        kind = "gtn" if isinstance(self.decoder, Generator) else kind
        return "+".join([kind, *(rule.name for rule in self.rules)])

    def settings(self) -> dict[str, Any]:
        """Count the networks of all ranks, as one process that learns the same would have them."""
        settings = super().settings()
        if self.attached:
            settings["networks_per_step"] *= self.trainer.world_size
        return settings

    def describe(self) -> dict[str, Any]:
        """Add the learned momentum, and the step sizes that belong to it, to the set's metadata."""
        described = super().describe()
        if self.momentum is not None:
            described |= {"inner_momentum": self.momentum.tolist(), "inner_step_size": self.step_size.tolist()}
        return described

    def synthetic_set(self) -> SyntheticSet:
        """Return the set; one that was made for Adam or a learned momentum carries 0.01, for evaluations by SGD."""
        made = super().synthetic_set()
        return replace(made, step_size=torch.tensor(EVALUATION_LR)) if self._of_its_own else made
