import pytest
import torch

from ftd_lightning.contracts import Images
from ftd_lightning.data import get_dataset
from ftd_lightning.data.coresets import (
    candidate_epochs,
    estimate_running_statistics,
    teacher_coreset,
    teacher_labels,
    teacher_network,
)
from ftd_lightning.files import TrajectoryStore, write_teacher
from ftd_lightning.functional import flatten_parameters
from ftd_lightning.functional.seeding import make_generator, seeded
from ftd_lightning.functional.unroll import load_flat
from ftd_lightning.models import build_network

SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": 8}
DATASET = {"dataset": {"name": "digits", "seed": 0}, "transform": {"kind": "standardization"}}


def digits(per_class=14):
    """Standardised digits, sorted by class, as the images of a folder per class are."""
    images, labels = get_dataset("digits").load()["train"]
    index = torch.cat([(labels == label).nonzero().squeeze(1)[:per_class] for label in range(10)])
    return Images((images[index] - images.mean()) / images.std(), labels[index])


def train(network, images, epochs):
    """Train in batches of 64; return the weights before and after every epoch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    snapshots, network = [flatten_parameters(network).detach().clone()], network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images.labels), generator=make_generator("test", epoch))
        for index in order.split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images.images[index]), images.labels[index]).backward()
            optimizer.step()
        snapshots.append(flatten_parameters(network).detach().clone())
    return snapshots


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for teacher in range(2):
        options = {"width": 4, "depth": 1}
        with seeded(teacher):
            network = build_network("convnet", **SHAPE, **options)
        described = {"network": {"name": "convnet", "options": options, **SHAPE}, **DATASET}
        write_teacher(folder, teacher, train(network, digits(), 2), described)
    return folder


def choose(folder, kind, *, images=None, **options):
    options = {"ipc": 2, "trajectories": str(folder), "teacher": 0, "described": DATASET, **options}
    return teacher_coreset(images or digits(), kind, **options)


def teacher_features(trajectories, images, teacher):
    """What goes into the linear layer of ConvNet(width 4, depth 1), layer by layer."""
    network = teacher_network(TrajectoryStore(trajectories), teacher)
    with torch.no_grad():
        return torch.nn.Sequential(*list(network)[:-1])(images)


def test_herding_takes_the_images_nearest_to_the_teacher_s_class_means(trajectories):
    teacher = 1
    chosen, how = choose(trajectories, "herding", teacher=teacher)
    assert chosen.labels.tolist() == [label for label in range(10) for _ in range(2)]
    for label in range(10):
        members = digits().images[digits().labels == label]
        features = teacher_features(trajectories, members, teacher).double()
        first = (features - features.mean(0)).norm(dim=1).argmin()
        second = (features[first] + features - 2 * features.mean(0)).norm(dim=1)
        second[first] = torch.inf
        picked = chosen.images[2 * label : 2 * label + 2]
        assert torch.equal(picked, members[[int(first), int(second.argmin())]])
    assert how["teacher"] == teacher
    assert how["network"]["name"] == "convnet"


def test_k_center_takes_the_image_farthest_from_the_first(trajectories):
    chosen, _ = choose(trajectories, "k-center")
    members = digits().images[digits().labels == 3]
    features = teacher_features(trajectories, members, 0).double()
    first = (features - features.mean(0)).norm(dim=1).argmin()
    second = (features - features[first]).norm(dim=1).argmax()
    assert torch.equal(chosen.images[6:8], members[[int(first), int(second)]])


def test_what_cannot_be_chosen_is_refused(trajectories, refused):
    with refused("chooses by a teacher's features", "data.trajectories"):
        choose(trajectories, "herding", trajectories=None)
    with refused("its teachers have dataset"):
        choose(trajectories, "k-center", described={"dataset": {"name": "digits", "seed": 1}})
    with refused("teacher 7 is asked for"):
        choose(trajectories, "herding", teacher=7)
    with refused("ipc=15: class 0 has 14 images to train on; this works: [14,14,"):
        choose(trajectories, "herding", ipc=15)


@pytest.mark.parametrize("kind", ["herding", "k-center"])
def test_a_list_chooses_a_number_of_its_own_for_each_class(trajectories, kind):
    counts = [3, 1, 2, *[1] * 7]
    chosen, most = (choose(trajectories, kind, ipc=ipc)[0] for ipc in (counts, 3))
    assert chosen.labels.bincount().tolist() == counts
    kept = [3 * label + i for label, count in enumerate(counts) for i in range(count)]
    assert torch.equal(chosen.images, most.images[kept])


def accuracy(network, images):
    with torch.no_grad():
        return float((network.eval()(images.images).argmax(1) == images.labels).float().mean())


@pytest.fixture(scope="module")
def batch_norm_trajectories(tmp_path_factory):
    """A store of one teacher with BatchNorm, and the accuracy that it had with its own running statistics."""
    folder, options = tmp_path_factory.mktemp("teachers"), {"width": 16, "norm": "batch"}
    with seeded(0):
        network = build_network("convnet", **SHAPE, **options)
    described = {"network": {"name": "convnet", "options": options, **SHAPE}, **DATASET}
    write_teacher(folder, 0, train(network, digits(60), 5), described)
    return folder, accuracy(network, digits(60))


def test_teachers_with_batch_norm_see_as_they_did_in_training(batch_norm_trajectories):
    # Trajectories hold no running statistics; with those of a fresh network a teacher sees something else.
    trajectories, recorded = batch_norm_trajectories
    network, images = teacher_network(TrajectoryStore(trajectories), 0), digits(60)
    assert accuracy(network, images) < recorded - 0.1
    estimate_running_statistics(network, images.images)
    assert accuracy(network, images) > recorded - 0.02
    assert not any(module.training for module in network.modules())
    assert {module.momentum for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.1}
    # One batch of all images: the statistics are exactly those of the images.
    first = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    with torch.no_grad():
        inputs = network[0](images.images)
    torch.testing.assert_close(first.running_mean, inputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, inputs.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_statistics_of_several_batches_are_their_plain_average(monkeypatch):
    monkeypatch.setattr("ftd_lightning.data.coresets.IMAGES_PER_PASS", 5)
    network, images = torch.nn.Sequential(torch.nn.BatchNorm2d(1)), torch.arange(12.0).view(12, 1, 1, 1)
    for _ in range(2):  # what was there before has no part in it
        estimate_running_statistics(network, images)
        assert float(network[0].running_mean) == pytest.approx(5.5)
        assert int(network[0].num_batches_tracked) == 3


# Labels of a teacher


def test_labels_are_the_probabilities_of_that_teacher_after_that_epoch(trajectories, refused):
    store, images, labels = TrajectoryStore(trajectories), digits().images[:12], []
    network = build_network("convnet", **SHAPE, width=4, depth=1)
    for teacher, epoch in ((0, 1), (1, 0), (1, 1), (1, 2)):
        load_flat(network, store.trajectory(teacher)[epoch])
        with torch.no_grad():
            wanted = torch.softmax(network.eval()(images), dim=1)
        labels.append(teacher_labels(store, images, teacher=teacher, epoch=epoch))
        assert (labels[-1].dtype, labels[-1].shape, labels[-1].requires_grad) == (torch.float32, (12, 10), False)
        assert torch.allclose(labels[-1], wanted, atol=1e-6)
    assert not torch.allclose(labels[0], labels[2], atol=1e-3)
    for epoch in (-1, 3):
        with refused(f"epoch {epoch} is asked for, 0 to 2 are recorded"):
            teacher_labels(store, images, epoch=epoch)
    with refused("teacher 2 is asked for"):
        teacher_labels(store, images, teacher=2, epoch=1)


def test_labels_of_a_teacher_with_batch_norm_depend_on_the_given_statistics(batch_norm_trajectories):
    store, images = TrajectoryStore(batch_norm_trajectories[0]), digits().images
    network = teacher_network(store, 0, 1)
    estimate_running_statistics(network, images)
    with torch.no_grad():
        wanted = network(images[:12]).softmax(1)
    assert torch.allclose(teacher_labels(store, images[:12], epoch=1, statistics=images), wanted, atol=1e-6)
    assert not torch.allclose(teacher_labels(store, images[:12], epoch=1), wanted, atol=1e-3)


def test_candidates_are_few_and_reach_from_the_first_to_the_last_epoch():
    for epochs in (1, 2, 8, 9, 30, 100, 1000):
        found = candidate_epochs(epochs)
        assert (found[0], found[-1]) == (1, epochs)
        assert found == sorted(set(found))
        assert min(epochs, 7) <= len(found) <= 8
