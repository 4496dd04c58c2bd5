"""The distillation phase: synthetic images and step size learned by matching teacher segments (Eq. 4-5)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftd_lightning.contracts import Images
from ftd_lightning.core.labels import RecordedTeachers, StudentLabels
from ftd_lightning.core.networks import Network, NetworkFactory, student_networks
from ftd_lightning.core.resume import refuse_changes
from ftd_lightning.data.loaders import SegmentBatch, SegmentLoader
from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.files.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.inner_step import Precision, loss_in
from ftd_lightning.functional.matching import Match, chunked_permutations, match
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.selection import Ipc, images_per_class
from ftd_lightning.functional.unroll import Unroll
from ftd_lightning.modules.distillation import Distillation, Init, common
from ftd_lightning.rules.base import MatchingRule, having, only_one

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ftd_lightning.rules.base import Teachers


def start_window(rules: Sequence[MatchingRule], max_start_epoch: int) -> Callable[[int], range]:
    """Return the start epochs of an iteration as a function of its number; raises InputError for impossible ones."""
    rule, everything = only_one(rules, "start_epochs"), range(max_start_epoch)

    def epochs(iteration: int) -> range:
        found = None if rule is None else rule.start_epochs(iteration, max_start_epoch)
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


def choose_images(rule: MatchingRule, real: Images, ipc: Ipc, seed: int, teachers: Teachers) -> Images:
    """Take real images of each class, class by class, as a rule chooses them."""
    members, counts = [], images_per_class(ipc, real.labels.bincount().tolist())
    for label in range(len(counts)):
        of_class = (real.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=make_generator(seed, "initial images", label))
        members.append(of_class[order.to(of_class.device)])
    chosen = rule.initial_images([real.images[index] for index in members], ipc, teachers)
    chosen = chosen or [torch.arange(count) for count in counts]
    picked = [index[choice.to(index.device)] for index, choice in zip(members, chosen, strict=True)]
    return real.take(torch.cat(picked))


class TrajectoryMatching(Distillation):
    """Learns a synthetic set whose training trajectory follows the teachers'.

    FTD and MTT differ in the teachers alone, so this serves both. Images and step size are learned by one SGD; the
    number of iterations is the trainer's ``max_steps``. ``Distillation`` describes skipped steps and the attributes.

    Under DDP every rank matches other segments and the gradient is averaged: W ranks with s segments per step learn the
    set of one process with W * s.

    Args:
        trajectories: folder of the trajectory store.
        network: the student: a name, an import path, a function that builds it, or a module, with the teachers'
            parameters; None takes the teachers' network.
        network_options: for a named network.
        ipc: synthetic images per class; a list names those of each, in label order.
        init: "real" (random real images of each class), "noise" (standard normal), or a set or its file to continue.
        syn_steps: n, inner SGD steps.
        expert_epochs: m, teacher epochs that they match.
        max_start_epoch: segments start at an epoch in {0 .. max_start_epoch - 1}, or as a ``StartWindow`` narrows it.
        syn_batch: synthetic images per inner step; None takes all of them.
        lr_images: learning rate of the pixels, or of a decoder's parameters.
        lr_step_size: learning rate of the step size; 0 keeps it.
        step_size_init: inner learning rate at the start.
        momentum: of both; None learns by Adam in place of SGD.
        augment: DSA of the inner steps: an ``Augmentation``, its fields as a mapping, or a strategy; "" for none.
        unroll: "adjoint" (memory of one step) or "graph".
        iterations_per_epoch: iterations that make a Lightning epoch.
        seed: of initial images, segments, mini-batches, augmentation and noise.
        real: images (N, C, H, W) and labels (N,) that the teachers saw, to start from; None takes the datamodule's.
        segments_per_step: teacher segments per iteration on each rank, whose losses are averaged.
        compile: compile both inner step functions: True, False, "auto" (on a GPU only) or "cuda_graphs" (for small ipc
            on a GPU, where launching kernels takes the time).
        precision: of the inner steps and of their derivatives, "float32" or "bf16"; see ``functional.unroll``.
        rules: ideas beyond FTD, as objects or as in a config; see ``rules.MatchingRule``.
        decoder: learn parameters that images are decoded from, in place of pixels; see ``decoders.Decoder``.

    Raises:
        InputError: when the model is configured, for teachers that do not fit or segments that were not recorded.
    """

    accepts_module = True

    def __init__(
        self,
        trajectories: str,
        network: Network | None = None,
        network_options: dict[str, Any] | None = None,
        ipc: Ipc = 1,
        init: Init = "real",
        syn_steps: int = 30,
        expert_epochs: int = 2,
        max_start_epoch: int = 20,
        syn_batch: int | None = None,
        lr_images: float = 100.0,
        lr_step_size: float = 1e-5,
        step_size_init: float = 0.01,
        momentum: float | None = 0.5,
        augment: Augmentation | dict[str, Any] | str = Augmentation(),  # noqa: B008  frozen
        unroll: Unroll = "adjoint",
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        segments_per_step: int = 1,
        compile: Compile = "auto",  # noqa: A002
        rules: list[MatchingRule] | list[dict[str, Any]] | None = None,
        precision: Precision = "float32",
        decoder: Decoder | dict[str, Any] | None = None,
    ) -> None:
        augment = Augmentation.of(augment)
        super().__init__(**common(locals()), step_size=float(step_size_init))
        compiles(compile, torch.device("cpu"))  # refuses an unknown setting
        loss_in(precision)  # as well
        self.save_arguments(locals(), trajectories=str(trajectories))
        if self.init != "real" and (chooses := only_one(self.rules, "initial_images")):
            raise InputError(f"init={self.init!r} leaves {type(chooses).__name__} no image to choose: omit the rule")
        self._teachers: dict[str, Any] = {}  # the set's description of them

    @cached_property
    def store(self) -> TrajectoryStore:
        """The teachers, opened at the first use: a module loaded from a checkpoint works without them."""
        return TrajectoryStore(self.hparams["trajectories"])

    def make_networks(self) -> NetworkFactory:
        """Open the store, check that it fits, and return the builder of the teachers' networks."""
        if self._loaded:
            return super().make_networks()
        shape = None if self.data is None else self.data.shape
        fresh = student_networks(self.store, *self._network_arguments, shape)
        self._teachers = self.store.set_metadata()
        if self.data is not None and not self.store.describes_data:
            self._teachers["dataset"] = self.data.dataset
        self.data = self.data or self.store.description()
        self.train_dataloader()  # refuses segments beyond the record before anything else is done
        return fresh

    def build(self) -> None:
        """Make the student, the initial synthetic set and its labels."""
        # In a tuple, no submodule: its weights are neither in checkpoints nor among DDP's parameters.
        self._student = (self.fresh.architecture().requires_grad_(False).train(),)
        super().build()
        self.soft_labels = self.student_labels(
            lambda: self._recorded_teachers(self.real_images()).answers(self.images.detach())
        )

    def configure_model(self) -> None:
        """Build for the trainer's data, which have to be the teachers'."""
        super().configure_model()
        if self._built and self.source is not None:
            check_compatible(self.store, self.source.description().metadata())

    def train_dataloader(self) -> SegmentLoader:
        """Make the loader of teacher segments."""
        loader = SegmentLoader(
            self.store,
            expert_epochs=self.hparams["expert_epochs"],
            max_start_epoch=self.hparams["max_start_epoch"],
            length=self.iterations_per_epoch,
            seed=self.seed,
            rank=self.global_rank,
            segments=self.hparams["segments_per_step"],
            window=start_window(self.rules, self.hparams["max_start_epoch"]),
        )
        loader.load_state_dict({"iteration": self.global_step})  # loaders may be built again in every epoch
        return loader

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Move the student to the device."""
        self._student[0].to(self.device, self.images.dtype)

    def training_step(self, batch: list[SegmentBatch], batch_idx: int) -> Tensor:
        """Average the matching losses of this rank's segments."""
        with torch.autocast(self.device.type, enabled=False):  # the backward run is not under it either
            matches = [self._match(segment) for segment in batch]
            loss = torch.stack([found.loss for found in matches]).mean()
        start_epoch = sum(s["start_epoch"] for s in batch) / len(batch)
        self.log("matching/start_epoch", torch.full((), start_epoch, device=self.device), batch_size=1)
        if having(self.rules, "distance"):
            self.log("matching/steps", sum(found.steps for found in matches) / len(matches), batch_size=1)
        return self.log_loss(loss)

    def _match(self, segment: SegmentBatch) -> Match:
        """Match one segment."""
        iteration, slot = segment["iteration"], segment["slot"]
        if iteration != self.global_step:
            raise RuntimeError(f"segment {iteration} came at step {self.global_step}: the run could not be reproduced")
        student, labels, hparams = self._student[0], self.labels, self.hparams
        if isinstance(self.soft_labels, StudentLabels):
            labels = self.soft_labels.of_segment(student, segment["target"], self.images.detach())
        return match(
            student,
            segment["start"],
            segment["target"],
            self.images,
            labels,
            self.step_size,
            batches=self._batches(segment),
            augment=self.augment or None,
            seed=derive_seed(self.seed, "dsa", iteration, slot),
            unroll=hparams["unroll"],
            rules=self.rules,
            compile=hparams["compile"],
            precision=hparams["precision"],
        )

    def _batches(self, segment: SegmentBatch) -> list[Tensor]:
        """Return the mini-batches of a segment's inner steps."""
        return chunked_permutations(
            len(self.labels),
            self.hparams["syn_steps"],
            self.generator("batches", segment["iteration"], segment["slot"]),
            batch_size=self.hparams["syn_batch"],
        )

    def used_images(self, batch: list[SegmentBatch]) -> Tensor | None:
        """Return the images in the mini-batches of the segments; all, where teachers label all."""
        if self.hparams["syn_batch"] is None or isinstance(self.soft_labels, StudentLabels):
            return None
        return torch.cat([index for segment in batch for index in self._batches(segment)]).unique()

    def _recorded_teachers(self, real: Images) -> RecordedTeachers:
        device = self.trainer.strategy.root_device if self.attached else self.device
        return RecordedTeachers(self.store, self.fresh.architecture().to(device), real.images)

    def first_images(self, real: Images) -> Images:
        """Choose the real images to start from, at random or as a rule does."""
        rule = only_one(self.rules, "initial_images")
        if rule is None:
            return super().first_images(real)
        return choose_images(rule, real, self.decoded_ipc(real), self.seed, self._recorded_teachers(real))

    @property
    def method(self) -> str:
        """Name by the teachers, "ftd" for flat ones and "mtt" for plain ones, and by the rules: "mtt+robust"."""
        return "+".join([self._teachers["method"], *(rule.name for rule in self.rules)])

    def settings(self) -> dict[str, Any]:
        """Omit the teachers' path, which would make identical sets differ; count the segments of all ranks."""
        settings = super().settings()
        settings.pop("trajectories")
        if self.attached:
            settings["segments_per_step"] *= self.trainer.world_size
        return settings

    def describe(self) -> dict[str, Any]:
        """Describe the teachers."""
        return {key: self._teachers[key] for key in ("dataset", "network", "teachers")}

    def inputs(self) -> dict[str, Any]:
        """Add each teacher."""
        return {**super().inputs(), "each": [self.store.teacher_metadata(index) for index in range(len(self.store))]}

    def extra_state(self) -> dict[str, Any]:
        """Add the set's description of its teachers."""
        return {**super().extra_state(), "teachers": self._teachers}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Restore the teachers' description where no store is open; refuse a store with other teachers."""
        super().restore(state, checkpoint)
        self._teachers = self._teachers or state["teachers"]
        refuse_changes(state["teachers"], self._teachers, prefix="trajectories: ")
