"""Labels by a teacher are a function of what the networks see."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ftd_lightning.core.evaluation import EvaluationProtocol, train_fresh_networks
from ftd_lightning.core.losses import LabelledByTeacher
from ftd_lightning.data.coresets import class_probabilities
from ftd_lightning.functional import seeded
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models import ConvNet

CPU = torch.device("cpu")
AUGMENT = Augmentation("crop_scale", "multiple")
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def network(seed: int, norm: str = "instance") -> ConvNet:
    with seeded(seed):
        return ConvNet(1, 10, 8, width=4, depth=1, norm=norm)


class Watched(nn.Module):
    """A teacher that keeps what it was shown."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.seen = teacher, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.clone())
        return self.teacher(images)


@pytest.mark.parametrize("augment", [AUGMENT, Augmentation("")])
def test_the_teacher_labels_the_batch_that_each_network_sees(augment: Augmentation) -> None:
    teacher, students = Watched(network(9)), [network(0), network(1)]
    losses = LabelledByTeacher(teacher, CPU)(students, IMAGES, LABELS, seeds=[3, 4], augment=augment)
    expected = []
    for student, seed, seen in zip(students, (3, 4), teacher.seen, strict=True):
        batch = augment(IMAGES, make_generator(seed))
        assert seen.equal(batch)
        expected.append(cross_entropy(student(batch), teacher.teacher(batch).softmax(1)))
    torch.testing.assert_close(losses, torch.stack(expected))
    assert teacher.seen[0].equal(teacher.seen[1]) == (not augment)


def test_gradients_are_those_of_the_students_alone() -> None:
    teacher, student = network(9), network(0)
    losses = LabelledByTeacher(teacher, CPU)
    losses([student], IMAGES, LABELS, seeds=[3], augment=AUGMENT).sum().backward()
    ours = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    batch = AUGMENT(IMAGES, make_generator(3))
    cross_entropy(student(batch), teacher(batch).softmax(1).detach()).backward()
    for ours_one, p in zip(ours, student.parameters(), strict=True):
        torch.testing.assert_close(ours_one, p.grad)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_labels_that_come_with_the_images_are_not_used_and_the_teacher_stays() -> None:
    teacher = network(9, norm="batch")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trained = []
    for labels in (LABELS, LABELS.flip(0)):
        student = network(0)
        train_fresh_networks(
            [student],
            IMAGES,
            labels,
            EvaluationProtocol(3, 0.1, augment=AUGMENT),
            losses=LabelledByTeacher(teacher, CPU),
        )
        trained.append(student)
    for a, b, fresh in zip(*(one.parameters() for one in (*trained, network(0))), strict=True):
        assert a.equal(b)
        assert not a.equal(fresh)
    assert all(value.equal(before[name]) for name, value in teacher.state_dict().items())


def test_labels_of_images_as_they_are() -> None:
    teacher = network(9)
    images = IMAGES.repeat(200, 1, 1, 1)  # more than one forward pass takes
    labels = class_probabilities(teacher, images)
    torch.testing.assert_close(labels, teacher(images).detach().softmax(1))
    assert not labels.requires_grad
