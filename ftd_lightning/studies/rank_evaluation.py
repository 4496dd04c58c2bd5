"""Networks trained on a set, on random real images and on all real images, all in the same way, and what they score.

Every training is written down when it is done, under a name made of everything that decides it: the same command
continues after a kill, and sets that share a base line train it once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.contracts import Images
from ftd_lightning.data.files import fingerprint, write_tensors
from ftd_lightning.data.json_files import read_json, write_json
from ftd_lightning.data.teacher_labels import class_probabilities
from ftd_lightning.data.tensor_file import TensorFile
from ftd_lightning.errors import InputError
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed, make_generator
from ftd_lightning.studies.fit_names import minor_version
from ftd_lightning.training.evaluation_protocol import (
    REAL_STEPS,
    EvaluationProtocol,
    accuracies,
    mean_and_std,
    train_fresh_networks,
)
from ftd_lightning.training.labelled_by_teacher import LabelledByTeacher
from ftd_lightning.training.parts_on_device import PartsOnDevice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from ftd_lightning.data import DistillationDataModule
    from ftd_lightning.studies.rank_settings import RankSettings
    from ftd_lightning.training.fresh_networks import FreshNetworks

KIND = "ranking_network"
REAL_EPOCHS = 60


@dataclass
class Lesson:
    """What one network learns.

    Attributes:
        images: (N, C, H, W).
        labels: (N,) classes or (N, K) probabilities.
        teacher: gives the labels of every augmented batch instead; None where the labels above are learned.
    """

    images: Tensor
    labels: Tensor
    teacher: nn.Module | None = None

    @cached_property
    def identity(self) -> dict[str, str | None]:
        """Fingerprints of all that it consists of."""
        teacher = None if self.teacher is None else fingerprint(*self.teacher.state_dict().values())
        return {"images": fingerprint(self.images), "labels": fingerprint(self.labels), "teacher": teacher}


def real_epochs_for(images: int, batch_size: int) -> int:
    """Return epochs over all real images: 60, or as many as make 360 steps.

    Example:
        >>> [real_epochs_for(images, 256) for images in (50_000, 1437, 140)]
        [60, 60, 360]
    """
    return max(REAL_EPOCHS, -(-REAL_STEPS // -(-images // batch_size)))


def random_images_like(train: Images, counts: Sequence[int], *seed: int | str) -> Images:
    """Draw real images at random, class by class.

    Args:
        train: the real images to draw from.
        counts: images of each class, in label order.
        seed: decides which.

    Raises:
        InputError: if a class has fewer images.

    Example:
        >>> real = Images(torch.zeros(5, 1, 1, 1), torch.tensor([1, 0, 1, 0, 1]))
        >>> random_images_like(real, [1, 2], 0).labels
        tensor([0, 1, 1])
    """
    generator, chosen = make_generator(*seed), []
    for label, count in enumerate(counts):
        members = (train.labels == label).nonzero().squeeze(1)
        if count > len(members):
            raise InputError(
                f"a set has {count} images of class {label}, of which there are {len(members)} real ones that are not "
                "held out: no random images can be compared with it"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return train.take(torch.cat(chosen))


class RankEvaluation:
    """Trains and measures networks on the real images as one transform gives them.

    Args:
        data: the real images, set up.
        fresh: the network.
        settings: of the ranking.
        augment: of every batch, where there is augmentation.
        folder: of finished trainings.
        device: where networks are trained.

    Attributes:
        done: is called once for every training, finished earlier or now.
    """

    def __init__(
        self,
        data: DistillationDataModule,
        fresh: FreshNetworks,
        settings: RankSettings,
        augment: Augmentation,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.data, self.fresh, self.settings, self.augment = data, fresh, settings, augment
        self.folder, self.device = folder, device
        self.done: Callable[[], None] = lambda: None
        self._seen: set[str] = set()
        self._parts = PartsOnDevice(data, device)

    @cached_property
    def train(self) -> Images:
        """The real training images that are not held out, on the device."""
        return Images(*(part.to(self.device) for part in self.data.train))

    @cached_property
    def whole(self) -> Images:
        """All real training images, held-out ones included, on the device."""
        pairs = zip(self.data.train, self.data.val, strict=True)
        return Images(*(torch.cat(pair).to(self.device) for pair in pairs))

    @cached_property
    def _whole_lesson(self) -> Lesson:
        return Lesson(*self.whole)

    def protocol(self, lr: float, *, augmented: bool = True, epochs: int | None = None) -> EvaluationProtocol:
        """Return how networks are trained: SGD, as for the published numbers."""
        augment = self.augment if augmented else Augmentation("")
        return EvaluationProtocol(epochs or self.settings.epochs, lr, augment=augment)

    @property
    def real_epochs(self) -> int:
        """Epochs of networks that are trained on all real images."""
        count = len(self.data.train.labels) + len(self.data.val.labels)
        return self.settings.real_epochs or real_epochs_for(count, EvaluationProtocol().batch_size)

    def _name(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> tuple[str, dict[str, Any]]:
        what = {
            **lesson.identity,
            "version": minor_version(),
            "data": self.data.describe(),
            "network": self.fresh.describe(),
            "protocol": asdict(protocol),
            "seed": self.settings.seed,
            "index": index,
        }
        text = json.dumps(what, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest(), json.loads(text)

    def trained(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> nn.Module:
        """Train a network; those of one index have equal initial weights, batches and augmentation everywhere."""
        network = self.fresh.build(self.settings.seed, "fresh", index).to(self.device)
        losses = None if lesson.teacher is None else LabelledByTeacher(lesson.teacher, self.device)
        draws = derive_seed(self.settings.seed, "rank", index)
        options: dict[str, Any] = {"compile": False, "indices": [index], "losses": losses}
        train_fresh_networks([network], lesson.images, lesson.labels, protocol, seed=draws, **options)
        return network

    def measured(
        self, lesson: Lesson, protocol: EvaluationProtocol, index: int, *, keep: bool = False
    ) -> dict[str, float]:
        """Return accuracies of a trained network, fractions, "held_out" and "test"; trained once, then read.

        Args:
            lesson: what it learns.
            protocol: how.
            index: which network.
            keep: keep its weights too; see :meth:`network`.
        """
        name, what = self._name(lesson, protocol, index)
        file = self.folder / f"{name}.json"
        found: Any = read_json(file).get("accuracy")
        whole = isinstance(found, dict) and found.keys() == {"held_out", "test"}
        if not whole or (keep and not self._weights(name).is_file()):
            network = self.trained(lesson, protocol, index)
            parts = {"held_out": self._parts("val"), "test": self._parts("test")}
            found = {part: accuracies([network], *images)[0] for part, images in parts.items()}
            if keep:
                write_tensors(self._weights(name), network.state_dict(), kind=KIND, metadata=what)
            write_json(file, {"accuracy": found, "of": what})
        if name not in self._seen:
            self._seen.add(name)
            self.done()
        return dict(found)

    def _weights(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def network(self, lesson: Lesson, protocol: EvaluationProtocol, index: int) -> nn.Module:
        """Read a network that :meth:`measured` kept, in evaluation mode."""
        file = TensorFile(self._weights(self._name(lesson, protocol, index)[0]), kind=KIND)
        network = self.fresh.architecture()
        network.load_state_dict({name: file[name] for name in file.names})
        return network.to(self.device).eval()

    def choose(
        self, lesson: Callable[[int], Lesson], lrs: Sequence[float], protocol: Callable[[float], EvaluationProtocol]
    ) -> dict[str, Any]:
        """Choose a learning rate by the mean accuracy of a few networks on held-out training images.

        Returns:
            "lr", the first of the best, and "held_out", that accuracy by learning rate.
        """
        count = min(self.settings.lr_networks, self.settings.networks)
        held_out = {
            lr: sum(self.measured(lesson(index), protocol(lr), index)["held_out"] for index in range(count)) / count
            for lr in lrs
        }
        return {"lr": max(held_out, key=held_out.__getitem__), "held_out": {str(lr): a for lr, a in held_out.items()}}

    def scored(
        self, lesson: Callable[[int], Lesson], lrs: Sequence[float], *, augmented: bool = True
    ) -> dict[str, Any]:
        """Choose a learning rate on held-out images, then measure all networks on the test images.

        Args:
            lesson: what network i learns.
            lrs: learning rates to choose from.
            augmented: whether batches are.

        Returns:
            "lr", "held_out", "accuracy" (mean, std, n) and "each", fractions, after the last epoch.
        """

        def protocol(lr: float) -> EvaluationProtocol:
            return self.protocol(lr, augmented=augmented)

        chosen = self.choose(lesson, lrs, protocol)
        indices = range(self.settings.networks)
        each = [self.measured(lesson(index), protocol(chosen["lr"]), index)["test"] for index in indices]
        return {**chosen, "accuracy": mean_and_std(torch.tensor(each, dtype=torch.float64)), "each": each}

    @cached_property
    def real(self) -> dict[str, Any]:
        """Accuracies of networks that are trained on all real images, as of :meth:`scored`, and "epochs".

        The learning rate is chosen by networks that have not seen the held-out images; the networks that are measured,
        and are the teachers, have.
        """
        epochs, lrs = self.real_epochs, sorted(self.settings.learning_rates)

        def protocol(lr: float) -> EvaluationProtocol:
            return self.protocol(lr, epochs=epochs)

        part, whole = Lesson(*self.train), self._whole_lesson
        chosen = self.choose(lambda index: part, lrs, protocol)
        indices = range(self.settings.networks)
        each = [self.measured(whole, protocol(chosen["lr"]), index, keep=True)["test"] for index in indices]
        summary = mean_and_std(torch.tensor(each, dtype=torch.float64))
        return {**chosen, "epochs": epochs, "images": len(whole.labels), "accuracy": summary, "each": each}

    @cached_property
    def teachers(self) -> list[nn.Module]:
        """The networks that were trained on all real images; network i of anything is taught by the i-th."""
        protocol = self.protocol(self.real["lr"], epochs=self.real_epochs)
        return [self.network(self._whole_lesson, protocol, index) for index in range(self.settings.networks)]

    def soft(self, images: Images, index: int) -> Lesson:
        """Return images with the labels that the index-th teacher gives them as they are."""
        return Lesson(images.images, class_probabilities(self.teachers[index], images.images))
