import threading
from collections import Counter

import pytest
import torch

from ftd_lightning.data import SegmentLoader
from ftd_lightning.files import TrajectoryStore, write_teacher

TEACHERS, EPOCHS = 3, 6
# (teacher, start epoch) of two segments in each of six iterations, with seed 3 and five start epochs.
DRAWN_BY_0_1 = [(1, 0), (2, 1), (0, 3), (0, 1), (1, 1), (1, 0), (0, 4), (0, 2), (0, 0), (1, 2), (2, 0), (1, 4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    for teacher in range(TEACHERS):
        weights = [torch.tensor([float(teacher), float(epoch), 0.5]) for epoch in range(EPOCHS + 1)]
        write_teacher(folder, teacher, weights, {"network": {"name": "tiny"}})
    return TrajectoryStore(folder)


@pytest.fixture
def loader(store):
    def make(*, expert_epochs=2, max_start_epoch=5, length=7, **options):
        options = {"expert_epochs": expert_epochs, "max_start_epoch": max_start_epoch, "length": length, **options}
        return SegmentLoader(store, **options)

    return make


def plain(batches):
    """Batches as tuples of numbers, so that whole sequences can be compared."""
    keys = ("iteration", "slot", "teacher", "start_epoch")
    return [(*(b[key] for key in keys), *b["start"].tolist(), *b["target"].tolist()) for b in flat(batches)]


def flat(batches):
    return [segment for batch in batches for segment in batch]


def test_batch_holds_the_segment_that_it_names(loader):
    for batch in flat(loader(expert_epochs=2, length=50)):
        assert batch["start"].tolist() == [batch["teacher"], batch["start_epoch"], 0.5]
        assert batch["target"].tolist() == [batch["teacher"], batch["start_epoch"] + 2, 0.5]
        assert batch.keys() == {"iteration", "slot", "teacher", "start_epoch", "start", "target"}


def test_iterations_count_on_from_epoch_to_epoch(loader):
    segments = loader(length=7)
    assert [batch["iteration"] for batch in flat(segments)] == list(range(7))
    assert [batch["iteration"] for batch in flat(segments)] == list(range(7, 14))


def test_segments_are_a_function_of_seed_iteration_and_rank(loader):
    wanted = plain(loader(seed=3, rank=1, length=40))
    torch.manual_seed(99)  # the global generator has no part in it
    assert plain(loader(seed=3, rank=1, length=40)) == wanted
    torch.rand(5)
    backwards = loader(seed=3, rank=1, length=40)
    assert plain([backwards.read(iteration) for iteration in reversed(range(40))])[::-1] == wanted
    # Another length of epoch cuts the same sequence elsewhere.
    short = loader(seed=3, rank=1, length=8)
    assert [batch for _ in range(5) for batch in plain(short)] == wanted


def test_other_seeds_ranks_and_iterations_draw_other_segments(loader):
    def drawn(**options):
        return [(b["teacher"], b["start_epoch"]) for b in flat(loader(length=40, **options))]

    sequences = [drawn(), drawn(seed=1), drawn(rank=1), drawn(seed=1, rank=1)]
    for sequence in sequences:
        assert len(set(sequence)) > 5
        assert sequences.count(sequence) == 1


def test_ranks_deal_the_segments_of_one_process_out_among_them(loader):
    one = [plain([batch]) for batch in loader(segments=4, length=9)]
    two = zip(*(loader(segments=2, rank=rank, length=9) for rank in range(2)), strict=True)
    assert [plain(batches) for batches in two] == one
    assert [segment[1] for segment in one[0]] == [0, 1, 2, 3]
    assert [batch[0] for batch in one] == [plain([batch])[0] for batch in loader(length=9)]


def test_the_next_batch_is_read_while_this_one_is_used(loader):
    segments, seen = loader(length=3), []
    read, started = segments.read, threading.Event()
    segments.read = lambda iteration: (seen.append(threading.current_thread().name), started.set(), read(iteration))[2]
    batches = iter(segments)
    next(batches)
    started.clear()
    assert started.wait(timeout=30) or len(seen) == 2
    assert threading.current_thread().name not in seen


def test_drawing_leaves_the_global_generator_alone(loader):
    state = torch.get_rng_state()
    list(loader())
    assert torch.equal(torch.get_rng_state(), state)


def test_start_epochs_and_teachers_are_uniform(loader):
    count = 3000
    batches = flat(loader(max_start_epoch=5, expert_epochs=2, length=count))
    for key, values in (("start_epoch", 5), ("teacher", TEACHERS)):
        seen = Counter(batch[key] for batch in batches)
        assert set(seen) == set(range(values))
        share = 1 / values
        sigma = (count * share * (1 - share)) ** 0.5
        assert all(abs(n - count * share) < 4.5 * sigma for n in seen.values())
    # Both drawn on their own: every pair occurs.
    assert len({(batch["teacher"], batch["start_epoch"]) for batch in batches}) == 5 * TEACHERS


def test_single_start_epoch_is_always_the_initialisation(loader):
    assert {batch["start_epoch"] for batch in flat(loader(max_start_epoch=1, length=20))} == {0}


@pytest.mark.parametrize("done", range(15))
def test_resume_gives_exactly_what_was_left(loader, done):
    # In mid-epoch, at the boundary of an epoch (0, 7, 14), and one off it.
    straight = loader(length=7, seed=5)
    whole = [batch for _ in range(3) for batch in plain(straight)]
    first, batches = loader(length=7, seed=5), []
    while len(batches) < done:
        for batch in first:
            batches.append(batch)
            if len(batches) == done:
                break
    state = first.state_dict()
    resumed = loader(length=7, seed=5)
    resumed.load_state_dict(state)
    epoch = plain(resumed)
    assert plain(batches) + epoch == whole[: 7 * (done // 7 + 1)]
    if done < 14:
        assert plain(resumed) == whole[7 * (done // 7 + 1) :][:7]


@pytest.mark.parametrize("iteration", [0, 3, 7])
def test_an_epoch_that_has_ended_is_empty_once_and_the_iteration_stays(loader, iteration):
    segments = loader(length=7)
    state = {"iteration": iteration, "epoch_ended": True}
    segments.load_state_dict(state)
    assert segments.state_dict() == state
    assert list(segments) == []
    assert segments.state_dict() == {"iteration": iteration}
    left = [batch["iteration"] for batch in flat(segments)]
    assert left == list(range(iteration, 14 if iteration == 7 else 7))


def test_iterations_count_from_a_start(loader):
    wanted = plain(loader(length=12))
    segments = loader(length=4, start=3)
    assert segments.state_dict() == {"iteration": 3}
    assert plain(segments) == wanted[3:7]  # a whole epoch: they are counted from the start
    assert plain(segments) == wanted[7:11]
    resumed = loader(length=4, start=3)
    resumed.load_state_dict({"iteration": 5})
    assert plain(resumed) == wanted[5:7]
    assert plain(resumed) == wanted[7:11]


class Growing:
    """Allows one start epoch at first, and another one after every tenth iteration."""

    def __call__(self, iteration):
        return range(iteration // 20, 1 + iteration // 10)


def test_a_window_decides_on_the_start_epochs_of_each_iteration(loader):
    seen = {}
    for batch in flat(loader(max_start_epoch=5, length=50, window=Growing())):
        seen.setdefault(batch["iteration"] // 10, set()).add(batch["start_epoch"])
    assert seen == {0: {0}, 1: {0, 1}, 2: {1, 2}, 3: {1, 2, 3}, 4: {2, 3, 4}}


def test_draws_are_those_of_version_0_1(loader):
    # Distillations of 0.1 are resumed and compared with: their segments must not change.
    drawn = [(batch["teacher"], batch["start_epoch"]) for batch in flat(loader(seed=3, segments=2, length=6))]
    assert drawn == DRAWN_BY_0_1
    assert plain(loader(window=lambda iteration: range(5))) == plain(loader())


def test_state_holds_nothing_but_numbers(loader):
    segments = loader(length=7)
    list(segments)
    state = segments.state_dict()
    assert state
    assert all(type(value) is int for value in state.values())


def test_length_is_that_of_an_epoch_even_after_a_resume_in_its_middle(loader):
    # Lightning asks for the length to know where the epoch ends, and counts the batches done by itself.
    segments = loader(length=7)
    assert len(segments) == len(list(segments)) == 7
    segments.load_state_dict({"iteration": 3})
    assert len(segments) == 7


def test_reaching_the_last_epoch_is_allowed(loader):
    segments = loader(max_start_epoch=5, expert_epochs=2, length=100)
    assert max(batch["target"][1] for batch in flat(segments)) == EPOCHS
    assert {batch["target"][1].item() for batch in flat(loader(max_start_epoch=1, expert_epochs=EPOCHS))} == {EPOCHS}


@pytest.mark.parametrize(("max_start_epoch", "expert_epochs", "last"), [(6, 2, 7), (1, 7, 7), (20, 3, 22)])
def test_reaching_beyond_the_record_is_refused(loader, store, refused, max_start_epoch, expert_epochs, last):
    with refused(
        store.path,
        f"max_start_epoch={max_start_epoch}",
        f"expert_epochs={expert_epochs}",
        f"epoch {last}",
        f"{EPOCHS} were recorded",
    ):
        loader(max_start_epoch=max_start_epoch, expert_epochs=expert_epochs)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["expert_epochs", "max_start_epoch", "length", "segments"])
def test_arguments_below_one_are_refused(loader, refused, name, value):
    with refused(f"{name}={value}"):
        loader(**{name: value})
