import json
from pathlib import Path

import pytest

from ftd_lightning.files import TrajectoryStore, check_compatible
from ftd_lightning.files.trajectory_store import OPTIONAL_KEYS, OWN_KEYS, differences
from ftd_lightning.models import build_network, describe_network

STORES_OF_0_1 = Path(__file__).resolve().parents[3] / "shared" / "data" / "teachers-cifar10-w32"
SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": 8}
RECORDED = {
    "network": {"name": "convnet", "options": {"width": 4, "depth": 1}, **SHAPE},
    "dataset": {"name": "digits", "seed": 0, "val_fraction": 0.1, "fingerprint": "ab"},
    "transform": {"kind": "zca", "eps": 0.1, "fitted_on": "cd"},
    "augmentation": {"strategy": "flip", "mode": "single"},
    "method": "FlatTeacher",
    "rho": 0.01,
}


def changed(key, **values):
    return {**RECORDED, key: {**RECORDED[key], **values}}


def without(key, inner=None):
    if inner is None:
        return {name: value for name, value in RECORDED.items() if name != key}
    return {**RECORDED, key: {name: value for name, value in RECORDED[key].items() if name != inner}}


def both_ways(a, b, **options):
    assert differences(a, b, **options) == differences(b, a, **options)
    return differences(a, b, **options)


def test_equal_records_do_not_differ():
    assert both_ways(RECORDED, RECORDED, whole=True) == []
    assert both_ways(RECORDED, json.loads(json.dumps(RECORDED)), whole=True) == []


@pytest.mark.parametrize(
    ("other", "keys"),
    [
        (changed("network", options={"width": 5, "depth": 1}), ["network"]),
        (changed("dataset", seed=1), ["dataset"]),
        (changed("dataset", fingerprint="ef"), ["dataset"]),
        (changed("transform", fitted_on="ef"), ["transform"]),
        (changed("augmentation", mode="multiple"), ["augmentation"]),
        (changed("augmentation", align_corners=False), ["augmentation"]),
        ({**RECORDED, "rho": 0.02}, ["rho"]),
        ({**RECORDED, "method": "MyTeacher"}, ["method"]),
        ({**RECORDED, "rho": 0.02, "dataset": None}, ["dataset", "rho"]),
    ],
)
def test_differing_keys_are_named(other, keys):
    assert both_ways(RECORDED, other, whole=True) == keys


def test_tuples_equal_the_lists_that_json_makes_of_them():
    # A setting that is a tuple in Python comes back from a file as a list.
    recorded = json.loads(json.dumps({**RECORDED, "betas": (0.9, 0.99)}))
    assert both_ways(recorded, {**RECORDED, "betas": (0.9, 0.99)}, whole=True) == []
    options = {**RECORDED["network"], "name": "mine.Net", "options": {"widths": (8, 16)}}
    assert both_ways(json.loads(json.dumps({"network": options})), {"network": options}) == []


def test_networks_are_compared_by_their_parameters():
    network = build_network("convnet", **SHAPE, width=4, depth=1)
    assert both_ways(RECORDED, {**RECORDED, "network": describe_network(network)}, whole=True) == []


def test_dataset_that_0_1_recorded_matches_one_with_a_fingerprint():
    assert both_ways(RECORDED, without("dataset", "fingerprint"), whole=True) == []
    older = without("dataset", "fingerprint")
    older["dataset"]["seed"] = 1
    assert both_ways(RECORDED, older, whole=True) == ["dataset"]


def test_data_without_a_name_matches_nothing_but_itself():
    some, others = ({"dataset": {"unnamed": token}} for token in ("ab", "cd"))
    assert both_ways(some, some) == []
    for other in (others, {"dataset": None}, {"dataset": {}}, RECORDED, without("dataset", "fingerprint")):
        assert both_ways(some, {"dataset": other["dataset"]}) == ["dataset"]
    assert both_ways({"dataset": None}, {"dataset": RECORDED["dataset"]}) == ["dataset"]
    assert both_ways({"dataset": {"fingerprint": "ab"}}, {"dataset": {"fingerprint": "ab"}}) == []
    assert both_ways({"dataset": {"fingerprint": "ab"}}, {"dataset": {"fingerprint": "cd"}}) == ["dataset"]


@pytest.mark.parametrize("key", OPTIONAL_KEYS)
def test_keys_that_0_1_lacked_differ_only_where_both_records_have_them(key):
    assert both_ways({**RECORDED, key: 1}, {name: v for name, v in RECORDED.items() if name != key}, whole=True) == []
    assert both_ways({**RECORDED, key: 1}, {**RECORDED, key: 2}, whole=True) == [key]


@pytest.mark.parametrize("key", OWN_KEYS)
def test_what_each_teacher_has_for_itself_is_not_compared(key):
    assert both_ways({**RECORDED, key: 1}, {**RECORDED, key: 2}, whole=True) == []


def test_keys_that_only_the_record_has_differ_in_whole_records_alone():
    assert differences(RECORDED, without("rho")) == []
    assert differences(RECORDED, without("rho"), whole=True) == ["rho"]
    assert differences(without("rho"), RECORDED) == ["rho"]


@pytest.mark.skipif(not STORES_OF_0_1.is_dir(), reason="no shared/data/teachers-cifar10-w32 beside the checkout")
@pytest.mark.parametrize("name", ["mtt", "ftd"])
def test_store_of_0_1_is_compatible_with_what_this_version_asks_for(name, refused):
    store = TrajectoryStore(STORES_OF_0_1 / name)
    shape = {"in_channels": 3, "num_classes": 10, "image_size": 32}
    assert (len(store), store.epochs, store.num_parameters) == (10, 4, 24714)
    assert store.shape == (3, 10, 32)
    assert store.transform is None  # its whitening was not kept
    assert store.class_names is None
    wanted = {
        "network": describe_network(build_network("convnet", **shape, width=32, depth=3)),
        "dataset": {**store.metadata["dataset"], "fingerprint": "ab"},
        "transform": store.metadata["transform"],
        "method": "FlatTeacher",
        "batches_per_epoch": 192,
    }
    check_compatible(store, wanted)
    with refused(store.path, "dataset"):
        check_compatible(store, {**wanted, "dataset": {**wanted["dataset"], "val_fraction": 0.1}})
