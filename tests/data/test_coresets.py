from pathlib import Path

import pytest
import torch
from fits import small_data

from ftd_lightning import TrajectoryStore
from ftd_lightning.data.coresets import coreset, teacher_network
from ftd_lightning.data.images import Images
from ftd_lightning.functional import flatten_parameters


@pytest.fixture
def chosen(trajectories: Path):
    def choose(kind: str, **options):
        data = small_data(synthetic=kind, **{"ipc": 2, "trajectories": str(trajectories), **options})
        data.setup()
        return data

    return choose


def teacher_features(trajectories: Path, pictures: torch.Tensor, teacher: int) -> torch.Tensor:
    """What goes into the linear layer of ConvNet(width 4, depth 1), layer by layer."""
    network = teacher_network(TrajectoryStore(trajectories), teacher)
    with torch.no_grad():
        return torch.nn.Sequential(*list(network)[:-1])(pictures)


@pytest.mark.parametrize("teacher", [0, 1])
def test_herding_takes_the_images_nearest_to_the_teacher_s_class_means(chosen, trajectories: Path, teacher) -> None:
    data = chosen("herding", teacher=teacher)
    assert data.synthetic_set.labels.tolist() == [label for label in range(10) for _ in range(2)]
    for label in range(10):
        members = data.train.pictures[data.train.labels == label]
        features = teacher_features(trajectories, members, teacher).double()
        first = (features - features.mean(0)).norm(dim=1).argmin()
        second = (features[first] + features - 2 * features.mean(0)).norm(dim=1)
        second[first] = torch.inf
        picked = data.synthetic_set.images[2 * label : 2 * label + 2]
        assert torch.equal(picked, members[[int(first), int(second.argmin())]])
    assert data.synthetic_set.metadata["chosen_by"]["teacher"] == teacher


def test_k_center_takes_the_image_farthest_from_the_first(chosen, trajectories: Path) -> None:
    data = chosen("k-center")
    members = data.train.pictures[data.train.labels == 3]
    features = teacher_features(trajectories, members, 0).double()
    first = (features - features.mean(0)).norm(dim=1).argmin()
    second = (features - features[first]).norm(dim=1).argmax()
    assert torch.equal(data.synthetic_set.images[6:8], members[[int(first), int(second)]])


def test_a_teacher_is_the_network_after_its_last_epoch(trajectories: Path) -> None:
    store = TrajectoryStore(trajectories)
    network = teacher_network(store, 1)
    assert torch.equal(flatten_parameters(network), store.trajectory(1)[-1])
    assert not network.training


def test_choices_are_made_within_each_class() -> None:
    features = torch.tensor([[0.0], [10.0], [1.0], [11.0], [5.0], [12.0]])
    images = Images(torch.arange(6.0).view(6, 1, 1, 1), torch.tensor([0, 1, 0, 1, 0, 1]))
    picked = coreset(images, "k-center", 2, features)
    assert picked.pictures.flatten().tolist() == [2, 4, 3, 1]
    assert picked.labels.tolist() == [0, 0, 1, 1]


def test_what_cannot_be_chosen_is_refused(chosen, refused) -> None:
    with refused("chooses by a teacher's features", "data.trajectories"):
        chosen("herding", trajectories=None)
    with refused("its teachers have dataset"):
        chosen("k-center", val_fraction=0.3)
    with refused("teacher 7 is asked for"):
        chosen("herding", teacher=7)
    with refused("cannot choose 99 of a class's"):
        chosen("herding", ipc=99)
