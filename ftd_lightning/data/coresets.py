"""Real images in the place of synthetic ones: the start of a distillation, and the baselines to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.data.splits import sample_per_class
from ftd_lightning.errors import InputError
from ftd_lightning.files.trajectory_store import TrajectoryStore, check_compatible
from ftd_lightning.functional.distribution_matching import embed
from ftd_lightning.functional.gradient_matching import batch_norms
from ftd_lightning.functional.seeding import make_generator, to_device
from ftd_lightning.functional.selection import Ipc, herding, images_per_class, k_center
from ftd_lightning.functional.unroll import load_flat
from ftd_lightning.models.registry import NETWORKS, build_network, recorded_network

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from ftd_lightning.contracts import Images


BASELINES = ("random", "herding", "k-center", "real")
IMAGES_PER_PASS = 1000  # bounds the memory of a forward pass


def random_real_images(train: Images, ipc: Ipc, seed: int) -> Images:
    """Draw real images of each class, class by class; see ``images_per_class``."""
    return train.take(sample_per_class(train.labels, ipc, make_generator(seed, "initial images")))


def coreset(train: Images, kind: str, ipc: Ipc, features: Tensor) -> Images:
    """Choose images of each class by features (N, D): "herding" or "k-center"; class by class, in that order."""
    choose = {"herding": herding, "k-center": k_center}[kind]
    counts = images_per_class(ipc, train.labels.bincount().tolist())
    members = [(train.labels == label).nonzero().squeeze(1) for label in range(len(counts))]
    picked = [index[choose(features[index], count)] for index, count in zip(members, counts, strict=True)]
    return train.take(torch.cat(picked))


def teacher_network(
    store: TrajectoryStore, teacher: int, epoch: int | None = None, network: nn.Module | None = None
) -> nn.Module:
    """Build a teacher after an epoch, by default the last, in evaluation mode; or load its weights into ``network``."""
    if network is None:
        recorded, instead = store.metadata["network"], f"choose by teachers of {', '.join(NETWORKS)}"
        name, options = recorded_network(recorded, store.path, instead)
        if store.shape is None:
            raise InputError(f"{store.path}: does not tell the size of the images; record other teachers")
        network = build_network(name, **store.shape._asdict(), **options)
    load_flat(network.eval(), store.weights(teacher, epoch))
    return network


@torch.no_grad()
def estimate_running_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics of BatchNorm layers to averages over images, in place; leave evaluation mode on.

    Each batch counts the same. Batches are drawn at random: statistics within a class are narrower.
    """
    norms = [norm for norm in batch_norms(network.eval()) if norm.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    order = torch.randperm(len(images), generator=make_generator("running statistics")).to(images.device)
    for index in order.tensor_split(-(-len(images) // IMAGES_PER_PASS)):  # equal parts: no remainder of one image
        network(images[index])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def teacher_coreset(
    train: Images, kind: str, ipc: Ipc, *, trajectories: str | None, teacher: int, described: Mapping[str, Any]
) -> tuple[Images, dict[str, Any]]:
    """Choose real images, transformed as the teachers saw them, by a teacher's features; also describe the choice.

    The teacher is taken after its last epoch, on images that are not augmented. ``described`` is metadata of the images
    that the teachers must have been trained on; those were possibly of other classes.
    """
    if trajectories is None:
        raise InputError(f"synthetic={kind!r} chooses by a teacher's features: give their store as data.trajectories")
    store = TrajectoryStore(trajectories)
    dataset, theirs = dict(described["dataset"]), store.metadata.get("dataset")
    dataset.pop("classes", None)
    if isinstance(theirs, dict) and "classes" in theirs:
        dataset["classes"] = theirs["classes"]
    check_compatible(store, {**described, "dataset": dataset})
    network = teacher_network(store, teacher)
    estimate_running_statistics(network, train.images)
    features = torch.cat([embed(network, chunk) for chunk in train.images.split(IMAGES_PER_PASS)])
    return coreset(train, kind, ipc, features), {"teacher": teacher, "network": store.metadata["network"]}


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Classify images (N, C, H, W) as they are, part by part, in evaluation mode: (N, K), on the images' device."""
    network.eval()
    device = next((weight.device for weight in network.parameters()), images.device)
    parts = [network(to_device(part, device)) for part in images.split(IMAGES_PER_PASS)]
    return torch.cat(parts).to(images.device)


def class_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Label images with a network's softmax, (N, K) float32; see :func:`logits_of`."""
    return logits_of(network, images).float().softmax(dim=1)


@torch.no_grad()
def teacher_labels(
    store: TrajectoryStore,
    images: Tensor,
    *,
    epoch: int,
    teacher: int = 0,
    statistics: Tensor | None = None,
    network: nn.Module | None = None,
) -> Tensor:
    """Label images (N, C, H, W) with a teacher's softmax, (N, K); ``statistics`` are images for BatchNorm layers."""
    network = teacher_network(store, teacher, epoch, network).to(images.device)
    estimate_running_statistics(network, (images if statistics is None else statistics).to(images.device))
    return class_probabilities(network, images)


def candidate_epochs(epochs: int, count: int = 8) -> list[int]:
    """List at most ``count`` (>= 2) epochs of a teacher, evenly spread in the logarithm, without the initialisation."""
    if epochs <= count:
        return list(range(1, epochs + 1))
    return sorted({round(epochs ** (index / (count - 1))) for index in range(count)})
