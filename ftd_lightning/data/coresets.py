"""Real images in the place of synthetic ones: what distillation starts from, and the baselines that it must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.data.images import Images, sample_per_class
from ftd_lightning.data.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.errors import InputError
from ftd_lightning.functional.distribution_matching import embed
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.functional.selection import herding, k_center
from ftd_lightning.functional.unroll import load_flat
from ftd_lightning.models import build_network

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

BASELINES = ("random", "herding", "k-center", "real")
CHUNK = 1000  # images embedded at a time


def random_real_images(train: Images, ipc: int, seed: int) -> Images:
    """Draw ipc real images of each class, class by class: what distillation starts from, and the baseline it must beat.

    Raises:
        InputError: if a class has fewer than ipc images.
    """
    return train.take(sample_per_class(train.labels, ipc, make_generator(seed, "initial images")))


def coreset(train: Images, kind: str, ipc: int, features: Tensor) -> Images:
    """Choose ipc real images of each class by their features, class by class, in the order chosen.

    Args:
        train: the real images.
        kind: "herding" or "k-center" (greedy, from the image nearest to the class's mean).
        ipc: images per class.
        features: (N, D) of all images.

    Raises:
        InputError: if a class has fewer than ipc images.

    Example:
        >>> images = Images(torch.zeros(4, 1, 1, 1), torch.tensor([0, 1, 0, 0]))
        >>> coreset(images, "herding", 1, torch.tensor([[0.0], [5.0], [4.0], [3.0]])).labels
        tensor([0, 1])
    """
    choose = {"herding": herding, "k-center": k_center}[kind]
    members = [(train.labels == label).nonzero().squeeze(1) for label in train.labels.unique()]
    return train.take(torch.cat([index[choose(features[index], ipc)] for index in members]))


def teacher_network(store: TrajectoryStore, teacher: int) -> nn.Module:
    """Build a recorded teacher as it was after its last epoch, in evaluation mode.

    Raises:
        InputError: where the store knows no name for its network.
    """
    network = store.metadata["network"]
    if "options" not in network:
        raise InputError(f"{store.path}: its network {network['name']} has no short name, so it cannot be built here")
    shape = {key: network[key] for key in ("in_channels", "num_classes", "image_size")}
    built = build_network(network["name"], **shape, **network["options"]).eval()
    load_flat(built, store.trajectory(teacher)[-1])
    return built


@torch.no_grad()
def teacher_coreset(
    train: Images, kind: str, ipc: int, *, trajectories: str | None, teacher: int, described: Mapping[str, Any]
) -> tuple[Images, dict[str, Any]]:
    """Choose real images by the features of a teacher, and say which.

    Which network's features the published coreset numbers stand on is not known. Here it is the last epoch of a
    teacher, on images that are not augmented. Both rules are deterministic: a spread over several choices is one over
    teachers.

    Args:
        train: the real images, transformed as the teachers saw them.
        kind: "herding" or "k-center".
        ipc: images per class.
        trajectories: folder of the trajectory store.
        teacher: number of the teacher, from 0.
        described: what the teachers have to have been trained on.

    Raises:
        InputError: without teachers, or for those of other images.
    """
    if trajectories is None:
        raise InputError(f"synthetic={kind!r} chooses by a teacher's features: give their store as data.trajectories")
    store = TrajectoryStore(trajectories)
    check_compatible(store, described)
    network = teacher_network(store, teacher)
    features = torch.cat([embed(network, chunk) for chunk in train.pictures.split(CHUNK)])
    return coreset(train, kind, ipc, features), {"teacher": teacher, "network": store.metadata["network"]}
