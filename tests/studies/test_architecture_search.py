import pytest
import torch
from fits import small_data
from scipy.stats import spearmanr

from ftd_lightning.contracts import Images
from ftd_lightning.core.evaluation import EvaluationProtocol
from ftd_lightning.functional import Augmentation
from ftd_lightning.models import ConvNet
from ftd_lightning.studies.nas import (
    Architecture,
    measure_architecture,
    rank_correlations,
    sample_architectures,
    search_space,
    training_flops,
)


def test_the_space_is_that_of_table_5() -> None:
    space = search_space()
    assert len(set(space)) == 720 == 4 * 4 * 3 * 5 * 3
    assert {one.depth for one in space} == {1, 2, 3, 4}
    assert {one.width for one in space} == {32, 64, 128, 256}
    assert {one.activation for one in space} == {"sigmoid", "relu", "leakyrelu"}
    assert {one.norm for one in space} == {"none", "batch", "layer", "instance", "group"}
    assert {one.pooling for one in space} == {"none", "max", "avg"}


def test_every_architecture_can_be_built_at_32_px() -> None:
    for one in search_space(widths=[32]):
        ConvNet(3, 10, 32, **one._asdict())


def test_a_draw_is_a_part_of_a_larger_draw() -> None:
    space = search_space()
    few, many = (sample_architectures(space, count, seed=3) for count in (36, 100))
    assert len(set(few)) == 36
    assert set(few) < set(many)
    assert few != sample_architectures(space, 36, seed=4)
    assert [space.index(one) for one in few] == sorted(space.index(one) for one in few)


@pytest.mark.parametrize("count", [0, 1, 721])
def test_a_draw_that_cannot_be_ranked_is_refused(refused, count: int) -> None:
    with refused("ask for 2 to 720"):
        sample_architectures(search_space(), count, seed=0)


def test_correlations_are_spearman_s_over_the_best_by_real_data() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(30, generator=generator, dtype=torch.float64)
    proxy = 0.7 * real + 0.3 * torch.rand(30, generator=generator, dtype=torch.float64)
    proxy[3] = proxy[4]  # a tie
    found = rank_correlations(proxy.tolist(), real.tolist())
    best = real.argsort(descending=True)
    for name, count in {"top 5": 5, "top 10": 10, "top 20": 20, "all": 30}.items():
        index = best[:count]
        assert found[name] == pytest.approx(spearmanr(proxy[index], real[index]).statistic, abs=1e-4)


def test_tops_beyond_the_number_of_architectures_are_left_out_and_ties_have_no_rank() -> None:
    assert set(rank_correlations([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])) == {"all"}
    assert rank_correlations([0.1, 0.1, 0.1], [0.1, 0.2, 0.3])["all"] is None


def test_operations_are_three_times_those_of_a_forward_pass() -> None:
    """A 3x3 convolution at 8 px takes 2 * 9 * in * out * 64, the linear layer 2 * in * out."""
    network = ConvNet(1, 10, 8, width=4, depth=1, norm="none")
    assert training_flops(network, torch.zeros(1, 1, 8, 8)) == 3 * (2 * 9 * 1 * 4 * 64 + 2 * 4 * 16 * 10)


def test_a_measurement_is_a_function_of_its_seed_and_architecture() -> None:
    data = small_data(synthetic="random", ipc=2)
    data.setup()
    images = Images(data.synthetic_set.images, data.synthetic_set.labels)
    protocol = EvaluationProtocol(epochs=20, lr=0.05, augment=Augmentation("crop"))
    settings = {"networks": 2, "device": torch.device("cpu"), "side": "proxy"}

    def measure(one: Architecture, seed: int) -> dict:
        found = measure_architecture(one, data, images, protocol, seed=seed, **settings)
        return {key: value for key, value in found.items() if key != "seconds"}

    one = Architecture(1, 8, "relu", "instance", "avg")
    first = measure(one, 0)
    assert first == measure(one, 0)
    assert first != measure(one, 1)
    other = measure_architecture(one, data, images, protocol, seed=0, **{**settings, "side": "real"})
    assert other["mean"] != first["mean"]
    assert first["n"] == 2
    assert first["mean"] > 0.2, "it has learned something"
