"""What all distillations share."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from ftd_lightning.callbacks.set_writer import SyntheticSetWriter
from ftd_lightning.contracts import Images
from ftd_lightning.core.module import PhaseModule
from ftd_lightning.core.ranks import mean_over_ranks
from ftd_lightning.core.step_guard import MAX_SKIPPED, StepGuard
from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.datamodule import NoLoaders, given_images
from ftd_lightning.data.loaders import IterationCounter, IterationLoader, fits_on
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import versions
from ftd_lightning.files.synthetic_set import SyntheticSet
from ftd_lightning.files.transforms import Standardization
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.rules.base import having, only_one

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from ftd_lightning.core.labels import InnerLabels
    from ftd_lightning.functional.augment import Augmentation
    from ftd_lightning.rules.base import MatchingRule, Teachers


def start_window(rules: Sequence[MatchingRule], max_start_epoch: int) -> Callable[[int], range]:
    """Return the start epochs of an iteration as a function of its number.

    Raises:
        InputError: where the first iteration has none, or some outside {0 .. max_start_epoch - 1}.
    """
    rule = only_one(rules, "start_epochs")
    everything = range(max_start_epoch)
    if rule is None:
        return lambda iteration: everything

    def epochs(iteration: int) -> range:
        found = rule.start_epochs(iteration, max_start_epoch)
        if found is None:
            return everything
        if not found or not all(end in everything for end in (found[0], found[-1])):
            raise InputError(
                f"{rule}: iteration {iteration} has start epochs {found.start} to {found.stop - 1}, but "
                f"max_start_epoch={max_start_epoch} allows 0 to {max_start_epoch - 1}"
            )
        return found

    epochs(0)
    return epochs


def choose_images(rule: MatchingRule, real: Images, ipc: int, seed: int, teachers: Teachers) -> Images:
    """Take ipc real images of each class, class by class, as a rule chooses them.

    Raises:
        InputError: where a class has fewer than ipc images, or the rule says so.
    """
    members = []
    for label in real.labels.unique().tolist():
        of_class = (real.labels == label).nonzero()[:, 0]
        if len(of_class) < ipc:
            raise InputError(f"class {label} has {len(of_class)} images, ipc={ipc} are needed")
        order = torch.randperm(len(of_class), generator=make_generator(seed, "initial images", label))
        members.append(of_class[order.to(of_class.device)])
    chosen = rule.initial_images([real.images[index] for index in members], ipc, teachers)
    if chosen is None:
        chosen = [torch.arange(ipc)] * len(members)
    picked = [index[choice.to(index.device)] for index, choice in zip(members, chosen, strict=True)]
    if any(len(index.unique()) != ipc for index in picked):
        raise InputError(f"{rule}: initial_images has to choose ipc={ipc} different images of each class")
    return real.take(torch.cat(picked))


def accepted(rules: Sequence[MatchingRule], loss: Callable[[], Tensor]) -> Tensor | None:
    """Say whether all rules accept a step, a bool scalar; None where none has a say.

    Args:
        rules: are asked.
        loss: returns the loss, averaged over ranks; called where a rule may refuse it.
    """
    gates = having(rules, "accepts")
    value = loss() if gates else None
    said = [answer for rule in gates if value is not None and (answer := rule.accepts(value)) is not None]
    return reduce(torch.logical_and, said) if said else None


class LearnedSet(PhaseModule):
    """The set of a distillation as callbacks see it; see ``contracts.LearnsSet``.

    Attributes:
        images: (ipc * K, C, H, W) parameter, class by class.
        labels: (ipc * K,) int64, the classes that the images are made for.
        inner_labels: what students are trained with instead of classes; None where they are trained with those.
        step_size: scalar: the learning rate that networks are to be trained with on the set.
        ema_images: their moving average, where a ``SyntheticEMA`` keeps one.
        scores: accuracies that ``EvaluateSynthetic`` measured of the current images.
    """

    images: nn.Parameter
    step_size: nn.Parameter | Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner_labels: InnerLabels | None = None
        self._guard = StepGuard()
        self._loaded_iterations = 0
        self.ema_images: Tensor | None = None
        self._initial_weight: Tensor | None = None  # of the initial images in their average
        self._average_settings: dict[str, Any] = {}
        self.scores: dict[str, dict[str, float | int]] = {}

    @property
    def method(self) -> str:
        """Short name of the method, as in tables."""
        raise NotImplementedError

    def set_metadata(self) -> dict[str, Any]:
        """Return what the set's metadata contains beyond settings: here the data and the network."""
        dataset = {"name": "own images"} if self.data is None else self.data.dataset
        return {"dataset": dataset, "network": self.fresh.describe()}

    @property
    def iterations(self) -> int:
        """Number of iterations that the set has had."""
        return self.step if self.attached else self._loaded_iterations

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._guard.skipped)

    def set_labels(self) -> Tensor:
        """Return the labels of the set as it is: (N,) classes, or (N, K) probabilities."""
        return self.labels if self.inner_labels is None else self.inner_labels.of_set()

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images by kind; see ``contracts.LearnsSet``."""
        average = {} if self.ema_images is None else {"ema": self.ema_images}
        return {"raw": self.images, **average}

    def keep_average(self, average: Tensor, initial_weight: Tensor, settings: dict[str, Any]) -> None:
        """Take a tensor as the moving average of the images; see ``contracts.LearnsSet``."""
        self.ema_images, self._initial_weight, self._average_settings = average, initial_weight, settings

    def record_scores(self, scores: dict[str, dict[str, float | int]]) -> None:
        """Add measured accuracies to the current set's metadata."""
        self.scores |= scores

    def augmentation(self) -> Augmentation:
        """Return the augmentation that the set is trained with."""
        return self.augment

    def evaluation_network(self, *seed: int | str) -> nn.Module:
        """Build a fresh network of the architecture that the set is made for."""
        return self.fresh.build(*seed)

    def progress_label(self) -> str:
        """Name what is done."""
        return "distillation"

    def planned_epochs(self) -> int | None:
        """Return None: the trainer's limits end the fit."""
        return None

    def _average_metadata(self) -> dict[str, Any]:
        if self._initial_weight is None:
            return {}
        return {"ema": self._average_settings, "ema_initial_weight": float(self._initial_weight)}

    def synthetic_set(self) -> SyntheticSet:
        """Return the current synthetic set, on the CPU, with everything that describes it."""
        data, classes = self.data, [str(label) for label in self.labels.unique().tolist()]
        return SyntheticSet(
            images=self.images.detach().cpu().clone(),
            labels=self.set_labels().detach().cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if self.ema_images is None else self.ema_images.cpu().clone(),
            class_names=classes if data is None else list(data.class_names),
            transform=Standardization([0.0], [1.0]) if data is None else data.transform,
            metadata={
                "method": self.method,
                "augmentation": self.augment.describe(),
                **self.set_metadata(),
                **({} if self.inner_labels is None else {"labels_made": self.inner_labels.made}),
                "settings": self.settings(),
                "iterations": self.iterations,
                "skipped_steps": self.skipped_steps,
                **({"gated_steps": int(self._guard.gated)} if self._guard.gates else {}),
                **self._average_metadata(),
                **({"scores": dict(self.scores)} if self.scores else {}),
                "versions": versions(),
            },
        )


Init = Literal["real", "noise"]


class Distillation(LearnedSet):
    """The base of all methods that learn synthetic images by gradient steps.

    Automatic optimization: one optimizer, one global step per iteration; the number of iterations is the trainer's
    ``max_steps``. A method defines its loss (``training_step``, which returns it through :meth:`logged`), its batches
    (``iteration_loader``), and what its set says of it (``method``, ``set_metadata``). Its hyper-parameters include
    ``ipc``, ``init`` and ``seed``. A ``SyntheticSetWriter`` writes the set; the module adds one where the trainer has
    none.

    A step whose loss or gradient is not finite is skipped (images and momentum stay as they are), counted in
    ``matching/skipped_steps``, and after ten in a row the run ends with a ``DivergenceError``. Ten iterations in a row
    in which the images' gradient is exactly zero end it with an ``InputError``: the network lets no gradient through.
    Neither makes the host wait for the device: there the counts are read every tenth iteration.

    Attributes:
        initial_images: a copy of the images at the start; None in a module loaded from a checkpoint.
        rules: ideas that change how it is learned; see ``functional.MatchingRule``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rules: Sequence[MatchingRule] = ()
        self._real: Images | None = None  # see keep_real
        self._loss: Tensor | None = None
        self._loaded_shapes: dict[str, torch.Size] = {}  # of a checkpoint's tensors, where no data is at hand
        self.initial_images: Tensor | None = None

    def iteration_loader(self) -> IterationLoader[Any]:
        """Make the training loader, starting at the current iteration; the datamodule asks for it.

        Here one of bare iterations, for methods that draw real images themselves.
        """
        loader = IterationCounter(self.hparams["iterations_per_epoch"])
        loader.load_state_dict({"iteration": self.step})  # loaders may be built again in every epoch
        return loader

    def train_dataloader(self) -> IterationLoader[Any]:
        """Return the iterations to a trainer without a datamodule."""
        return self.iteration_loader()

    def val_dataloader(self) -> NoLoaders:
        """Return nothing: see :meth:`validation_step`."""
        return NoLoaders()

    def configure_callbacks(self) -> list[Callback]:
        """Add a writer of the set where the trainer has none."""
        return [*super().configure_callbacks(), *self.missing_callbacks(SyntheticSetWriter)]

    @property
    def verbs(self) -> list[str]:
        """A set is fitted; :class:`SyntheticEvaluation` measures it."""
        return ["fit"]

    def keep_real(self, real: tuple[Tensor, Tensor] | None) -> None:
        """Keep the argument ``real``; see ``given_images``."""
        self._real = None if real is None else given_images(real)

    def make_images(self) -> None:
        """Make the initial synthetic set, from the argument ``real`` or the data source's training images.

        Raises:
            InputError: where there are neither, or too few of a class.
        """
        if self._loaded_shapes:  # the checkpoint's images follow
            self.images = nn.Parameter(torch.zeros(self._loaded_shapes["images"]))
            self.register_buffer("labels", torch.zeros(len(self.images), dtype=torch.long))
            return
        ipc, seed = self.hparams["ipc"], self.hparams["seed"]
        start = self.first_images(self.real_images(), ipc, seed)
        images = start.images
        if self.hparams["init"] == "noise":
            images = torch.randn(images.shape, generator=make_generator(seed, "initial noise"))
        self.images = nn.Parameter(images.clone(), requires_grad=self.hparams["lr_images"] > 0)
        self.register_buffer("labels", start.labels.clone())
        self.initial_images = images.clone()

    def first_images(self, real: Images, ipc: int, seed: int) -> Images:
        """Choose the real images to start from: ipc random ones of each class, class by class."""
        return random_real_images(real, ipc, seed)

    def real_images(self) -> Images:
        """Return the argument ``real``, or the data source's training images.

        Raises:
            InputError: where there are neither.
        """
        if self._real is not None:
            return self._real
        if self.source is None:
            raise InputError(
                "distillation starts from real images: fit with a DistillationDataModule (from_datasets and "
                "from_datamodule make one of yours), or give the argument real"
            )
        return self.source.part("train")

    def real_on_device(self) -> Images:
        """Return the real images on the device, or in host memory where they do not fit."""
        real = self.real_images()
        place = self.device if fits_on(self.device, real.images) else torch.device("cpu")
        return Images(real.images.to(place), real.labels.to(place))

    def on_train_start(self) -> None:
        """Refuse batches that are not this module's iterations.

        Raises:
            InputError: for another loader.
        """
        if not isinstance(self.trainer.train_dataloader, IterationLoader):
            raise InputError(
                "a distillation iterates over its own loader, but the datamodule brings another: wrap it with "
                "DistillationDataModule.from_datamodule, or fit without a datamodule"
            )

    def logged(self, loss: Tensor) -> Tensor:
        """Log a loss and return it; the images change with it, so scores of the old ones are forgotten."""
        self.scores = {}
        self._loss = loss.detach()
        self.log("matching/loss", self._loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing: to measure a set is to train networks on it, which ``EvaluateSynthetic`` does.

        Lightning warns of every datamodule with held-out images whose module lacks this.
        """

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Judge the step, on all ranks together; log gradient norms."""
        norms = {name: value.grad.norm() for name, value in self.learned().items() if value.grad is not None}
        assert self._loss is not None
        self._guard.before(
            optimizer,
            [self._loss, *norms.values()],
            accepted=self.accepted(self._loss),
            still=norms["images"] == 0 if "images" in norms else None,
            reduce=self._minimum_over_ranks,
        )
        self.log_dict({f"gradient_norm/{name}": norm for name, norm in norms.items()}, batch_size=1)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip images, step size and labels each by its own norm, as the trainer's ``gradient_clip_val`` says.

        The step size's gradient is larger than the images' by orders of magnitude: a joint norm would scale the images
        by the step size's size.
        """
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        for value in self.learned().values():
            torch.nn.utils.clip_grad_norm_(value, gradient_clip_val)
        return None

    def learned(self) -> dict[str, Tensor]:
        """Return what is learned, by name."""
        labels = {} if self.inner_labels is None else self.inner_labels.learned()
        return {"images": self.images, "step_size": self.step_size, **labels}

    def accepted(self, loss: Tensor) -> Tensor | None:
        """Ask the rules whether a step of this loss is to be made, a bool scalar, the same on all ranks; None: yes."""
        return accepted(self.rules, lambda: mean_over_ranks(loss, self.trainer.world_size))

    def _minimum_over_ranks(self, flag: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return flag

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, unless the step is not finite or not accepted."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._guard.after(self.optimizers(use_pl_optimizer=False))  # type: ignore[arg-type]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep labels that teachers gave; log the count of skipped steps; stop a run that only diverges."""
        if self.inner_labels is not None:
            self.inner_labels.keep(self.step_was_applied())
        self.log("matching/skipped_steps", self._guard.skipped.float(), prog_bar=True, batch_size=1)
        if self._guard.gates:
            self.log("matching/gated_steps", self._guard.gated.float(), prog_bar=True, batch_size=1)
        if self.device.type == "cpu" or self.step % MAX_SKIPPED == 0:  # reading a number costs nothing on a CPU only
            self._guard.check(self.step - 1)

    def step_was_applied(self) -> Tensor:
        """Say whether the last step moved the images: a bool scalar on the device."""
        return self._guard.applied

    @property
    def skipped_in_a_row(self) -> int:
        """Number of skipped steps since the last good one; waits for the device."""
        return int(self._guard.in_a_row)

    def extra_state(self) -> dict[str, Any]:
        """Keep the counts that the set records."""
        return {"skipped_steps": self._guard.state(), "iterations": self.step}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue to count."""
        self._guard.load(state["skipped_steps"])
        self._loaded_iterations = int(state["iterations"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load; without a trainer the images take their shape from the checkpoint."""
        if not self.attached:
            self._loaded_shapes = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        super().on_load_checkpoint(checkpoint)
