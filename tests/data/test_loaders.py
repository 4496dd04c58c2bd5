"""Loaders of batches and of teachers' segments: their order, and exact resumption."""

import pytest
import torch

from ftd_lightning.data import SegmentLoader
from ftd_lightning.data.loaders import BatchOrder, TensorLoader, fits_on, host_loader
from ftd_lightning.files import TrajectoryStore, write_teacher

IMAGES = torch.arange(11.0).view(11, 1, 1, 1).expand(11, 1, 2, 2).contiguous()
LABELS = torch.arange(11)
# Python 3.12 warns of any fork of a process with threads; a DataLoader's workers are forked.
NO_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")


def indices(order, epoch=None):
    if epoch is not None:
        order.set_epoch(epoch)
    return torch.cat(list(order)).tolist()


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    def drawn(seed, epoch, **options):
        return indices(BatchOrder(50, 8, shuffle=True, seed=seed, **options), epoch)

    state = torch.get_rng_state()
    orders = [drawn(3, 2), drawn(4, 2), drawn(3, 3), drawn(4, 1), drawn(0, 0)]  # nor is it of seed + epoch
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sorted(order) == list(range(50)) != order and orders.count(order) == 1 for order in orders)
    torch.manual_seed(99)  # the global generator has no part in it
    assert drawn(3, 2) == orders[0]
    assert drawn(3, 1, epoch_map=lambda epoch: 2 * epoch) == orders[0]
    straight = BatchOrder(11, 4, shuffle=False)
    assert indices(straight) == indices(straight, 1) == list(range(11))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_images", "world_size"), [(12, 1), (12, 3), (11, 2), (101, 4)])
def test_ranks_get_disjoint_shares_of_equal_size(num_images, world_size, shuffle, refused):
    ranks = [BatchOrder(num_images, 4, shuffle=shuffle, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        shares = [indices(order, epoch) for order in ranks]
        assert {len(share) for share in shares} == {num_images // world_size}
        assert len(set().union(*shares)) == world_size * (num_images // world_size)
    # As many batches on each, of the same sizes: a rank with one more would wait for ever.
    assert len({tuple(len(batch) for batch in order) for order in ranks}) == 1
    assert {len(order) for order in ranks} == {len(list(ranks[0]))}
    with refused("3 images", "4 processes"):  # a rank without images would yield one empty batch
        BatchOrder(3, 2, shuffle=shuffle, world_size=4)


def loaders(*, batch_size=2, labels=LABELS, shuffle=True, seed=5):
    """The same batches by each of the ways."""

    def order():
        return BatchOrder(11, batch_size, shuffle=shuffle, seed=seed)

    return {
        "device": TensorLoader(IMAGES, labels, order()),
        "host": host_loader(IMAGES, labels, order()),
        "workers": host_loader(IMAGES, labels, order(), num_workers=2),
    }


def epoch_of(loader, epoch, *, stop=None):
    """Labels of the batches of an epoch, or of its first ones."""
    loader.sampler.set_epoch(epoch)
    found = []
    for _, labels in loader:
        found.append(labels.tolist())
        if len(found) == stop:
            break
    return found


KINDS = pytest.mark.parametrize("kind", ["device", "host", "workers"])


@NO_FORK_WARNING
@KINDS
@pytest.mark.parametrize("done", [1, 3, 6])
def test_resumed_loader_yields_the_rest_of_the_epoch_and_whole_ones_after_it(kind, done):
    straight = loaders()["device"]
    whole = [epoch_of(straight, epoch) for epoch in range(4)]
    first = loaders()[kind]
    assert epoch_of(first, 0) == whole[0]
    assert epoch_of(first, 1, stop=done) == whole[1][:done]
    state = first.state_dict()
    assert state == {"batch": done}  # whatever workers have read ahead
    assert epoch_of(first, 2) == whole[2]
    resumed = loaders()[kind]
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    # All of an epoch's batches: the next one begins.
    assert epoch_of(resumed, 1) == (whole[1][done:] if done < 6 else whole[1])
    assert resumed.state_dict() == {"batch": 6}
    assert [epoch_of(resumed, epoch) for epoch in (2, 3)] == whole[2:]
    resumed.load_state_dict({"batch": 4})
    assert epoch_of(resumed, 0, stop=1) == whole[0][4:5]
    resumed.load_state_dict(resumed.state_dict())
    assert epoch_of(resumed, 0) == whole[0][5:]


@NO_FORK_WARNING
@KINDS
@pytest.mark.parametrize("batch", [0, 2, 6])
def test_an_epoch_that_has_ended_yields_nothing_once(kind, batch):
    whole = [epoch_of(loaders()["device"], epoch) for epoch in range(3)]
    for asked in (True, False):  # Lightning asks for no batch where it knows the epoch to be complete
        loader, state = loaders()[kind], {"batch": batch, "epoch_ended": True}
        loader.load_state_dict(state)
        assert loader.state_dict() == state  # a checkpoint written before the empty epoch has to say the same
        if asked:
            assert epoch_of(loader, 0) == []
        else:
            iter(loader)
        assert loader.state_dict() == {"batch": 6}
        assert [epoch_of(loader, epoch) for epoch in (1, 2)] == whole[1:]


def test_images_fit_on_a_gpu_where_they_take_at_most_half_of_its_free_memory(monkeypatch):
    assert fits_on(torch.device("cpu"), IMAGES)
    size = IMAGES.numel() * IMAGES.element_size()
    for free, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * size))
        assert fits_on(torch.device("cuda:0"), IMAGES) is fits


# Segments

TEACHERS, EPOCHS = 3, 6
# (teacher, start epoch) of two segments in each of six iterations, with seed 3 and five start epochs.
DRAWN_BEFORE = [(1, 0), (2, 1), (0, 3), (0, 1), (1, 1), (1, 0), (0, 4), (0, 2), (0, 0), (1, 2), (2, 0), (1, 4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for teacher in range(TEACHERS):
        weights = [torch.tensor([float(teacher), float(epoch), 0.5]) for epoch in range(EPOCHS + 1)]
        write_teacher(folder, teacher, weights, {"network": {"name": "tiny"}})
    return TrajectoryStore(folder)


@pytest.fixture
def loader(store):
    def make(**options):
        return SegmentLoader(store, **{"expert_epochs": 2, "max_start_epoch": 5, "length": 7, **options})

    return make


def flat(batches):
    return [segment for batch in batches for segment in batch]


def plain(batches):
    """Batches as tuples of numbers, so that whole sequences can be compared."""
    keys = ("iteration", "slot", "teacher", "start_epoch")
    return [(*(b[key] for key in keys), *b["start"].tolist(), *b["target"].tolist()) for b in flat(batches)]


def test_segments_are_a_function_of_seed_iteration_and_rank(loader):
    wanted = plain(loader(seed=3, rank=1, length=40))
    for iteration, _, teacher, start_epoch, *weights in wanted:
        assert weights == [teacher, start_epoch, 0.5, teacher, start_epoch + 2, 0.5]
        assert wanted[iteration][0] == iteration
    torch.manual_seed(99)
    state = torch.get_rng_state()
    backwards = loader(seed=3, rank=1, length=40)
    assert plain([backwards.read(iteration) for iteration in reversed(range(40))])[::-1] == wanted
    short = loader(seed=3, rank=1, length=8)  # another length of epoch cuts the same sequence elsewhere
    assert [batch for _ in range(5) for batch in plain(short)] == wanted
    assert torch.equal(torch.get_rng_state(), state)
    others = [plain(loader(length=40, **options)) for options in ({}, {"seed": 1}, {"rank": 1}, {"seed": 3})]
    assert len({tuple(segment[2:4] for segment in sequence) for sequence in [*others, wanted]}) == 5
    # Distillations are resumed and compared with: their segments must not change.
    drawn = [(batch["teacher"], batch["start_epoch"]) for batch in flat(loader(seed=3, segments=2, length=6))]
    assert drawn == DRAWN_BEFORE


def test_ranks_deal_out_the_segments_of_one_process(loader):
    one = [plain([batch]) for batch in loader(segments=4, length=9)]
    two = zip(*(loader(segments=2, rank=rank, length=9) for rank in range(2)), strict=True)
    assert [plain(batches) for batches in two] == one
    assert [segment[1] for segment in one[0]] == [0, 1, 2, 3]
    assert [batch[0] for batch in one] == [plain([batch])[0] for batch in loader(length=9)]


@pytest.mark.parametrize("done", [0, 3, 7, 13, 14])
def test_resumed_segments_are_the_rest(loader, done):
    straight = loader(seed=5)
    whole = [batch for _ in range(3) for batch in plain(straight)]
    first, batches = loader(seed=5), []
    while len(batches) < done:
        for batch in first:
            batches.append(batch)
            if len(batches) == done:
                break
    resumed = loader(seed=5)
    resumed.load_state_dict(first.state_dict())
    epoch = plain(resumed)
    assert plain(batches) + epoch == whole[: 7 * (done // 7 + 1)]
    assert len(resumed) == 7
    if done < 14:
        assert plain(resumed) == whole[7 * (done // 7 + 1) :][:7]


def test_an_ended_epoch_is_empty_once_and_iterations_count_from_a_start(loader):
    for iteration in (0, 3, 7):
        segments, state = loader(), {"iteration": iteration, "epoch_ended": True}
        segments.load_state_dict(state)
        assert segments.state_dict() == state
        assert list(segments) == []
        assert segments.state_dict() == {"iteration": iteration}
        left = [batch["iteration"] for batch in flat(segments)]
        assert left == list(range(iteration, 14 if iteration == 7 else 7))
    wanted = plain(loader(length=12))
    segments = loader(length=4, start=3)
    assert segments.state_dict() == {"iteration": 3}
    assert plain(segments) == wanted[3:7]
    resumed = loader(length=4, start=3)
    resumed.load_state_dict({"iteration": 5})
    assert [plain(resumed), plain(resumed)] == [wanted[5:7], wanted[7:11]]


def test_a_window_decides_on_the_start_epochs_of_each_iteration(loader):
    seen, growing = {}, lambda iteration: range(iteration // 20, 1 + iteration // 10)
    for batch in flat(loader(length=50, window=growing)):
        seen.setdefault(batch["iteration"] // 10, set()).add(batch["start_epoch"])
    assert seen == {0: {0}, 1: {0, 1}, 2: {1, 2}, 3: {1, 2, 3}, 4: {2, 3, 4}}
    assert plain(loader(window=lambda iteration: range(5))) == plain(loader())


def test_reaching_beyond_the_record_and_numbers_below_one_are_refused(loader, store, refused):
    assert max(batch["target"][1] for batch in flat(loader(length=50))) == EPOCHS
    for first, epochs, last in ((6, 2, 7), (1, 7, 7), (20, 3, 22)):
        words = f"max_start_epoch={first}", f"expert_epochs={epochs}", f"epoch {last}", f"{EPOCHS} were recorded"
        with refused(store.path, *words):
            loader(max_start_epoch=first, expert_epochs=epochs)
    for name in ("expert_epochs", "max_start_epoch", "length", "segments"):
        with refused(f"{name}=0"):
            loader(**{name: 0})
