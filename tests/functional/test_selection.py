"""Coresets: hand-made points whose order is known, and loops."""

import pytest
import torch

from ftd_lightning.functional import herding, k_center, make_generator, selection

# Mean (2, 1). Herding: the target is k * mean - sum of those chosen.
POINTS = torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 0.0], [2.0, 1.0], [2.0, 2.0]])


def draw(count, size, seed=0, dtype=torch.float64):
    return torch.randn(count, size, generator=make_generator(seed, "features"), dtype=dtype)


def test_herding_by_hand():
    # (2,1) is the mean itself. Target (2,1) again, of the others nearest is the first (2,2). Then (6,3)-(4,3) = (2,0),
    # as far from (0,0), (4,0) and the second (2,2): the first of them. Then (8,4)-(4,3) = (4,1): (4,0).
    assert herding(POINTS, 5).tolist() == [3, 1, 0, 2, 4]


def test_k_center_by_hand():
    # From (2,1) the corners at distance sqrt(5) are farthest, first (0,0), then (4,0), then (2,2), whose twin is last.
    assert k_center(POINTS, 5).tolist() == [3, 0, 2, 1, 4]


def herding_reference(features, count):
    rows, chosen = features.tolist(), []
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    for k in range(1, count + 1):
        target = [k * m - sum(rows[i][j] for i in chosen) for j, m in enumerate(mean)]
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(min(left, key=lambda i: squared(rows[i], target)))
    return chosen


def k_center_reference(features, count, chosen):
    rows = features.tolist()
    if not chosen:
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        chosen = [min(range(len(rows)), key=lambda i: squared(rows[i], mean))]
    while len(chosen) < count:
        left = [i for i in range(len(rows)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(squared(rows[i], rows[c]) for c in chosen)))
    return chosen


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("rows", "dtype"), [(7, torch.float64), (1024, torch.float32)], ids=str)
def test_against_loops_whatever_the_blocks(rows, dtype, monkeypatch):
    monkeypatch.setattr(selection, "ROWS_PER_BLOCK", rows)
    features = draw(40, 3, dtype=dtype)
    assert herding(features, 15).tolist() == herding_reference(features, 15)
    assert k_center(features, 15).tolist() == k_center_reference(features, 15, [])
    random = k_center(features, 15, first="random", generator=make_generator(3)).tolist()
    assert random == k_center_reference(features, 15, random[:1])


@pytest.mark.parametrize("select", [herding, k_center])
def test_a_choice_begins_longer_ones_and_the_longest_is_everything(select):
    features = draw(9, 2)
    longest = select(features, 9).tolist()
    assert sorted(longest) == list(range(9))
    for count in range(1, 9):
        assert select(features, count).tolist() == longest[:count]
    assert sorted(select(torch.ones(4, 2), 4).tolist()) == [0, 1, 2, 3], "equal images are not chosen twice"


@pytest.mark.parametrize("select", [herding, k_center])
def test_features_far_from_zero_do_not_lose_their_distances(select):
    """Multiples of 1/8 that float32 holds exactly; their mean and the squares of their norms it does not."""
    features = draw(60, 2).mul(8).round().div(8).unique(dim=0)
    expected = select(features, 30)
    assert select((features + 2**20).float(), 30).equal(expected)


@pytest.mark.parametrize("select", [herding, k_center])
def test_more_images_than_there_are_are_refused(select, refused):
    for count in (0, 4):
        with refused(f"choose {count}", "3 images"):
            select(draw(3, 2), count)
