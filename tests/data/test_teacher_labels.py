"""Labels of a recorded teacher: its probabilities after the epoch that is asked for."""

from pathlib import Path

import pytest
import torch
from fits import record, small_data

from ftd_lightning.data.coresets import candidate_epochs, estimate_running_statistics, teacher_labels
from ftd_lightning.files import TrajectoryStore, write_teacher
from ftd_lightning.functional.seeding import seeded
from ftd_lightning.functional.unroll import flatten_parameters, load_flat
from ftd_lightning.models import build_network

SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": 8}
OPTIONS = {"width": 4, "depth": 1}


def images(count: int = 12) -> torch.Tensor:
    return small_data().train.images[:count]


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_labels_are_the_probabilities_of_that_teacher_after_that_epoch(epoch: int, trajectories: Path) -> None:
    store = TrajectoryStore(trajectories)
    network = build_network("convnet", **SHAPE, **OPTIONS)
    load_flat(network, store.trajectory(1)[epoch])
    with torch.no_grad():
        wanted = torch.softmax(network.eval()(images()), dim=1)
    labels = teacher_labels(store, images(), teacher=1, epoch=epoch)
    assert (labels.dtype, labels.shape, labels.requires_grad) == (torch.float32, (12, 10), False)
    assert torch.allclose(labels, wanted, atol=1e-6)
    assert not torch.allclose(labels, teacher_labels(store, images(), teacher=0, epoch=epoch), atol=1e-3)


def test_batch_norm_has_the_statistics_of_the_images_that_are_given(tmp_path: Path) -> None:
    options = {**OPTIONS, "norm": "batch"}
    with seeded(0):
        network = build_network("convnet", **SHAPE, **options)
    weights = flatten_parameters(network).detach().clone()
    described = {"network": {"name": "convnet", "options": options, **SHAPE}}
    write_teacher(tmp_path, 0, [weights, weights * 1.5], described)
    train = small_data().train.images
    estimate_running_statistics(network, train)
    with torch.no_grad():
        wanted = network(images()).softmax(1)
    store = TrajectoryStore(tmp_path)
    assert torch.allclose(teacher_labels(store, images(), epoch=0, statistics=train), wanted, atol=1e-6)
    assert not torch.allclose(teacher_labels(store, images(), epoch=0), wanted, atol=1e-3)


def test_what_was_not_recorded_is_refused(trajectories: Path, refused) -> None:
    store = TrajectoryStore(trajectories)
    for epoch in (-1, 5):
        with refused(f"epoch {epoch} is asked for, 0 to 4 are recorded"):
            teacher_labels(store, images(), epoch=epoch)
    with refused("teacher 2 is asked for"):
        teacher_labels(store, images(), teacher=2, epoch=1)


def test_a_longer_teacher_is_labelled_by_its_own_epochs(tmp_path: Path) -> None:
    store = TrajectoryStore(record(tmp_path, epochs=2, teachers=1))
    assert torch.equal(store.weights(0, 2), store.trained(0))
    assert torch.equal(store.weights(0, 1), store.trajectory(0)[1])


@pytest.mark.parametrize("epochs", [1, 2, 8, 9, 30, 50, 100, 1000])
def test_candidates_are_few_and_reach_from_the_first_to_the_last_epoch(epochs: int) -> None:
    found = candidate_epochs(epochs)
    assert (found[0], found[-1]) == (1, epochs)
    assert found == sorted(set(found))
    assert min(epochs, 7) <= len(found) <= 8
