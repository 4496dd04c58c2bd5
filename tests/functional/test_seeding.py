"""Seeds as a function of what they are for."""

import itertools

import torch

from ftd_lightning.functional import derive_seed, make_generator, seeded


def test_seeds_stay_the_same_from_version_to_version():
    """A resumed run and a shared seed rely on these very numbers: blake2b(b"(0,)", digest_size=8), halved."""
    assert derive_seed(0) == 2631537505891389924
    assert derive_seed(0, "dsa", 7) == 695794691359637038


def test_different_paths_give_different_seeds():
    paths = [*itertools.product(range(10), ["teacher", "dsa"], range(10)), (1,), ("1",), (11,), (1, 1), ("1, 1",), ()]
    seeds = {derive_seed(*path) for path in paths}
    assert len(seeds) == len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_are_on_the_cpu_and_follow_their_keys():
    first, second, other = (torch.rand(5, generator=make_generator(0, key)) for key in ("a", "a", "b"))
    assert first.equal(second)
    assert not first.equal(other)
    assert make_generator(0).device == torch.device("cpu")


def test_seeded_decides_the_block_and_leaves_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    with seeded(0, "net"):
        inside = torch.rand(3)
    assert torch.rand(4).equal(expected)
    with seeded(0, "net"):
        assert torch.rand(3).equal(inside)
    with seeded(1, "net"):
        assert not torch.rand(3).equal(inside)
