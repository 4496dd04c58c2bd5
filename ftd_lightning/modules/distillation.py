"""The base of all methods that learn a synthetic set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.set_writer import SyntheticSetWriter
from ftd_lightning.contracts import DataDescription, Images, ImageShape
from ftd_lightning.core.arguments import decoder_of, matching_rules, plain
from ftd_lightning.core.evaluation import on_device
from ftd_lightning.core.labels import StudentLabels
from ftd_lightning.core.module import KEY, BaseModule
from ftd_lightning.core.ranks import mean_over_ranks
from ftd_lightning.core.step_guard import MAX_SKIPPED, StepGuard
from ftd_lightning.data.coresets import random_real_images
from ftd_lightning.data.datamodule import NoLoaders, given_images
from ftd_lightning.data.loaders import IterationCounter, IterationLoader
from ftd_lightning.data.sources import OWN_IMAGES
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import versions
from ftd_lightning.files.synthetic_set import SyntheticSet
from ftd_lightning.files.transforms import Standardization
from ftd_lightning.functional.seeding import network_to_device, to_device
from ftd_lightning.functional.selection import Ipc
from ftd_lightning.rules.base import LabelRule, MatchingRule, having, only_one
from ftd_lightning.sizes import as_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from ftd_lightning.core.labels import SetLabels
    from ftd_lightning.core.networks import Network
    from ftd_lightning.decoders.base import Decoder
    from ftd_lightning.functional.augment import Augmentation

Init = str | SyntheticSet
CONTINUES = "set "  # of ``init`` as it is recorded, before the fingerprint of the set that a fit continues from
SMALLEST_STEP_SIZE = 1e-8  # far below any step size that trains a network, far above float32's smallest number

# Arguments of methods' constructors, which they pass on unchanged.
COMMON = ("network", "network_options", "ipc", "init", "iterations_per_epoch", "seed", "real", "lr_images")
COMMON_TO_SOME = ("augment", "lr_step_size", "momentum", "rules", "decoder")


def common(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check the ``locals()`` of a constructor against their ranges, and select the common ones."""
    check_bounds(arguments["__class__"], arguments)
    return {name: arguments[name] for name in (*COMMON, *COMMON_TO_SOME) if name in arguments}


def _class_by_class(found: SyntheticSet) -> tuple[SyntheticSet, Ipc]:
    """Order a set by (most probable) class, with the labels that learning starts from; also return its ipc."""
    found.check("init")
    labels = found.labels
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    counts, order = classes.bincount(minlength=len(found.class_names)).tolist(), classes.argsort(stable=True)
    if found.metadata.get("label_kind") == "target":  # as if they were probabilities
        labels = labels / found.metadata.get("target_scale", 1.0) + 1 / labels.shape[1]
    found = replace(found, images=found.images[order], labels=labels[order])
    return found, counts[0] if len(set(counts)) == 1 else counts


class Distillation(BaseModule):
    """Learns synthetic images by gradient steps; the base of all methods.

    Automatic optimization: one optimizer, one global step per iteration; the number of iterations is the trainer's
    ``max_steps``. A method defines its loss (``training_step``, which returns it through :meth:`log_loss`), its batches
    (``train_dataloader``), and its name (``method``). A ``SyntheticSetWriter`` writes the set; the module adds one
    where the trainer has none.

    A step whose loss or gradient is not finite is skipped (images and momentum stay as they are), counted in
    ``matching/skipped_steps``, and after ten in a row the run ends with a ``DivergenceError``. Ten iterations in a row
    in which the images' gradient is exactly zero end it with an ``InputError``: the network lets no gradient through.
    On a GPU the counts are read every tenth iteration, so that the host does not wait for the device.

    A learned step size is kept positive by projection: after an update it is raised to 1e-8 where it fell below.

    Args:
        network, network_options, augment, seed: as for ``BaseModule``.
        ipc: synthetic images per class; a list names those of each, in label order. Those of a set to continue count.
        init: "real" starts from random real images of each class, "noise" from a standard normal; a ``SyntheticSet``,
            or its file, is continued: its images, and its labels and step size where they are learned.
        iterations_per_epoch: iterations that make a Lightning epoch.
        real: images (N, C, H, W) and labels (N,); None takes the datamodule's training images.
        lr_images: learning rate of the pixels, or of a decoder's parameters; 0 learns none.
        step_size: initial learning rate that networks are to be trained with on the set; a scalar, or one per step.
        lr_step_size: its learning rate; 0 keeps it, None says that the method has none.
        momentum: of SGD; None learns by Adam.
        rules: ideas that change the method; see ``rules.MatchingRule``.
        decoder: makes the images out of other parameters, which are learned in their place; see ``decoders.Decoder``.

    Attributes:
        images: (N, C, H, W) parameter, class by class; N is ipc * K, or the sum of a list. With a decoder, the images
            that an iteration starts with; of those that it does not use, older ones.
        decoder: the decoder, or None.
        codes: with a decoder, its parameters by name.
        labels: (N,) int64, the classes that the images are made for.
        soft_labels: labels other than these classes, or None.
        step_size: the current step size, a parameter.
        continued: the set to continue from, or None.
        first_labels: where learned labels start: the classes, (N,), or probabilities of that set, (N, K).
        initial_images: a copy of the images at the start; None in a module loaded from a checkpoint.
        scores: accuracies that ``EvaluateSynthetic`` measured of the current images.
        rules: the rules, built.
    """

    images: Tensor
    codes: nn.ParameterDict
    step_size: nn.Parameter
    continued: SyntheticSet | None
    labels: Tensor
    verbs = ("fit",)  # ``SyntheticEvaluation`` measures a set

    def __init__(
        self,
        *,
        network: Network | None,
        network_options: Mapping[str, Any] | None,
        ipc: Ipc,
        init: Init,
        augment: Augmentation,
        iterations_per_epoch: int,
        seed: int,
        real: tuple[Tensor, Tensor] | None,
        lr_images: float,
        step_size: float | list[float],
        lr_step_size: float | None = None,
        momentum: float | None = None,
        rules: Sequence[MatchingRule | Mapping[str, Any]] | None = None,
        decoder: Decoder | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network=network, network_options=network_options, augment=augment, seed=seed)
        self.ipc: Ipc = list(ipc) if isinstance(ipc, list | tuple) else ipc
        self.iterations_per_epoch, self.rules, self.continued = iterations_per_epoch, matching_rules(rules or ()), None
        if isinstance(init, str) and init not in ("real", "noise"):
            if Path(init).expanduser().is_file():
                init = SyntheticSet.load(init)
            elif not init.startswith(CONTINUES):
                raise InputError(f"init={init!r} is unknown: give the file of a synthetic set, 'real' or 'noise'")
        self.decoder = decoder_of(decoder)
        if self.decoder is not None and (isinstance(self.ipc, list) or init not in ("real", "noise")):
            raise InputError("decoder: give one ipc for all classes, and init 'real' or 'noise'")
        if isinstance(init, SyntheticSet):
            self.continued, self.ipc = _class_by_class(init)
            init = CONTINUES + init.fingerprint()
        self.init = init
        self._given = None if real is None else given_images(real)
        self._lr_images, self._lr_step_size, self._momentum = lr_images, lr_step_size, momentum
        self._initial_step_size = step_size
        self.soft_labels: SetLabels | None = None
        self.initial_images: Tensor | None = None
        self._average: Mapping[str, Tensor] = {}  # of the learned tensors, where one is kept
        self.scores: dict[str, dict[str, float | int]] = {}
        self._initial_weight: Tensor | None = None  # of the initial images in their average
        self._average_settings: dict[str, Any] = {}
        self._guard = StepGuard()
        self._loss: Tensor | None = None
        self._loaded_iterations = 0
        self._loaded: Mapping[str, Tensor] = {}  # a checkpoint's tensors, where no data is at hand
        self._loaded_state: Mapping[str, Any] | None = None  # waits until the device is known

    # The set: its start, and answers to callbacks

    def build(self) -> None:
        """Make the initial synthetic set, from :meth:`real_images`."""
        if self._loaded:  # the checkpoint's images follow
            self.register_buffer("labels", self._loaded["labels"].clone())
            if self.decoder is None:
                self.images = nn.Parameter(torch.zeros_like(self._loaded["images"]))
            else:
                of = "codes."
                codes = {name.removeprefix(of): value for name, value in self._loaded.items() if name.startswith(of)}
                self.decoder.restore(self._loaded_shape, self.labels, codes)
                self._learn_codes(self.decoder)
        else:
            drawn = self.init in ("real", "noise")
            start = self._drawn_images() if drawn else self._continued_images()
            images = start.images
            if self.data is None and self.init == "real" and not 0 <= float(images.min()) <= float(images.max()) <= 1:
                rank_zero_warn(
                    "real= holds images outside [0, 1], and pictures of the set will be clipped: fit with a "
                    "DistillationDataModule.from_datamodule(..., transform=) for their normalisation"
                )
            self.register_buffer("labels", start.labels.clone())
            if self.decoder is None:
                self.images = nn.Parameter(images.clone(), requires_grad=self._lr_images > 0)
            else:
                self.decoder.fit(images, self.labels)
                self._learn_codes(self.decoder)
            self.initial_images = self.images.detach().clone()
        classes = 0 if self.data is None else self.data.shape.num_classes
        self._images_of_class: list[int] = self.labels.bincount(minlength=classes).tolist()
        step_size = torch.tensor(self._initial_step_size)
        if self.continued is not None and self._lr_step_size and (found := self.continued.step_size) is not None:
            step_size = (found if found.shape == step_size.shape else found.mean()).to(step_size).expand_as(step_size)
        self.step_size = nn.Parameter(step_size.clone(), requires_grad=bool(self._lr_step_size))
        self.first_labels = self.labels if self.continued is None else self.continued.labels

    def _learn_codes(self, decoder: Decoder) -> None:
        """Make parameters of a decoder's; integers are not learned."""
        self.codes, kind = nn.ParameterDict(), type(decoder).__name__
        for name, value in decoder.parameters().items():
            if not isinstance(value, Tensor) or "." in name or hasattr(self.codes, name):
                raise InputError(f"decoder: {kind} cannot have a parameter {name!r}: see Decoder.begin")
            self.codes[name] = nn.Parameter(value.clone(), value.is_floating_point() and self._lr_images > 0)
        self._decode()

    def _decode(self) -> None:
        """Decode the present images, without a graph."""
        if self.decoder is not None:
            with torch.no_grad():
                self.images = self.decoder.decode(dict(self.codes.items()))

    def used_images(self, batch: Any) -> Tensor | None:
        """Return which images an iteration uses, (n,) int64 without repetition; None: all."""
        return None

    def _continued_images(self) -> Images:
        """Return images and classes of the set to continue from; refuse one of other data."""
        found, data = self.continued or SyntheticSet.load(self.init), self.data
        classes = found.labels if found.labels.ndim == 1 else found.labels.argmax(1)
        if data is None:  # ``real`` is as the set's images are
            names = found.class_names or [str(label) for label in range(int(classes.max()) + 1)]
            channels, *size = found.images.shape[1:]
            shape = ImageShape(channels, len(names), as_size(size))
            self.data = DataDescription(shape, names, found.transform, {"name": OWN_IMAGES})
        else:
            ours = (data.shape.zeros(1).shape[1:], list(data.class_names), data.transform.describe())
            theirs = (found.images.shape[1:], found.class_names or ours[1], found.transform.describe())
            for name, one, other in zip(("image shape", "class_names", "transform"), theirs, ours, strict=True):
                if one != other:
                    raise InputError(f"init: {name} of the set is {one!r:.90}, of the data {other!r:.90}")
        return Images(found.images, classes)

    @property
    def _begins_with_images(self) -> bool:
        return self.init == "real" and (self.decoder is None or self.decoder.begins_with_images)

    def _drawn_images(self) -> Images:
        """Draw the real images, or the noise, to start from."""
        real = self.real_images()
        if self._begins_with_images:
            return self.first_images(real)
        if self.decoder is None:
            labels = self.first_images(real).labels
        else:  # may make more of a class than there are real ones
            labels = torch.arange(int(real.labels.max()) + 1).repeat_interleave(torch.tensor(self.decoded_ipc(real)))
        noise = torch.randn(len(labels), *real.images.shape[1:], generator=self.generator("initial noise"))
        return Images(noise, labels)

    def first_images(self, real: Images) -> Images:
        """Choose the real images to start from: random ones of each class, class by class."""
        return random_real_images(real, self.decoded_ipc(real), self.seed)

    def decoded_ipc(self, real: Images) -> Ipc:
        """Return the images per class that networks are trained on; more than ipc with a decoder."""
        if self.decoder is None or isinstance(self.ipc, list):
            return self.ipc
        channels, *size = real.images.shape[1:]
        shape = ImageShape(channels, int(real.labels.max()) + 1, as_size(size))
        count, fewest = self.decoder.images_per_class(self.ipc, shape), int(real.labels.bincount().min())
        if count > fewest and self._begins_with_images:
            raise InputError(
                f"decoder: begins with {count} real images of each class, and one has {fewest}; give init='noise', a "
                "lower ipc, or the decoder other options"
            )
        return count

    def student_labels(self, answers: Callable[[], Iterable[Tensor]]) -> StudentLabels | None:
        """Make the labels of a label rule; None without one. ``answers`` is as for ``LabelRule.initial_logits``."""
        rule = only_one(self.rules, "labels")
        if not isinstance(rule, LabelRule):
            return None
        if self._loaded:  # the checkpoint's labels follow
            empty = torch.zeros_like(self._loaded["soft_labels.values"])
            return StudentLabels(rule, empty, learned=rule.made == "learned")
        if rule.made == "learned" and self.first_labels.ndim == 2:
            return StudentLabels(rule, self.first_labels.clamp_min(torch.finfo().tiny).log(), learned=True)
        logits = rule.initial_logits(self.labels, self.num_classes, answers)
        classes = one_hot(self.labels, self.num_classes).float()
        return StudentLabels(rule, classes if logits is None else logits, learned=logits is not None)

    def save_arguments(self, arguments: Mapping[str, Any], **options: Any) -> None:
        """Save a set to continue from as its fingerprint, with the ipc that it decides, and augmentation and rules."""
        own = ("ipc", "init", "augment", "rules", "decoder")
        built = {name: getattr(self, name) for name in own if name in arguments}
        super().save_arguments(arguments, **{**built, **options})

    @property
    def method(self) -> str:
        """Short name of the method, as in tables."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        if self.data is not None:
            return self.data.shape.num_classes
        return len(self.images_of_class)

    @property
    def images_of_class(self) -> list[int]:
        """Number of synthetic images of each class, in label order; decoded ones with a decoder."""
        return self._images_of_class

    @property
    def iterations(self) -> int:
        """Number of iterations that the set has had."""
        return self.global_step if self.attached else self._loaded_iterations

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps; waits for the device."""
        return int(self._guard.skipped)

    def step_was_applied(self) -> Tensor:
        """Return whether the last step moved the images, a bool scalar on the device."""
        return self._guard.applied

    def learned_images(self) -> dict[str, Tensor]:
        """Return the live images; see ``contracts.LearnsSet``."""
        self._decode()
        ema = self.ema_images
        return {"raw": self.images, **({} if ema is None else {"ema": ema})}

    def averaged(self) -> dict[str, Tensor]:
        """Return the live images, or what is learned in their place; see ``contracts.LearnsSet``."""
        if self.decoder is None:
            return {"images": self.images}
        return {f"codes.{name}": value for name, value in self.codes.items() if value.is_floating_point()}

    def keep_average(self, average: Mapping[str, Tensor], initial_weight: Tensor, settings: dict[str, Any]) -> None:
        """Take the moving average; see ``contracts.LearnsSet``."""
        self._average, self._initial_weight, self._average_settings = average, initial_weight, settings

    @property
    def ema_images(self) -> Tensor | None:
        """The images' moving average, or the images of averaged parameters; None where a fit keeps none."""
        if not self._average:
            return None
        if self.decoder is None:
            return self._average["images"]
        average = {name.removeprefix("codes."): value.to(self.labels.device) for name, value in self._average.items()}
        with torch.no_grad():
            return self.decoder.decode({**self.codes, **average})

    def record_scores(self, scores: dict[str, dict[str, float | int]]) -> None:
        """Add measured accuracies to the current set's metadata."""
        self.scores |= scores

    def evaluation_network(self, *seed: int | str) -> nn.Module:
        """Build a fresh network of the architecture that the set is made for."""
        return self.fresh.build(*seed)

    def exported_labels(self) -> Tensor:
        """Return the labels of the present set: (N,) classes, or (N, K)."""
        labels = None if self.soft_labels is None else self.soft_labels.of_set()
        return self.labels if labels is None else labels

    def describe(self) -> dict[str, Any]:
        """Return the set's metadata beyond settings: here the data and the network."""
        dataset = {"name": OWN_IMAGES} if self.data is None else self.data.dataset
        return {"dataset": dataset, "network": self.fresh.describe()}

    def synthetic_set(self) -> SyntheticSet:
        """Return the current synthetic set, on the CPU, with everything that describes it."""
        data, classes = self.data, [str(label) for label in self.labels.unique().tolist()]
        metadata = {
            "method": self.method,
            "augmentation": self.augment.describe(),
            **self.describe(),
            **({} if self.soft_labels is None else self.soft_labels.metadata),
            "settings": self.settings(),
            "iterations": self.iterations,
            "skipped_steps": self.skipped_steps,
            "versions": versions(),
        }
        if self._loss is not None:
            metadata["loss"] = float(self._loss)
        if self._guard.gates:
            metadata["gated_steps"] = int(self._guard.gated)
        if self._initial_weight is not None:
            metadata |= {"ema": self._average_settings, "ema_initial_weight": float(self._initial_weight)}
        if self.scores:
            metadata["scores"] = dict(self.scores)
        if self.decoder is not None:
            # In numbers of plain images: a generator may store more than ipc allows.
            stored = math.ceil(self.decoder.numbers() / self.images[0].numel())
            metadata |= {
                "method": f"{self.method}+{self.decoder.name}",
                "decoder": plain(self.decoder),
                "images_stored": max(self.ipc * self.num_classes, stored),  # type: ignore[operator]
                "numbers_stored": self.decoder.numbers(),
                "bytes_stored": self.decoder.bytes(),
            }
        codes, ema = dict[str, Tensor](), self.ema_images
        if self.decoder is None:
            images = self.images.detach().cpu().clone()
        else:  # decoded on the CPU from what a file holds, so that the codes alone give the same bits
            codes = {name: value.detach().cpu() for name, value in self.codes.items()}
            codes = {name: value.float() if value.is_floating_point() else value for name, value in codes.items()}
            with torch.no_grad():
                images = self.decoder.decode(codes)
        return SyntheticSet(
            images=images,
            labels=self.exported_labels().detach().cpu().clone(),
            step_size=self.step_size.detach().cpu().clone(),
            ema_images=None if ema is None else ema.cpu().clone(),
            class_names=classes if data is None else list(data.class_names),
            transform=Standardization([0.0], [1.0]) if data is None else data.transform,
            metadata=metadata,
            codes=codes,
        )

    # Real images and networks, for methods that draw them

    def real_images(self) -> Images:
        """Return the argument ``real``, or the data source's training images; raises InputError without both."""
        if self._given is not None:
            return self._given
        if self.source is None:
            raise InputError(
                "distillation starts from real images: fit with a DistillationDataModule (from_datasets and "
                "from_datamodule make one of yours), or give the argument real"
            )
        return self.source.part("train")

    def real_on_device(self) -> Images:
        """Return the real images on the device, or in host memory where they do not fit."""
        return on_device(self.real_images(), self.device)

    def draw_real(self, real: Images, count: int, *keys: int | str) -> Images:
        """Draw ``count`` of :meth:`real_on_device` (all, if fewer) to the device; equal keys give equal images."""
        order = torch.randperm(len(real.labels), generator=self.generator("real", *keys))
        index = to_device(order[:count], real.labels.device)
        images = to_device(real.images[index], self.device, self.images.dtype)
        return Images(images, to_device(real.labels[index], self.device))

    def fresh_network(self, purpose: str, *keys: int | str) -> nn.Module:
        """Draw a new network, in training mode on the device; equal keys give equal weights, on every rank."""
        return network_to_device(self.fresh.build(self.seed, purpose, *keys), self.device, self.images.dtype).train()

    # The fit

    def train_dataloader(self) -> IterationLoader[Any]:
        """Make a loader of bare iterations from the current one, for methods that draw real images themselves."""
        loader = IterationCounter(self.iterations_per_epoch)
        loader.load_state_dict({"iteration": self.global_step})  # loaders may be built again in every epoch
        return loader

    def val_dataloader(self) -> NoLoaders:
        """Return nothing: see :meth:`validation_step`."""
        return NoLoaders()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Do nothing, where Lightning would warn of a missing step; ``EvaluateSynthetic`` measures the set."""

    def configure_callbacks(self) -> list[Callback]:
        """Add a writer of the set where the trainer has none."""
        return [*super().configure_callbacks(), *self.missing_callbacks(SyntheticSetWriter)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give images, step size and learned labels a parameter group each."""
        groups: list[dict[str, Any]] = [{"params": [*self.averaged().values()], "lr": self._lr_images}]
        if self._lr_step_size is not None:
            groups.append({"params": [self.step_size], "lr": self._lr_step_size})
        groups += [] if self.soft_labels is None else self.soft_labels.groups()
        if self._momentum is not None:
            return torch.optim.SGD(groups, momentum=self._momentum)
        return torch.optim.Adam([{key: group[key] for key in ("params", "lr")} for group in groups])

    def on_fit_start(self) -> None:
        """Check the trainer; then call :meth:`begin` on the device."""
        super().on_fit_start()
        if self.trainer.max_steps < 0 and self.trainer.max_epochs == 1000:  # Lightning's default
            count = f"{1000 * self.iterations_per_epoch:,}"
            rank_zero_warn(f"{type(self).__name__}: this fit has {count} iterations; Trainer(max_steps=...) limits it")
        self._decode()  # on the device
        self.begin(self._loaded_state)
        self._loaded_state = None

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Prepare a fit on the device, where a checkpoint was loaded with its :meth:`extra_state`."""

    def on_train_start(self) -> None:
        """Refuse batches that are not this module's iterations."""
        if not isinstance(self.trainer.train_dataloader, IterationLoader):
            raise InputError(
                "a distillation iterates over its own loader, but the datamodule brings another: wrap it with "
                "DistillationDataModule.from_datamodule, or fit without a datamodule"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Decode the images of the iteration, with the graph that leads their gradient to the parameters."""
        if self.decoder is not None:
            codes, used = dict(self.codes.items()), self.used_images(batch)
            if used is None or len(used) == len(self.labels):
                self.images = self.decoder.decode(codes)
            else:  # the others stay as they were, and are not used
                used = to_device(used, self.device)
                self.images = self.images.detach().index_copy(0, used, self.decoder.decode(codes, used))
        return None

    def log_loss(self, loss: Tensor) -> Tensor:
        """Log a loss and return it; drop the scores of the previous images."""
        self.scores = {}
        self._loss = loss.detach()
        self.log("matching/loss", self._loss, prog_bar=True, batch_size=1)
        return loss

    def learned(self) -> dict[str, Tensor]:
        """Return the learned tensors by name."""
        labels = {} if self.soft_labels is None else self.soft_labels.learned()
        return {**self.averaged(), "step_size": self.step_size, **labels}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Judge the step, on all ranks together; log gradient norms."""
        norms = {name: value.grad.norm() for name, value in self.learned().items() if value.grad is not None}
        assert self._loss is not None
        none = torch.zeros_like(self._loss)
        still = [norms.get(name, none) == 0 for name, value in self.averaged().items() if value.requires_grad]
        self._guard.before(
            optimizer,
            [self._loss, *norms.values()],
            accepted=self._accepted(self._loss),
            still=torch.stack(still).all() if still else None,
            reduce=self._minimum_over_ranks,
        )
        self.log_dict({f"gradient_norm/{name}": norm for name, norm in norms.items()}, batch_size=1)

    def _accepted(self, loss: Tensor) -> Tensor | None:
        """Return whether all rules accept a step of this loss, a bool scalar, the same on all ranks; None: yes."""
        gates = having(self.rules, "accepts")
        mean = mean_over_ranks(loss, self.trainer.world_size) if gates else loss
        said = [answer for rule in gates if (answer := rule.accepts(mean)) is not None]
        return torch.stack(said).all() if said else None

    def _minimum_over_ranks(self, flag: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return flag

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip images, step size and labels each by its own norm, as the trainer's ``gradient_clip_val`` says."""
        # The step size's gradient is larger by orders of magnitude: by a joint norm, it would scale the images'.
        if gradient_clip_val is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for value in self.learned().values():
            torch.nn.utils.clip_grad_norm_(value, gradient_clip_val)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer, optimizer_closure: Any = None
    ) -> None:
        """Update, unless the step is not finite or not accepted; project the step size to be positive."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._guard.after()
        if self._lr_step_size is not None:
            with torch.no_grad():
                self.step_size.clamp_(min=SMALLEST_STEP_SIZE)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Store a teacher's labels; log step size and skipped steps; stop a run that only diverges."""
        log = {"matching/skipped_steps": self._guard.skipped.float()}
        if self._lr_step_size is not None:
            log["matching/step_size"] = self.step_size.detach().mean()
        if self._guard.gates:
            log["matching/gated_steps"] = self._guard.gated.float()
        self.log_dict(log, prog_bar=True, batch_size=1)
        if self.soft_labels is not None:
            self.soft_labels.end_step(self.step_was_applied())
        if self.device.type == "cpu" or self.global_step % MAX_SKIPPED == 0:  # reading a number is free on a CPU only
            self._guard.check(self.global_step - 1)

    def on_fit_end(self) -> None:
        """Decode the images that were learned, where the trainer left the module."""
        self._decode()

    def extra_state(self) -> dict[str, Any]:
        """Return the counts that the set records."""
        loss = None if self._loss is None else float(self._loss)
        shape = tuple(self.images.shape[1:])
        return {"skipped_steps": self._guard.state(), "iterations": self.global_step, "loss": loss, "shape": shape}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue to count; :meth:`begin` gets the state when a fit starts."""
        self._guard.load(state["skipped_steps"])
        self._loaded_iterations = int(state["iterations"])
        self._loss = None if state.get("loss") is None else torch.tensor(state["loss"])
        self._loaded_state = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load; without a trainer the images take their shape from the checkpoint."""
        if not self.attached:
            self._loaded = checkpoint["state_dict"]
            self._loaded_shape = checkpoint.get(KEY, {}).get("shape")
        super().on_load_checkpoint(checkpoint)
        self._loaded = {}  # nothing is built after this
