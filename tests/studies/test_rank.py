"""``ftd rank``: what is compared with what, what is chosen on what, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fits import SMALL, small_data
from PIL import Image
from torch.nn.functional import one_hot

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.core.evaluation import EvaluationProtocol, accuracy, train_fresh_networks
from ftd_lightning.data.coresets import class_probabilities, random_real_images
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.models import build_network
from ftd_lightning.studies.rank import (
    SCORES,
    Lesson,
    RankData,
    RankedSet,
    RankEvaluation,
    RankSettings,
    hard_labels,
    markdown,
    normalised,
    prepare,
    rank_sets,
    real_epochs_for,
)

NETWORK = {"name": "convnet", "options": SMALL}
AUGMENTATION = {"strategy": "crop_scale", "mode": "single"}
SHORT = {"networks": 2, "epochs": 6, "real_epochs": 4, "learning_rates": [0.01, 0.1], "lr_networks": 1}
WORDS = ["--networks=2", "--epochs=6", "--real-epochs=4", "--learning-rates", "0.01", "0.1", "--lr-networks=1"]


def save(path: Path, data: DistillationDataModule, ipc: int, *, soft: bool = False, **metadata: object) -> str:
    """Save real images as a set."""
    data.prepare_data()
    data.setup()
    real = random_real_images(data.train, ipc, 7)
    classes = data.num_classes
    labels = 0.8 * one_hot(real.labels, classes).float() + 0.2 / classes if soft else real.labels
    described = {"network": NETWORK, "augmentation": AUGMENTATION, "dataset": data.describe()["dataset"], **metadata}
    SyntheticSet(
        real.images,
        labels,
        step_size=None if soft else torch.tensor(0.05),
        class_names=data.class_names,
        transform=data.transform,
        metadata={"method": "made", **({"labels_made": "learned"} if soft else {}), **described},
    ).save(path)
    return str(path)


def changed(name: str, path: Path, **fields: object) -> str:
    """Save a set again with other fields; those of its metadata are added to the others."""
    one = SyntheticSet.load(name)
    fields["metadata"] = {**one.metadata, **fields.get("metadata", {})}
    replace(one, **fields).save(path)
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A set of 1 image per class with hard labels, and one of 2 with soft ones."""
    folder = tmp_path_factory.mktemp("sets")
    data = small_data()
    return save(folder / "hard.safetensors", data, 1), save(folder / "soft.safetensors", data, 2, soft=True)


@pytest.fixture(scope="module")
def ranked(sets: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("rank")
    cli.main(["rank", *sets, "--out", str(out), *WORDS])
    return out, json.loads((out / "rank.json").read_text())


def prepared(names: list[str], out: Path, **settings: object) -> list[RankedSet]:
    return prepare(names, RankSettings(out=str(out), **{**SHORT, **settings}), RankData())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# 1: everything is there, once


def test_every_set_has_every_score_in_the_json_and_once_in_the_table(ranked, sets, capsys) -> None:
    out, results = ranked
    assert list(results["sets"]) == list(sets)
    for one in results["sets"].values():
        for score in SCORES:
            assert set(one[score]) == {"mean", "std", "n"}
            assert one[score]["n"] == 2
        for column in filter(None, one["columns"].values()):
            for side in ("set", "random"):
                assert column[side]["accuracy"]["n"] == len(column[side]["each"]) == 2
                assert column[side]["lr"] in one["learning_rates"]
        assert (one["teacher_at_evaluation"], one["columns"]["teacher"]["teacher_at_evaluation"]) == (False, True)
    table = (out / "rank.md").read_text(encoding="utf-8")
    for name, one in results["sets"].items():
        first, second = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert first.count(f"{one['lrs']['mean']:.3f} ± ") == 1
        assert len(first.split(" | ")) == 8
        assert f"{100 * one['columns']['hard']['random']['accuracy']['mean']:.1f}" in second
    with Image.open(out / "rank.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10, "not a blank sheet"


def test_what_is_written_says_how_to_repeat_it(ranked, sets) -> None:
    _, results = ranked
    assert results["seeds"] == [derive_seed(0, "fresh", index) for index in range(2)]
    settings = results["settings"]
    assert settings["network"]["options"] == SMALL
    assert settings["augment"]["strategy"] == "crop_scale"
    assert (settings["epochs"], settings["real_epochs"], settings["seed"]) == (6, 4, 0)
    assert settings["protocol"]["momentum"] == 0.9
    hard, soft = results["sets"].values()
    assert (hard["labels"], soft["labels"]) == ("hard", "soft (learned)")
    assert (hard["images_stored"], hard["images_trained_on"], soft["images_trained_on"]) == (10, 10, 20)
    assert (hard["images_per_class"], soft["images_per_class"]) == ([1] * 10, [2] * 10)
    assert hard["learning_rates"] == pytest.approx([0.01, 0.05, 0.1])
    assert soft["learning_rates"] == [0.01, 0.1]
    assert hard["real"]["images"] == 140


# 2: the base line


def test_random_images_are_as_many_of_each_class_in_the_order_of_classes(sets, tmp_path: Path) -> None:
    labels = torch.full((20, 10), 0.02)
    labels[torch.arange(20), torch.tensor([3] * 5 + [0] * 4 + list(range(10)) + [9])] = 0.82
    uneven = changed(sets[1], tmp_path / "uneven.safetensors", labels=labels)
    (one,) = prepared([uneven], tmp_path)
    counts = [5, 1, 1, 6, 1, 1, 1, 1, 1, 2]
    assert one.counts == counts
    draws = [one.random_images(index) for index in range(2)]
    held_out = {image.numpy().tobytes() for image in one.evaluation.data.val.images}
    known = {(image.numpy().tobytes(), int(y)) for image, y in zip(*one.evaluation.data.train, strict=True)}
    for drawn in draws:
        assert drawn.labels.tolist() == [label for label, count in enumerate(counts) for _ in range(count)]
        found = [(image.numpy().tobytes(), int(y)) for image, y in zip(*drawn, strict=True)]
        assert set(found) <= known
        assert len(set(found)) == 20
        assert not {image for image, _ in found} & held_out
    assert not draws[0].images.equal(draws[1].images), "each network has a draw of its own"


def test_random_images_of_a_soft_set_have_the_labels_of_a_teacher(sets, tmp_path: Path) -> None:
    (one,) = prepared([sets[1]], tmp_path)
    lessons = one._lessons("soft")
    assert lessons["set"](0).labels.equal(one.synthetic.labels)
    for index, teacher in enumerate(one.evaluation.teachers):
        lesson, drawn = lessons["random"](index), one.random_images(index)
        assert lesson.images.equal(drawn.images)
        torch.testing.assert_close(lesson.labels, class_probabilities(teacher, drawn.images))
    weights = [next(teacher.parameters()) for teacher in one.evaluation.teachers]
    assert not weights[0].equal(weights[1])


# 3: both kinds of labels, 5: fractions


def test_scores_follow_from_the_accuracies_network_by_network(ranked) -> None:
    for one in ranked[1]["sets"].values():
        own, columns = one["columns"][one["compared_by"]], one["columns"]
        hlr = [r - h for r, h in zip(one["real"]["each"], columns["hard"]["set"]["each"], strict=True)]
        ior = [a - b for a, b in zip(own["set"]["each"], own["random"]["each"], strict=True)]
        plain = columns["not augmented"]
        without = [a - b for a, b in zip(plain["set"]["each"], plain["random"]["each"], strict=True)]
        assert one["hlr"]["mean"] == pytest.approx(mean(hlr))
        assert one["ior"]["mean"] == pytest.approx(mean(ior))
        assert own["difference"]["mean"] == pytest.approx(mean(ior))
        expected = [normalised(0.5 * i - 0.5 * h) for i, h in zip(ior, hlr, strict=True)]
        assert one["lrs"]["mean"] == pytest.approx(mean(expected))
        expected = [normalised(0.5 * i + 0.5 * w) for i, w in zip(ior, without, strict=True)]
        assert one["ars"]["mean"] == pytest.approx(mean(expected))
        assert all(0 <= one[score]["mean"] <= 1 for score in ("lrs", "ars"))
        assert all(0 <= accuracy <= 1 for accuracy in one["real"]["each"])


def test_a_score_of_nothing_gained_and_nothing_lost_is_known() -> None:
    assert normalised(0.0) == pytest.approx((1 - math.exp(-1)) / (math.e - math.exp(-1)))
    assert (normalised(-1.0), normalised(1.0)) == (0.0, 1.0)


def test_hard_and_soft_sets_are_each_compared_by_their_own_labels(ranked) -> None:
    hard, soft = ranked[1]["sets"].values()
    assert (hard["compared_by"], soft["compared_by"]) == ("hard", "soft")
    assert hard["columns"]["soft"] is None
    assert [one["columns"]["not augmented"]["labels"] for one in (hard, soft)] == ["hard", "soft"]
    assert soft["columns"]["soft"]["set"]["each"] != soft["columns"]["hard"]["set"]["each"]


def test_hard_labels_of_a_soft_set_are_those_of_its_largest_values(sets) -> None:
    soft = SyntheticSet.load(sets[1])
    assert hard_labels(soft.labels).tolist() == [label for label in range(10) for _ in range(2)]


# 4: the command line


def test_help_names_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["rank", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    options = [*RankSettings.__dataclass_fields__, *(f"data.{name}" for name in RankData.__dataclass_fields__)]
    assert not [option for option in options if f"--{option}" not in shown]


def test_every_option_is_taken(sets, tmp_path: Path, capsys) -> None:
    averaged = SyntheticSet.load(sets[0]).images.flip(0)
    ema = changed(sets[0], tmp_path / "ema.safetensors", ema_images=averaged)
    options = ["--network=alexnet", '--network-options={"width": 4}', "--augment=flip", "--ema", "--seed=3"]
    options = ["--network=convnet", "--network-options={width: 3, depth: 1}", *options[2:], "--threads=1"]
    images = ["--data.root=elsewhere", "--data.dataset=digits", "--data.image_size=8", "--data.val_fraction=0.2"]
    images += ["--data.max_per_class=10", "--data.test_fraction=0.3", "--data.seed=4", "--data.download=false"]
    cli.main(["rank", ema, "--out", str(tmp_path / "out"), *WORDS, *options, *images, f"--data.cache_dir={tmp_path}"])
    results = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert results["settings"]["network"]["options"] == {"width": 3, "depth": 1}
    assert results["settings"]["augment"]["strategy"] == "flip"
    described = {key: results["settings"]["dataset"][key] for key in ("val_fraction", "max_per_class", "seed")}
    assert described == {"val_fraction": 0.2, "max_per_class": 10, "seed": 4}
    (one,) = results["sets"].values()
    assert (one["images"], one["images_stored"], one["held_out_seen"]) == ("averaged", 10, True)
    (again,) = prepare([ema], RankSettings(str(tmp_path), ema=True), RankData())
    assert again._lessons("hard")["set"](0).images.equal(averaged)
    assert "Distilled from images that are held out here too" in capsys.readouterr().out


def test_the_cost_comes_first(sets, tmp_path: Path, capsys, monkeypatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RankEvaluation, "trained", stop)
    with pytest.raises(SystemExit):
        cli.main(["rank", *sets, "--out", str(tmp_path), *WORDS])
    # 3 columns of 2 sides, 3 rates and a second network; 4 columns of 2 sides, 2 rates and a second network
    assert "at most 48 trainings of 6 epochs on sets and random images, and 4 of 4 epochs" in capsys.readouterr().out


# 6: what is chosen on what


@pytest.fixture(scope="module")
def straight(sets, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return rank_sets(prepared(list(sets), tmp_path_factory.mktemp("straight")))


def choices(results: dict) -> list[object]:
    """Every learning rate that was chosen, and the accuracies that chose it."""
    found = []
    for one in results["sets"].values():
        sides = [column[side] for column in filter(None, one["columns"].values()) for side in ("set", "random")]
        found += [(side["lr"], side["held_out"]) for side in (*sides, one["real"])]
    return found


def every(results: dict) -> list[object]:
    return [[one["real"]["each"], *(c and c["set"]["each"] for c in one["columns"].values())]
            for one in results["sets"].values()]  # fmt: skip


def test_two_runs_are_equal(ranked, straight) -> None:
    assert json.loads(json.dumps(straight["sets"])) == ranked[1]["sets"]


def test_another_seed_is_another_run(sets, straight, tmp_path: Path) -> None:
    assert every(rank_sets(prepared(list(sets), tmp_path, seed=1))) != every(straight)


def test_test_images_choose_nothing(sets, straight, tmp_path: Path) -> None:
    spoilt = prepared(list(sets), tmp_path)
    labels = spoilt[0].evaluation.data.test.labels
    labels.copy_((labels + 1) % 10)
    results = rank_sets(spoilt)
    assert choices(results) == choices(straight)
    assert every(results) != every(straight)


def test_held_out_images_choose(sets, straight, tmp_path: Path) -> None:
    spoilt = prepared(list(sets), tmp_path)
    held_out = spoilt[0].evaluation.data.val
    assert len(held_out.labels) == 10
    held_out.labels.copy_((held_out.labels + 1) % 10)
    hard = rank_sets(spoilt)["sets"][sets[0]]["columns"]["hard"]  # no teacher, who is trained on held-out images too
    for side in ("set", "random"):
        before = straight["sets"][sets[0]]["columns"]["hard"][side]
        assert hard[side]["held_out"] != before["held_out"]


def test_the_rate_with_the_best_held_out_accuracy_is_taken(straight) -> None:
    for lr, held_out in choices(straight):
        assert held_out[str(lr)] == max(held_out.values())
    offered = [set(held_out) for _, held_out in choices(straight)]
    assert len(offered[0]) == 3
    assert all(ours == random for ours, random in zip(offered[:6:2], offered[1:6:2], strict=True)), "for both the same"


def test_accuracy_is_that_after_the_last_epoch(sets, straight) -> None:
    """Trained here again by the protocol, without anything of the ranking."""
    name = sets[0]
    synthetic, data = SyntheticSet.load(name), small_data(synthetic=name)
    column = straight["sets"][name]["columns"]["hard"]["set"]
    protocol = EvaluationProtocol(6, column["lr"], augment=Augmentation.of(AUGMENTATION))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "fresh", 1))
        network = build_network("convnet", 1, 10, 8, **SMALL)
    train_fresh_networks(
        [network], synthetic.images, synthetic.labels, protocol, seed=derive_seed(0, "rank", 1), indices=[1]
    )
    assert column["each"][1] == accuracy(network, *data.test)


def test_a_step_size_that_is_listed_is_tried_once(sets, tmp_path: Path) -> None:
    same = changed(sets[0], tmp_path / "same.safetensors", step_size=torch.tensor(0.1))
    (one,) = prepared([same], tmp_path)
    assert one.learning_rates == [0.01, 0.1]


# 7: all real images


def test_all_real_images_are_trained_on_for_epochs_of_their_own(ranked) -> None:
    out, results = ranked
    assert [one["real"]["epochs"] for one in results["sets"].values()] == [4, 4]
    records = [json.loads(file.read_text()) for file in (out / "evaluations").glob("*.json")]
    assert {record["of"]["protocol"]["epochs"] for record in records} == {4, 6}
    assert len([record for record in records if record["of"]["protocol"]["epochs"] == 4]) == 2 + 2
    assert [real_epochs_for(images, 256) for images in (1437, 50_000)] == [60, 60]
    assert real_epochs_for(140, 256) == 360


def test_held_out_images_are_among_them_but_not_where_the_rate_is_chosen(sets, tmp_path: Path) -> None:
    (one,) = prepared([sets[0]], tmp_path)
    data = one.evaluation.data
    assert one.evaluation.whole.labels.equal(torch.cat([data.train.labels, data.val.labels]))
    assert len(one.evaluation.train.labels) == 130
    lessons: list[int] = []
    evaluation, measured = one.evaluation, one.evaluation.measured

    def watched(lesson: Lesson, *rest: object, **more: object) -> dict[str, float]:
        lessons.append(len(lesson.labels))
        return measured(lesson, *rest, **more)

    evaluation.measured = watched
    assert evaluation.real["accuracy"]["n"] == 2
    assert lessons == [130, 130, 140, 140]


def test_teachers_are_the_networks_that_were_measured(sets, tmp_path: Path) -> None:
    """Read again, running statistics included."""
    (one,) = prepared([sets[0]], tmp_path, network="convnet", network_options={**SMALL, "norm": "batch"})
    measured = [accuracy(teacher, *one.evaluation.data.test) for teacher in one.evaluation.teachers]
    assert measured == one.evaluation.real["each"]
    assert not any(teacher.training for teacher in one.evaluation.teachers)


# 8: any data set, any transform


def test_sets_of_a_folder_of_three_classes(image_folder, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", ["cat", "dog", "eel"], count=12)
    data = DistillationDataModule("folder", root=str(root), image_size=8)
    name = save(tmp_path / "own.safetensors", data, 2)
    cli.main(["rank", name, "--out", str(tmp_path / "out"), *WORDS, "--data.root", str(root)])
    results = json.loads((tmp_path / "out" / "rank.json").read_text())
    (one,) = results["sets"].values()
    assert one["images_per_class"] == [2, 2, 2]
    assert results["settings"]["network"]["num_classes"] == 3
    assert results["settings"]["network"]["image_size"] == 8


def test_real_images_go_through_the_transform_of_each_set(sets, tmp_path: Path) -> None:
    whitened = save(tmp_path / "zca.safetensors", small_data(zca=True, cache_dir=str(tmp_path)), 1)
    plain, soft, other = prepared([*sets, whitened], tmp_path / "out")
    assert plain.evaluation is soft.evaluation
    assert plain.evaluation is not other.evaluation
    for one in (plain, other):
        assert one.evaluation.data.transform.describe() == one.synthetic.transform.describe()
        pictures = one.synthetic.transform.invert(one.evaluation.data.test.images)
        expected = plain.synthetic.transform.invert(plain.evaluation.data.test.images)
        torch.testing.assert_close(pictures, expected, atol=1e-3, rtol=0)
    results = rank_sets([plain, other])
    ours, theirs = results["sets"].values()
    assert ours["real"]["each"] != theirs["real"]["each"]
    assert markdown(results).count(f"| {whitened} |") == 2


# Resuming, and sharing


def test_what_is_finished_is_not_trained_again(ranked, sets, tmp_path: Path, monkeypatch) -> None:
    train, done = RankEvaluation.trained, []

    def until_the_ninth(*arguments: object) -> torch.nn.Module:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(RankEvaluation, "trained", until_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        rank_sets(prepared(list(sets), tmp_path))
    monkeypatch.setattr(RankEvaluation, "trained", lambda *arguments: done.append(arguments) or train(*arguments))
    resumed = rank_sets(prepared(list(sets), tmp_path))
    assert json.loads(json.dumps(resumed["sets"])) == ranked[1]["sets"]
    assert len(done) == len(list((ranked[0] / "evaluations").glob("*.json")))
    rank_sets(prepared(list(sets), tmp_path))
    assert len(done) == len(list((tmp_path / "evaluations").glob("*.json"))), "none twice"


def test_other_settings_are_trained_anew(sets, tmp_path: Path) -> None:
    first = rank_sets(prepared([sets[0]], tmp_path))
    assert every(rank_sets(prepared([sets[0]], tmp_path, epochs=12))) != every(first)
    assert every(rank_sets(prepared([sets[0]], tmp_path))) == every(first)


# 9: what is refused


@pytest.fixture
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(RankEvaluation, "trained", fail)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["rank", *map(str, arguments)])
    shown = capsys.readouterr()
    assert stop.value.code == 1
    assert shown.err.count("\n") == 1
    assert not shown.out
    return shown.err


@pytest.mark.usefixtures("nothing_is_trained")
def test_bad_input_is_one_line_before_anything_is_trained(sets, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    hard, _ = sets
    Path("file").write_text("")
    names = [f"class {index}" for index in range(10)]
    one = SyntheticSet.load(hard)
    few = changed(
        hard, tmp_path / "few.safetensors", images=one.images[:3], labels=torch.arange(3), class_names=names[:3]
    )
    cases = [
        (["nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["file"], "file: "),
        ([hard, hard], "is given twice"),
        ([hard, few], "has 3 classes"),
        ([hard, changed(hard, tmp_path / "renamed.safetensors", class_names=names)], "has other classes"),
        ([tmp_path / "renamed.safetensors"], "has (1, 8, 8) images of 0, 1, 2"),
        ([few], "holds (1, 8, 8) images of the classes class 0, class 1, class 2"),
        ([hard, "--networks=0"], "networks=0 must be at least 1"),
        ([hard, "--epochs=0"], "epochs=0 must be at least 1"),
        ([hard, "--real-epochs=0"], "real_epochs=0 must be at least 1"),
        ([hard, "--learning-rates", "0.1", "-1"], "learning_rates[1]=-1.0 must be above 0"),
        ([hard, "--learning-rates=[]"], "learning_rates is empty"),
        ([hard, "--out=file"], "file: is not a folder"),
        ([hard, "--out=file/below"], "file"),
        ([hard, "--network=convnot"], "did you mean 'convnet'"),
        ([hard, "--network=convnet", "--network-options={depht: 1}"], "depht"),
        ([hard, "--network-options={depth: 1}"], "give network as well"),
        ([hard, "--augment=flop"], "DSA has no operation 'flop'"),
        ([hard, "--data.dataset=digit"], "unknown data set 'digit'"),
        ([hard, "--data.dataset=cifar10"], "hard.safetensors: was made of 'digits', not of 'cifar10'"),
        ([hard, "--data.val_fraction=0"], "give --data.val_fraction above 0"),
    ]
    for index, (arguments, message) in enumerate(cases):
        assert message in refusal(capsys, *arguments), index
    assert not Path("runs").exists() or not list(Path("runs").rglob("*.json"))


@pytest.mark.usefixtures("nothing_is_trained")
def test_sets_that_do_not_belong_together_are_refused(sets, tmp_path: Path, capsys) -> None:
    hard, _ = sets
    described = SyntheticSet.load(hard).metadata
    others = {
        "dataset": ({**described["dataset"], "name": "cifar10"}, "was made of another data set"),
        "network": ({**NETWORK, "options": {"width": 8, "depth": 1}}, "give --network for all"),
        "augmentation": ({"strategy": "flip", "mode": "single"}, "give --augment for all"),
    }
    for key, (value, message) in others.items():
        other = changed(hard, tmp_path / f"{key}.safetensors", metadata={key: value})
        assert message in refusal(capsys, hard, other, f"--out={tmp_path}")
    prepared([hard, str(tmp_path / "network.safetensors")], tmp_path, network="convnet", network_options=SMALL)
    prepared([hard, str(tmp_path / "augmentation.safetensors")], tmp_path, augment="crop")
    bare = replace(SyntheticSet.load(hard), metadata={})
    bare.save(tmp_path / "bare.safetensors")
    assert "give --data.dataset" in refusal(capsys, tmp_path / "bare.safetensors", f"--out={tmp_path}")
    named = [tmp_path / "bare.safetensors", "--data.dataset=digits", f"--out={tmp_path}"]
    assert "does not name its network: give --network" in refusal(capsys, *named)
    no_name = changed(
        hard, tmp_path / "unnamed.safetensors", metadata={"network": {"name": "my.Net", "parameters": []}}
    )
    assert "not of this library: give --network" in refusal(capsys, no_name, f"--out={tmp_path}")
    prepared([hard, str(changed(hard, tmp_path / "classless.safetensors", class_names=[]))], tmp_path)


@pytest.mark.usefixtures("nothing_is_trained")
def test_more_images_of_a_class_than_there_are_real_ones(sets, tmp_path: Path, capsys) -> None:
    one = SyntheticSet.load(sets[0])
    many = changed(
        sets[0], tmp_path / "many.safetensors", images=one.images.repeat(14, 1, 1, 1), labels=one.labels.repeat(14)
    )
    assert "has 14 images of class 0, of which there are 13" in refusal(capsys, many, f"--out={tmp_path}")
