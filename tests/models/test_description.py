"""Descriptions of networks: which of them hold the same weights."""

import json

import pytest
import torch
from torch import nn

from ftd_lightning.models import build_network, describe_network, parameter_shapes, same_network
from ftd_lightning.models.description import only_first
from ftd_lightning.models.registry import NETWORKS

SHAPE = {"in_channels": 3, "num_classes": 10, "image_size": 32}


def named(name="convnet", **options):
    return {"name": name, "options": options, **SHAPE}


def test_network_describes_itself_by_its_parameters_in_their_order():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    described = describe_network(network)
    assert described == {
        "name": "torch.nn.modules.container.Sequential",
        "parameters": [["0.weight", [3, 2]], ["0.bias", [3]], ["1.weight", [3]], ["1.bias", [3]]],
    }
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_of_a_named_network_are_those_it_is_built_with(name):
    options = {"width": 8} if name == "convnet" else {}
    built = build_network(name, **SHAPE, **options)
    assert parameter_shapes(named(name, **options)) == [(n, tuple(p.shape)) for n, p in built.named_parameters()]


@pytest.mark.parametrize(
    "description", [{"name": "convnet"}, {}, named("no_such_network"), named(colour="red"), named("torch.nn.Linear")]
)
def test_what_describes_no_network_is_refused(refused, description):
    with refused():
        parameter_shapes(description)


def test_network_is_the_same_under_its_name_as_an_object_and_as_0_1_recorded_it():
    as_object = describe_network(build_network("convnet", **SHAPE, width=8))
    by_0_1 = {"name": "mine.Net", "shapes": dict(sorted(as_object["parameters"], reverse=True))}
    renamed = {**as_object, "name": "mine.Net"}
    same = [named(width=8), named(width=8, depth=3), as_object, by_0_1, renamed]
    assert all(same_network(a, b) for a in same for b in same)
    for other in (named(width=9), named(width=8, norm="none"), named(width=8, depth=2), "convnet", None, {}):
        assert not any(same_network(a, other) or same_network(other, a) for a in same)


def test_order_of_parameters_matters_where_it_is_known():
    weight, bias = ["weight", [2, 2]], ["bias", [2]]
    a, b = ({"name": "Net", "parameters": parameters} for parameters in ([weight, bias], [bias, weight]))
    assert not same_network(a, b)
    without_order = {"name": "Net", "shapes": dict([bias, weight])}
    assert same_network(a, without_order)
    assert same_network(without_order, b)
    assert not same_network(a, {"name": "Net", "shapes": {"weight": [2, 2]}})
    assert same_network(named("mine.Net", widths=(8, 16)), named("mine.Net", widths=[8, 16]))
    assert same_network("tiny", "tiny")
    assert not same_network("tiny", "other")


def test_networks_of_ones_own_are_compared_by_what_files_record_of_them():
    parameters = [["weight", [2, 2]], ["bias", [2]]]
    ours = {**named("mine.Net", width=8), "parameters": parameters}
    assert same_network(ours, {"name": "other.Net", "parameters": parameters})
    assert not same_network(ours, {**ours, "parameters": parameters[::-1]})
    by_0_2 = named("mine.Net", width=8)
    assert same_network(by_0_2, ours)
    assert same_network(ours, by_0_2)
    assert not same_network(ours, named("mine.Net", width=9))


def test_a_description_does_not_decide_the_parameters_of_a_network_of_this_library():
    described = {**named(width=8), "parameters": [["weight", [2, 2]]]}
    assert parameter_shapes(described) == parameter_shapes(named(width=8))


def test_a_module_that_wraps_or_compiles_a_network_has_its_parameters():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    plain, compiled = describe_network(network), torch.compile(network, backend="eager")
    assert describe_network(compiled) == plain
    for wrapper in (network, compiled):
        assert same_network(plain, describe_network(nn.ModuleDict({"net": wrapper})))


def test_parameters_that_only_one_network_has_are_named():
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    plain = describe_network(network)
    whole = describe_network(nn.ModuleDict({"net": network, "head": nn.Linear(4, 5, bias=False)}))
    assert (only_first(whole, plain), only_first(plain, whole)) == (["head.weight (5, 4)"], [])
    other = describe_network(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 6)))
    assert only_first(plain, other) == ["1.weight (4, 3)", "1.bias (4,)"]
    assert only_first(named("mine.Net", width=8), plain) == []  # version 0.2 did not record them
