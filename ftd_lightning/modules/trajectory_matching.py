"""The distillation phase: synthetic images and step size learned by matching teacher segments (Eq. 4-5)."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ftd_lightning.bounds import check_bounds
from ftd_lightning.core.arguments import matching_rules, not_plain, plain
from ftd_lightning.core.labels import InnerLabels, StoreTeachers
from ftd_lightning.core.networks import Network, student_networks
from ftd_lightning.core.resume import refuse_changes
from ftd_lightning.data.loaders import SegmentBatch, SegmentLoader
from ftd_lightning.errors import InputError
from ftd_lightning.files.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.functional.matching import Match, chunked_permutations, match
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.functional.unroll import Unroll
from ftd_lightning.modules.distillation import Init, choose_images, start_window
from ftd_lightning.modules.inner_loop import StudentDistillation
from ftd_lightning.rules.base import MatchingRule, having, label_rule, only_one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ftd_lightning.contracts import Images


class TrajectoryMatching(StudentDistillation):
    """Learns a synthetic set whose training trajectory follows the teachers'.

    FTD and MTT differ in the teachers alone, so this serves both. One SGD with two parameter groups, one global step
    per iteration; the number of iterations is the trainer's ``max_steps``. What it does with steps that are not finite,
    and with a step size below 0, and its attributes, are described in ``Distillation`` and ``StudentDistillation``.

    Under DDP every rank matches segments of its own and the gradient is averaged: W ranks with s segments per step
    learn what one process with W * s learns.

    Args:
        trajectories: folder of the trajectory store.
        network: the student: a name, an import path, a function that builds it, or a module; None takes the teachers'
            network. One with other parameters than theirs is refused.
        network_options: for a named network.
        ipc: synthetic images per class.
        init: "real" starts from random real images of each class, "noise" from a standard normal.
        syn_steps: n, inner SGD steps.
        expert_epochs: m, teacher epochs that they match.
        max_start_epoch: segments start at an epoch in {0 .. max_start_epoch - 1}, or as a ``StartWindow`` narrows it.
        syn_batch: synthetic images per inner step; None takes all of them.
        lr_images: learning rate of the pixels.
        lr_step_size: learning rate of the step size; 0 keeps it, without a gradient.
        step_size_init: inner learning rate at the start.
        momentum: of both.
        augment: DSA of the inner steps: an ``Augmentation``, its fields as a mapping, or a strategy; "" for none.
        unroll: "adjoint" (memory of one step) or "graph".
        iterations_per_epoch: iterations that make a Lightning epoch: the rhythm of evaluation, pictures and files.
        seed: decides initial images, segments, mini-batches, augmentation and noise.
        real: images (N, C, H, W) and labels (N,) that the teachers saw, to start from; None takes the datamodule's.
        segments_per_step: teacher segments per iteration on each rank, whose losses are averaged.
        compile: compile both inner step functions: True, False, "auto" (where a fit is long enough to repay it; a
            resumed one follows what the first one chose) or "cuda_graphs" (for small ipc on a GPU, where launching
            kernels takes the time; "auto" takes them there). Where compilation is not available, steps run eagerly,
            with one line that says so.
        rules: ideas beyond FTD, in a list as callbacks are, as objects or as in a config: labels, a window of start
            epochs, a gate, masks and others; see ``functional.MatchingRule``.

    Raises:
        InputError: for numbers out of range; when the model is configured, for teachers that do not fit or segments
            that were not recorded.
    """

    def __init__(
        self,
        trajectories: str,
        network: Network | None = None,
        network_options: dict[str, Any] | None = None,
        ipc: int = 1,
        init: Init = "real",
        syn_steps: int = 30,
        expert_epochs: int = 2,
        max_start_epoch: int = 20,
        syn_batch: int | None = None,
        lr_images: float = 100.0,
        lr_step_size: float = 1e-5,
        step_size_init: float = 0.01,
        momentum: float = 0.5,
        augment: Augmentation | dict[str, Any] | str = Augmentation(),  # noqa: B008  frozen
        unroll: Unroll = "adjoint",
        iterations_per_epoch: int = 100,
        seed: int = 0,
        real: tuple[Tensor, Tensor] | None = None,
        segments_per_step: int = 1,
        compile: Compile = "auto",  # noqa: A002
        rules: list[MatchingRule] | list[dict[str, Any]] | None = None,
    ) -> None:
        check_bounds(TrajectoryMatching, locals())
        super().__init__()
        compiles(compile, torch.device("cpu"))  # refuses an unknown setting
        self.augment = Augmentation.of(augment)
        self.rules = matching_rules(rules or [])
        if init == "noise" and (chooses := only_one(self.rules, "initial_images")):
            raise InputError(f"init='noise' leaves {type(chooses).__name__} no image to choose: give init='real'")
        trajectories, network_options = str(trajectories), plain(network_options)
        augment, rules = plain(self.augment), plain(self.rules)
        self.save_hyperparameters(ignore=not_plain(network))
        self._architecture = network
        self.keep_real(real)
        self._teachers: dict[str, Any] = {}

    @cached_property
    def store(self) -> TrajectoryStore:
        """The teachers, opened at the first use: a module loaded from a checkpoint works without them."""
        return TrajectoryStore(self.hparams["trajectories"])

    def build(self) -> None:
        """Open the store, check that it fits, and make the initial synthetic set."""
        options, shape = self.hparams["network_options"], None if self.data is None else self.data.shape
        if not self._loaded_shapes:
            self.fresh = student_networks(self.store, self._architecture, options, shape)
            self._teachers = self.store.set_metadata()
            self.data = self.data or self.store.description()
            self.iteration_loader()  # refuses segments beyond the record before anything else is done
        else:
            self.fresh = self.own_networks(self._architecture, options)
        self.make_student()
        self.make_images()
        self.inner_labels = self._make_labels()
        learned = self.hparams["lr_step_size"] > 0
        self.step_size = nn.Parameter(torch.tensor(float(self.hparams["step_size_init"])), requires_grad=learned)

    def configure_model(self) -> None:
        """Build for the trainer's data, which have to be the teachers'."""
        super().configure_model()
        if self._built and self.source is not None:
            check_compatible(self.store, self.source.description().metadata())

    def iteration_loader(self) -> SegmentLoader:
        """Make the loader of teacher segments."""
        loader = SegmentLoader(
            self.store,
            expert_epochs=self.hparams["expert_epochs"],
            max_start_epoch=self.hparams["max_start_epoch"],
            length=self.hparams["iterations_per_epoch"],
            seed=self.hparams["seed"],
            rank=self.global_rank,
            segments=self.hparams["segments_per_step"],
            window=start_window(self.rules, self.hparams["max_start_epoch"]),
        )
        loader.load_state_dict({"iteration": self.step})  # loaders may be built again in every epoch
        return loader

    def configure_optimizers(self) -> torch.optim.SGD:
        """Give images, step size and learned labels a parameter group each."""
        groups = [
            {"params": [self.images], "lr": self.hparams["lr_images"]},
            {"params": [self.step_size], "lr": self.hparams["lr_step_size"]},
        ]
        groups += [] if self.inner_labels is None else self.inner_labels.group()
        return torch.optim.SGD(groups, momentum=self.hparams["momentum"])

    def on_fit_start(self) -> None:
        """Decide on compiling too."""
        super().on_fit_start()
        self._compile = self.choose_inner_compile(self.hparams["segments_per_step"])

    def training_step(self, batch: list[SegmentBatch], batch_idx: int) -> Tensor:
        """Average the matching losses of this rank's segments."""
        # In full precision whatever the trainer's: the backward run is not under its autocast, and would differentiate
        # another function.
        with torch.autocast(self.device.type, enabled=False):
            matches = [self._match(segment) for segment in batch]
            loss = torch.stack([found.loss for found in matches]).mean()
        start_epoch = sum(s["start_epoch"] for s in batch) / len(batch)
        self.log("matching/start_epoch", torch.full((), start_epoch, device=self.device), batch_size=1)
        if having(self.rules, "distance"):
            self.log("matching/steps", sum(found.steps for found in matches) / len(matches), batch_size=1)
        return self.logged(loss)

    def _match(self, segment: SegmentBatch) -> Match:
        """Match one segment."""
        iteration, slot = segment["iteration"], segment["slot"]
        if iteration != self.step:
            raise RuntimeError(f"segment {iteration} came at step {self.step}: the run could not be reproduced")
        seed, size = self.hparams["seed"], self.hparams["syn_batch"]
        order, student = make_generator(seed, "batches", iteration, slot), self.student
        labels = self.labels
        if self.inner_labels is not None:
            labels = self.inner_labels.of_segment(student, segment["target"], self.images.detach())
        return match(
            student,
            segment["start"],
            segment["target"],
            self.images,
            labels,
            self.step_size,
            batches=chunked_permutations(len(self.images), self.hparams["syn_steps"], order, batch_size=size),
            augment=self.augment or None,
            seed=derive_seed(seed, "dsa", iteration, slot),
            unroll=self.hparams["unroll"],
            rules=self.rules,
            compile=self._compile,
        )

    def _make_labels(self) -> InnerLabels | None:
        """Make what a label rule learns or keeps; without one, labels are the images' classes."""
        rule = label_rule(self.rules)
        if rule is None:
            return None
        if self._loaded_shapes:
            return InnerLabels.empty(rule, self._loaded_shapes, "inner_labels.")
        classes = self.data.shape.num_classes if self.data else int(self.labels.max()) + 1
        answers = partial(self._store_teachers(self.real_images()).answers, self.images.detach())
        return InnerLabels.start(rule, self.labels, classes, answers)

    def _store_teachers(self, real: Images) -> StoreTeachers:
        device = self.trainer.strategy.root_device if self.attached else self.device
        return StoreTeachers(self.store, self.fresh.architecture().to(device), real.images)

    def first_images(self, real: Images, ipc: int, seed: int) -> Images:
        """Choose the real images to start from, at random or as a rule does."""
        rule = only_one(self.rules, "initial_images")
        if rule is None:
            return super().first_images(real, ipc, seed)
        return choose_images(rule, real, ipc, seed, self._store_teachers(real))

    @property
    def method(self) -> str:
        """Name by the teachers, "ftd" for flat ones and "mtt" for plain ones, and by the rules: "mtt+robust"."""
        return "+".join([self._teachers["method"], *(rule.name for rule in self.rules)])

    def settings(self) -> dict[str, Any]:
        """Leave out where the teachers lay: no property of the set, it would make equal sets unequal files."""
        settings = {**super().settings(), "rules": plain(self.rules)}
        settings.pop("trajectories")
        if self.attached:
            settings["segments_per_step"] *= self.trainer.world_size  # that of one process which learns the same
        return settings

    def set_metadata(self) -> dict[str, Any]:
        """Describe the teachers."""
        return {key: self._teachers[key] for key in ("dataset", "network", "teachers")}

    def extra_state(self) -> dict[str, Any]:
        """Keep what the set tells of its teachers."""
        return {**super().extra_state(), "teachers": self._teachers}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take it over where the store was not opened; refuse a store with other teachers."""
        super().restore(state, checkpoint)
        self._teachers = self._teachers or state["teachers"]
        refuse_changes(state["teachers"], self._teachers, prefix="trajectories: ")
