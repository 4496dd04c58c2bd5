"""What has to be trained to score a set: its columns, each beside random real images, and what that costs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from ftd_lightning.studies.rank_evaluation import Lesson, RankEvaluation, random_images_like
from ftd_lightning.studies.rank_scores import scores
from ftd_lightning.training.evaluation_protocol import mean_and_std, train_fresh_networks
from ftd_lightning.training.held_out import held_out_seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from ftd_lightning.contracts import Images
    from ftd_lightning.data import SyntheticSet

Labels = Literal["hard", "soft", "teacher"]
PLAIN = "not augmented"  # the column without augmentation
COLUMNS = ("hard", "soft", "teacher", PLAIN)
TEACHER_COST = 4 / 3  # of a step: a forward pass beside one and a backward pass, of two


def hard_labels(labels: Tensor) -> Tensor:
    """Return classes (N,) int64: hard labels themselves, of soft ones (N, K) the class of the largest value.

    Example:
        >>> hard_labels(torch.tensor([[0.4, 0.6], [0.9, 0.1]]))
        tensor([1, 0])
    """
    return labels if labels.ndim == 1 else labels.argmax(1)


@dataclass(frozen=True)
class RankedSet:
    """One set of a ranking.

    Attributes:
        name: as it was given.
        synthetic: the set.
        evaluation: trains on it, and on real images through its transform.
    """

    name: str
    synthetic: SyntheticSet
    evaluation: RankEvaluation

    @property
    def ema(self) -> bool:
        """Whether its averaged images are the ones that are scored."""
        return self.evaluation.settings.ema and self.synthetic.ema_images is not None

    @property
    def own(self) -> Labels:
        """The kind of its labels, by which it is compared with random images."""
        return "hard" if self.synthetic.labels.ndim == 1 else "soft"

    @property
    def counts(self) -> list[int]:
        """Images of each class, by hard labels."""
        classes = self.evaluation.data.num_classes
        return torch.bincount(hard_labels(self.synthetic.labels), minlength=classes).tolist()

    @property
    def learning_rates(self) -> list[float]:
        """Learning rates to choose from, rising: those of the settings, and the set's own step size."""
        listed, own = set(self.evaluation.settings.learning_rates), self.synthetic.learning_rate
        # Files hold float32, in which 0.1 is another number.
        if own is not None and not any(math.isclose(own, lr, rel_tol=1e-6) for lr in listed):
            listed.add(own)
        return sorted(listed)

    def columns(self) -> dict[str, tuple[Labels, bool]]:
        """Return label kind, and whether batches are augmented, of every column that it has."""
        kinds: dict[str, tuple[Labels, bool]] = {"hard": ("hard", True)}
        if self.own == "soft":
            kinds["soft"] = ("soft", True)
        return {**kinds, "teacher": ("teacher", True), PLAIN: (self.own, False)}

    def trainings(self) -> int:
        """Count networks that are trained, on the set and on random images; shared ones count for each set."""
        settings = self.evaluation.settings
        choosing = min(settings.lr_networks, settings.networks)
        return 2 * len(self.columns()) * (len(self.learning_rates) * choosing + settings.networks - choosing)

    def random_images(self, index: int) -> Images:
        """Draw the random real images that the index-th network of the base line learns."""
        seed = self.evaluation.settings.seed
        return random_images_like(self.evaluation.train, self.counts, seed, "rank", "random images", index)

    def _lessons(self, labels: Labels) -> dict[str, Callable[[int], Lesson]]:
        evaluation = self.evaluation
        images = self.synthetic.chosen(ema=self.ema).to(evaluation.device)
        stored = self.synthetic.training_labels().to(evaluation.device)
        own = Lesson(images, stored if labels == "soft" else hard_labels(stored))

        def on_set(index: int) -> Lesson:
            return own if labels != "teacher" else replace(own, teacher=evaluation.teachers[index])

        def on_random(index: int) -> Lesson:
            drawn = self.random_images(index)
            if labels == "soft":
                return evaluation.soft(drawn, index)
            return Lesson(*drawn, teacher=evaluation.teachers[index] if labels == "teacher" else None)

        return {"set": cache(on_set), "random": cache(on_random)}

    def score(self) -> dict[str, Any]:
        """Train what is left, and return everything that is known of the set; see docs/rank.md."""
        columns: dict[str, Any] = dict.fromkeys(COLUMNS)
        for column, (labels, augmented) in self.columns().items():
            sides = {
                side: self.evaluation.scored(lesson, self.learning_rates, augmented=augmented)
                for side, lesson in self._lessons(labels).items()
            }
            pairs = zip(sides["set"]["each"], sides["random"]["each"], strict=True)
            differences = torch.tensor([ours - random for ours, random in pairs], dtype=torch.float64)
            columns[column] = {
                "labels": labels,
                "augmented": augmented and bool(self.evaluation.augment),
                "teacher_at_evaluation": labels == "teacher",
                **sides,
                "difference": mean_and_std(differences),
            }

        def both(column: str) -> tuple[list[float], list[float]]:
            return columns[column]["set"]["each"], columns[column]["random"]["each"]

        real, one = self.evaluation.real, self.synthetic
        stored, trained_on = one.image_counts
        return {
            **scores(real["each"], columns["hard"]["set"]["each"], both(self.own), both(PLAIN)),
            "method": one.metadata.get("method"),
            "labels": one.label_description,
            "compared_by": self.own,
            "images": "averaged" if self.ema else "last",
            "images_stored": stored,
            "images_trained_on": trained_on,
            "images_per_class": self.counts,
            "teacher_at_evaluation": False,  # of the scores; the column "teacher" has one
            "step_size": one.learning_rate,
            "learning_rates": self.learning_rates,
            "columns": columns,
            "real": real,
            "held_out_seen": held_out_seen(one.metadata.get("dataset"), self.evaluation.data.describe()["dataset"]),
            "fingerprint": self._fingerprint(),
            "transform": one.transform.describe(),
        }

    def _fingerprint(self) -> str:
        own = Lesson(self.synthetic.chosen(ema=self.ema), self.synthetic.training_labels())
        return f"{own.identity['images']}-{own.identity['labels']}"


def _seconds_a_step(evaluation: RankEvaluation, images: Images) -> float:
    """Time SGD steps of one network on one batch."""
    batch = images.take(torch.arange(min(len(images.labels), evaluation.protocol(0.01).batch_size)))
    network = evaluation.fresh.build(0).to(evaluation.device)
    seconds = 0.0
    for epochs in (1, 3):  # the first one warms up
        began = time.perf_counter()
        train_fresh_networks([network], *batch, evaluation.protocol(0.01, epochs=epochs), compile=False)
        if evaluation.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / epochs
    return seconds


def cost(ranked: Iterable[RankedSet]) -> tuple[int, int, float]:
    """Count the trainings of a ranking, and estimate their seconds from a few steps of each size.

    Returns:
        Trainings on sets and random images, trainings on all real images, seconds; each if nothing was finished before.
    """
    small, large, seconds = 0, 0, 0.0
    evaluations: dict[int, RankEvaluation] = {}
    for one in ranked:
        evaluation = evaluations.setdefault(id(one.evaluation), one.evaluation)
        trainings, drawn = one.trainings(), one.random_images(0)
        with_teacher = trainings / len(one.columns()) * (TEACHER_COST - 1)
        steps = evaluation.settings.epochs * -(-len(drawn.labels) // evaluation.protocol(0.01).batch_size)
        seconds += (trainings + with_teacher) * steps * _seconds_a_step(evaluation, drawn)
        small += trainings
    for evaluation in evaluations.values():
        settings = evaluation.settings
        trainings = len(settings.learning_rates) * min(settings.lr_networks, settings.networks) + settings.networks
        count = len(evaluation.data.train.labels) + len(evaluation.data.val.labels)
        steps = evaluation.real_epochs * -(-count // evaluation.protocol(0.01).batch_size)
        seconds += trainings * steps * _seconds_a_step(evaluation, evaluation.train)
        large += trainings
    return small, large, seconds
