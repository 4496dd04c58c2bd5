import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler

from ftd_lightning.data.loaders import BatchOrder, TensorLoader, fits_on, host_loader

IMAGES = torch.arange(11.0).view(11, 1, 1, 1).expand(11, 1, 2, 2).contiguous()
LABELS = torch.arange(11)
# Python 3.12 warns of any fork of a process with threads; a DataLoader's workers are forked.
NO_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


def indices(order):
    return torch.cat(list(order)).tolist()


def test_every_image_comes_once_an_epoch_in_another_order_each():
    order = BatchOrder(100, 8, shuffle=True)
    epochs = []
    for epoch in range(4):
        order.set_epoch(epoch)
        epochs.append(indices(order))
        assert sorted(epochs[-1]) == list(range(100))
        assert epochs[-1] != list(range(100))
    assert all(epochs.count(epoch) == 1 for epoch in epochs)


def test_order_is_a_function_of_seed_and_epoch():
    def drawn(seed, epoch):
        order = BatchOrder(50, 8, shuffle=True, seed=seed)
        order.set_epoch(epoch)
        return indices(order)

    wanted = drawn(3, 2)
    torch.manual_seed(99)  # the global generator has no part in it
    state = torch.get_rng_state()
    assert drawn(3, 2) == wanted
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn(4, 2) != wanted
    assert drawn(3, 3) != wanted
    # Not seed + epoch, under which the second epoch of one seed would be the first of the next.
    assert drawn(4, 1) != wanted


def test_a_map_of_epochs_decides_on_the_order():
    plain, mapped = (BatchOrder(50, 8, shuffle=True, epoch_map=m) for m in (None, lambda epoch: 10 * epoch + 3))
    for epoch in range(3):
        plain.set_epoch(10 * epoch + 3)
        if epoch:  # the first epoch needs no telling
            mapped.set_epoch(epoch)
        assert indices(mapped) == indices(plain)


def test_order_is_the_same_when_an_epoch_is_read_again():
    order = BatchOrder(50, 8, shuffle=True)
    assert indices(order) == indices(order)


def test_without_shuffling_the_order_is_as_it_is():
    order = BatchOrder(11, 4, shuffle=False)
    for epoch in range(2):
        order.set_epoch(epoch)
        assert indices(order) == list(range(11))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_images", "world_size"), [(12, 2), (12, 3), (11, 2), (101, 4)])
def test_ranks_get_disjoint_shares_of_equal_size(num_images, world_size, shuffle):
    orders = [
        BatchOrder(num_images, 4, shuffle=shuffle, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for epoch in range(2):
        for order in orders:
            order.set_epoch(epoch)
        shares = [indices(order) for order in orders]
        assert {len(share) for share in shares} == {num_images // world_size}
        assert len(set().union(*shares)) == world_size * (num_images // world_size)
        # As many batches on each, of the same sizes: a rank with one more would wait for ever.
        assert len({tuple(len(batch) for batch in order) for order in orders}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 11, 100])
@pytest.mark.parametrize("num_images", [5, 10, 11])
def test_length_is_the_number_of_batches(num_images, batch_size, world_size):
    order = BatchOrder(num_images, batch_size, shuffle=True, world_size=world_size)
    batches = list(order)
    assert len(order) == len(batches)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 1 <= len(batches[-1]) <= batch_size


@pytest.mark.parametrize("world_size", [4, 100])
def test_fewer_images_than_processes_are_refused(refused, world_size):
    # A rank without images would yield one empty batch, while its length is 0.
    assert len(BatchOrder(3, 2, shuffle=True, world_size=3)) == 1
    with refused("3 images", f"{world_size} processes"):
        BatchOrder(3, 2, shuffle=True, world_size=world_size)


def loaders(*, batch_size=4, labels=LABELS, **options):
    """The same batches by each of the ways."""
    return {
        "device": TensorLoader(IMAGES, labels, BatchOrder(11, batch_size, **options)),
        "host": host_loader(IMAGES, labels, BatchOrder(11, batch_size, **options)),
        "workers": host_loader(IMAGES, labels, BatchOrder(11, batch_size, **options), num_workers=2),
    }


@NO_FORK_WARNING
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_device_and_host_give_the_same_batches_in_the_same_order(shuffle, soft):
    labels = torch.eye(11) if soft else LABELS
    found = loaders(shuffle=shuffle, seed=5, labels=labels)
    for epoch in range(2):
        for loader in found.values():
            loader.sampler.set_epoch(epoch)
        batches = {name: list(loader) for name, loader in found.items()}
        wanted = [index.tolist() for index in found["device"].sampler]
        for name, of_one in batches.items():
            assert len(found[name]) == len(of_one) == 3
            for index, (images, classes) in zip(wanted, of_one, strict=True):
                assert torch.equal(images, IMAGES[index])
                assert torch.equal(classes, labels[index])
                assert images.dtype == torch.float32


def test_host_loader_is_an_ordinary_dataloader():
    loader = host_loader(IMAGES, LABELS, BatchOrder(11, 4, shuffle=False))
    assert isinstance(loader, DataLoader)
    images, labels = next(iter(loader))
    assert images.shape == (4, 1, 2, 2)
    assert labels.dtype == torch.int64


def test_order_is_a_distributed_sampler_that_lightning_leaves_alone():
    order = BatchOrder(11, 4, shuffle=True, rank=1, world_size=2)
    assert isinstance(order, DistributedSampler)
    assert (order.rank, order.num_replicas) == (1, 2)
    assert host_loader(IMAGES, LABELS, order).sampler is order
    assert TensorLoader(IMAGES, LABELS, order).sampler is order


KINDS = ["device", "host", "workers"]


def epoch_of(loader, epoch, *, stop=None):
    """Labels of the batches of an epoch, or of its first ones."""
    loader.sampler.set_epoch(epoch)
    found = []
    for _, labels in loader:
        found.append(labels.tolist())
        if len(found) == stop:
            break
    return found


@NO_FORK_WARNING
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", range(1, 7))
def test_resumed_loader_yields_what_is_left_of_the_epoch_and_whole_ones_after_it(kind, done):
    straight = loaders(batch_size=2, shuffle=True, seed=5)["device"]
    whole = [epoch_of(straight, epoch) for epoch in range(4)]
    first = loaders(batch_size=2, shuffle=True, seed=5)[kind]
    assert epoch_of(first, 0) == whole[0]
    assert epoch_of(first, 1, stop=done) == whole[1][:done]
    state = first.state_dict()
    assert state == {"batch": done}  # whatever workers have read ahead
    resumed = loaders(batch_size=2, shuffle=True, seed=5)[kind]
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    # All of an epoch's batches: the next one begins.
    assert epoch_of(resumed, 1) == (whole[1][done:] if done < 6 else whole[1])
    assert resumed.state_dict() == {"batch": 6}
    assert epoch_of(resumed, 2) == whole[2]
    assert epoch_of(resumed, 3) == whole[3]
    assert len(resumed) == 6


@NO_FORK_WARNING
@pytest.mark.parametrize("kind", KINDS)
def test_breaking_off_or_resuming_twice_leaves_the_next_epoch_whole(kind):
    loader = loaders(batch_size=2, shuffle=True)[kind]
    whole = epoch_of(loaders(batch_size=2, shuffle=True)["device"], 0)
    assert epoch_of(loader, 0, stop=2) == whole[:2]
    assert epoch_of(loader, 0) == whole
    loader.load_state_dict({"batch": 4})
    assert epoch_of(loader, 0, stop=1) == whole[4:5]
    assert loader.state_dict() == {"batch": 5}
    loader.load_state_dict(loader.state_dict())
    assert epoch_of(loader, 0) == whole[5:]
    assert epoch_of(loader, 0) == whole


@NO_FORK_WARNING
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 2, 6])
def test_an_epoch_that_has_ended_yields_nothing_once(kind, batch):
    loader = loaders(batch_size=2, shuffle=True)[kind]
    whole = [epoch_of(loaders(batch_size=2, shuffle=True)["device"], epoch) for epoch in range(3)]
    state = {"batch": batch, "epoch_ended": True}
    loader.load_state_dict(state)
    assert loader.state_dict() == state  # a checkpoint written before the empty epoch has to say the same
    assert epoch_of(loader, 0) == []
    assert loader.state_dict() == {"batch": 6}
    assert [epoch_of(loader, epoch) for epoch in (1, 2)] == whole[1:]


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_epoch_that_has_ended_is_over_even_if_no_batch_is_asked_for(kind):
    # As Lightning does where it knows the epoch to be complete.
    loader = loaders(batch_size=2, shuffle=True)[kind]
    loader.load_state_dict({"batch": 2, "epoch_ended": True})
    iter(loader)
    assert loader.state_dict() == {"batch": 6}
    assert epoch_of(loader, 0) == epoch_of(loaders(batch_size=2, shuffle=True)["device"], 0)


class Watcher(LightningModule):
    """Learns nothing; writes down which images came."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).append(batch[1].tolist())
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["device", "host"])
def test_trainer_tells_the_order_its_epoch(kind, tmp_path):
    # Nobody else does: without it every epoch would come in the order of the first.
    module = Watcher()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loaders(shuffle=True, seed=5)[kind])
    order = BatchOrder(11, 4, shuffle=True, seed=5)
    for epoch in range(3):
        order.set_epoch(epoch)
        assert module.seen[epoch] == [index.tolist() for index in order]


def test_images_always_fit_on_the_cpu():
    assert fits_on(torch.device("cpu"), IMAGES)


def test_images_fit_on_a_gpu_where_they_take_at_most_half_of_what_is_free(monkeypatch):
    size = IMAGES.numel() * IMAGES.element_size()
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert fits_on(torch.device("cuda:0"), IMAGES) is fits
