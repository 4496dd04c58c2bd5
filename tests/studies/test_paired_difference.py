"""Differences of rows, network by network."""

import pytest

from ftd_lightning.studies.tables import (
    add_differences,
    full_lines,
    markdown,
    paired_difference,
    short_lines,
    short_table,
    summarize,
    verdict,
)

# On MTT's and on FTD's set of all of CIFAR-10, one image per class: networks of the same seeds.
MTT = {"seeds": [1, 2, 3, 4, 5], "each": [0.375, 0.386, 0.368, 0.359, 0.352]}
FTD = {"seeds": [1, 2, 3, 4, 5], "each": [0.372, 0.393, 0.364, 0.355, 0.353]}


def test_what_networks_have_in_common_drops_out():
    found = paired_difference(FTD, MTT)
    assert found["mean"] == pytest.approx(-0.0006)
    differences = [-0.003, 0.007, -0.004, -0.004, 0.001]
    variance = sum((d + 0.0006) ** 2 for d in differences) / 4
    assert found["standard_error"] == pytest.approx((variance / 5) ** 0.5)
    assert found["standard_error"] < 0.0022 < 0.0118  # the accuracies' own spread


def test_networks_are_found_by_their_seeds():
    other = {"seeds": [5, 1, 9], "each": [0.4, 0.3, 0.0]}
    assert paired_difference(other, MTT)["n"] == 2
    assert paired_difference(other, MTT)["mean"] == pytest.approx((0.4 - 0.352 + 0.3 - 0.375) / 2)
    assert paired_difference({"seeds": [7], "each": [0.5]}, MTT) is None
    assert paired_difference({"seeds": [1], "each": [0.5]}, MTT)["standard_error"] is None


def rows():
    accuracy = {"last": {"mean": 0.368, "std": 0.012, "n": 5}, "chosen_on_held_out": None, "best_on_test": None}
    seconds = dict.fromkeys(("teachers", "distillation", "evaluation"))
    rest = {"accuracy": accuracy, "seconds": seconds, "peak_memory_MiB": None, "images": 10, "share": None}
    return [
        {"name": "mtt", "label": "MTT", "state": "done", **MTT, **rest},
        {"name": "ftd", "label": "FTD", "state": "done", **FTD, **rest},
        {"name": "dc", "label": "DC", "state": "to do"},
    ]


def test_a_table_has_a_column_of_them_where_there_are_any():
    results = {"title": "t", "rows": rows(), "teachers": {}, "device": "CPU"}
    assert "paired difference" not in full_lines(results)[0]
    add_differences(results["rows"], {"mtt": "mtt", "ftd": "mtt", "dc": "mtt"})
    assert [line[-1] for line in full_lines(results)] == ["paired difference", "-", "-0.1 ± 0.2 to MTT", "to do"]
    assert "Paired difference: mean over networks of the same seed" in markdown(results)


def test_balanced_accuracies_have_a_column_where_there_are_any():
    learned, other, _ = found = rows()
    learned["balanced_accuracy"] = {"mean": 0.625, "std": 0.05, "n": 2}
    results = {"rows": [learned, other], "dataset": "own", "ipc": [3, 1], "device": "", "versions": {}}
    assert [line[2] for line in short_lines(results)] == ["balanced, %", "62.5 ± 5.0", "-"]
    assert [line[4] for line in full_lines({"rows": found})[:3]] == ["balanced, %", "62.5 ± 5.0 (2)", "-"]
    assert summarize(results)["balanced_accuracy"] == {learned["name"]: learned["balanced_accuracy"]}


def test_a_set_that_is_not_better_than_random_images_is_said_to_be_so():
    accuracy = {"accuracy": {"last": {"mean": 0.802, "std": 0.053, "n": 3}}, "state": "done", "seeds": [1, 2, 3]}
    random = {**accuracy, "name": "random", "label": "random images", "each": [0.96, 0.87, 0.92]}
    real = {**accuracy, "name": "real", "label": "real images (99, 7 epochs)", "each": [0.9, 0.9, 0.9]}
    real["accuracy"] = {"last": {"mean": 0.853, "std": 0.0, "n": 2}}
    for each, cell, ended in (
        ([0.80, 0.87, 0.73], "-11.7 ± 5.9, not better", True),
        ([0.99, 0.86, 0.95], "+1.7 ± 1.3, not better", False),
        ([0.99, 0.91, 0.96], "+3.7 ± 0.3", True),
    ):
        learned = {**accuracy, "name": "ftd", "label": "FTD", "each": each, "iterations": 155}
        results = {"rows": [dict(random), learned, {**real, "trained_to_its_end": ended}]}
        add_differences(results["rows"], {"ftd": "random"})
        head, *lines = short_lines(results)
        assert head[2] == "difference to random images"
        assert [line[1:] for line in lines] == [
            ["80.2 ± 5.3 (3)", "-"],
            ["80.2 ± 5.3 (3)", cell],
            ["85.3 ± 0.0 (2)", "-"],
        ]
        assert "Fresh networks, after their last epoch." in short_table(results)
        points, _, worse = cell.partition(",")
        said = f"The set is {worse and 'not clearly '}better than random images: {points} points"
        said += " (mean difference of 3 networks ± standard error)."
        assert verdict(results) == said + " Networks trained on real images reach 5.1 points more." * ended
