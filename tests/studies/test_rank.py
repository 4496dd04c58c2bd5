"""``ftd rank``: what is compared with what, what is chosen on what, and what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fits import SMALL, refusal, small_data
from torch.nn.functional import one_hot

from ftd_lightning import DistillationDataModule, SyntheticSet, cli
from ftd_lightning.core.evaluation import EvaluationProtocol, accuracies, train_fresh_networks
from ftd_lightning.data.coresets import class_probabilities, random_real_images
from ftd_lightning.functional.augment import Augmentation
from ftd_lightning.functional.seeding import derive_seed
from ftd_lightning.models import build_network
from ftd_lightning.studies import rank
from ftd_lightning.studies.rank import SCORES, RankedSet, RankSettings, markdown, prepare, rank_sets

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
    return prepare(names, RankSettings(out=str(out), **{**SHORT, **settings}), {})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def every(results: dict) -> list[object]:
    """Accuracies of all networks."""
    columns = [column for one in results["sets"].values() for column in one["columns"].values() if column]
    return [[column[side]["each"] for side in ("set", "random")] for column in columns]


def test_scores_tables_and_the_record(ranked, sets) -> None:
    out, results = ranked
    assert list(results["sets"]) == list(sets)
    table = (out / "rank.md").read_text(encoding="utf-8")
    for name, one in results["sets"].items():
        assert all(one[score]["n"] == 2 for score in SCORES)
        for column in filter(None, one["columns"].values()):
            for side in ("set", "random"):
                found = column[side]
                assert found["accuracy"]["n"] == len(found["each"]) == 2
                assert found["held_out"][str(found["lr"])] == max(found["held_out"].values())
                assert [float(lr) for lr in found["held_out"]] == one["learning_rates"], "the same for both"
        first, second = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
        assert first.count(f"{one['lrs']['mean']:.3f} ± ") == 1
        assert f"{100 * one['columns']['hard']['random']['accuracy']['mean']:.1f}" in second
        assert (one["real"]["epochs"], one["real"]["images"]) == (4, 140)
    assert results["seeds"] == [derive_seed(0, "fresh", index) for index in range(2)]
    hard, soft = results["sets"].values()
    assert (hard["labels"], soft["labels"], hard["columns"]["soft"]) == ("hard", "soft (learned)", None)
    assert [one["columns"]["not augmented"]["labels"] for one in (hard, soft)] == ["hard", "soft"]
    assert soft["columns"]["soft"]["set"]["each"] != soft["columns"]["hard"]["set"]["each"]
    assert (hard["images_per_class"], soft["images_per_class"]) == ([1] * 10, [2] * 10)
    stored = {"numbers_stored": 640, "bytes_stored": 2560, "decoder": None, "evaluation_steps": 6}
    assert hard.items() >= stored.items()
    assert "bytes" not in table
    decoded = markdown({**results, "sets": {"decoded": {**hard, "decoder": {"class_path": "Flip"}}, "plain": soft}})
    assert "| images | numbers | bytes | steps |" in decoded
    assert "| 10 | 640 | 2,560 | 6 |" in decoded
    assert hard["learning_rates"] == pytest.approx([0.01, 0.05, 0.1])
    assert soft["learning_rates"] == [0.01, 0.1]


def test_scores_follow_from_the_accuracies_network_by_network(ranked) -> None:
    def n(value: float) -> float:
        return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))

    for one in ranked[1]["sets"].values():
        columns, own, plain = one["columns"], one["columns"][one["compared_by"]], one["columns"]["not augmented"]
        hlr = [r - h for r, h in zip(one["real"]["each"], columns["hard"]["set"]["each"], strict=True)]
        ior, without = (
            [a - b for a, b in zip(column["set"]["each"], column["random"]["each"], strict=True)]
            for column in (own, plain)
        )
        assert one["hlr"]["mean"] == pytest.approx(mean(hlr))
        assert one["ior"]["mean"] == pytest.approx(mean(ior)) == own["difference"]["mean"]
        assert one["lrs"]["mean"] == pytest.approx(mean([n(0.5 * i - 0.5 * h) for i, h in zip(ior, hlr, strict=True)]))
        expected = [n(0.5 * i + 0.5 * w) for i, w in zip(ior, without, strict=True)]
        assert one["ars"]["mean"] == pytest.approx(mean(expected))


def test_random_images_are_as_many_of_each_class(sets, tmp_path: Path) -> None:
    labels = torch.full((20, 10), 0.02)
    labels[torch.arange(20), torch.tensor([3] * 5 + [0] * 4 + list(range(10)) + [9])] = 0.82
    uneven = changed(sets[1], tmp_path / "uneven.safetensors", labels=labels)
    (one,) = prepared([uneven], tmp_path)
    counts = [5, 1, 1, 6, 1, 1, 1, 1, 1, 2]
    assert one.counts == counts
    draws = [one.random_images(index) for index in range(2)]
    held_out = {image.numpy().tobytes() for image in one.data.val.images}
    known = {(image.numpy().tobytes(), int(y)) for image, y in zip(*one.data.train, strict=True)}
    for drawn in draws:
        assert drawn.labels.tolist() == [label for label, count in enumerate(counts) for _ in range(count)]
        found = {(image.numpy().tobytes(), int(y)) for image, y in zip(*drawn, strict=True)}
        assert found <= known
        assert len(found) == 20
        assert not {image for image, _ in found} & held_out
    assert not draws[0].images.equal(draws[1].images), "another draw for each network"


def test_random_images_of_a_soft_set_have_the_labels_of_a_teacher(sets, tmp_path: Path) -> None:
    """Teachers are read again, running statistics included, and are the networks that were measured."""
    (one,) = prepared([sets[1]], tmp_path, network="convnet", network_options={**SMALL, "norm": "batch"})
    assert accuracies(one.teachers, *one.data.test) == one.real["each"]
    assert all(lesson.labels.equal(one.synthetic.labels) for lesson in one.lessons("soft", "set"))
    for index, (lesson, teacher) in enumerate(zip(one.lessons("soft", "random"), one.teachers, strict=True)):
        assert not teacher.training
        assert lesson.images.equal(one.random_images(index).images)
        torch.testing.assert_close(lesson.labels, class_probabilities(teacher, lesson.images))
    hard = one.lessons("hard", "set")[0].labels
    assert hard.tolist() == [label for label in range(10) for _ in range(2)]


def test_every_option_is_taken(sets, tmp_path: Path, capsys) -> None:
    averaged = SyntheticSet.load(sets[0]).images.flip(0)
    ema = changed(sets[0], tmp_path / "ema.safetensors", ema_images=averaged)
    options = ["--network=convnet", "--network-options={width: 3, depth: 1}", "--augment=flip", "--ema", "--seed=3"]
    options += ["--data.val_fraction=0.2", "--data.max_per_class=10", "--data.seed=4"]
    cli.main(["rank", ema, "--out", str(tmp_path / "out"), *WORDS, *options])
    results = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert results["settings"]["network"]["options"] == {"width": 3, "depth": 1}
    assert results["settings"]["augment"]["strategy"] == "flip"
    described = {key: results["settings"]["dataset"][key] for key in ("val_fraction", "max_per_class", "seed")}
    assert described == {"val_fraction": 0.2, "max_per_class": 10, "seed": 4}
    (one,) = results["sets"].values()
    assert (one["images"], one["images_stored"], one["held_out_seen"]) == ("averaged", 10, True)
    (again,) = prepared([ema], tmp_path, ema=True)
    assert again.lessons("hard", "set")[0].images.equal(averaged)
    assert "Distilled from images that are held out here too" in capsys.readouterr().out


def choices(results: dict) -> list[object]:
    """Every learning rate that was chosen, and the accuracies that chose it."""
    columns = [column for one in results["sets"].values() for column in one["columns"].values() if column]
    return [(column[side]["lr"], column[side]["held_out"]) for column in columns for side in ("set", "random")]


def test_held_out_images_choose_and_test_images_do_not(sets, ranked, tmp_path: Path) -> None:
    spoilt = prepared([sets[0]], tmp_path / "test")
    labels = spoilt[0].data.test.labels
    labels.copy_((labels + 1) % 10)
    results, straight = rank_sets(spoilt), {"sets": {sets[0]: ranked[1]["sets"][sets[0]]}}
    assert choices(results) == choices(straight)
    assert every(results) != every(straight)
    (spoilt,) = prepared([sets[0]], tmp_path / "val")
    labels = spoilt.data.val.labels
    assert len(labels) == 10
    labels.copy_((labels + 1) % 10)
    for side in ("set", "random"):
        protocols = [spoilt.protocol(lr) for lr in spoilt.learning_rates]
        before = straight["sets"][sets[0]]["columns"]["hard"][side]
        assert spoilt.scored(protocols, spoilt.lessons("hard", side))["held_out"] != before["held_out"]


def test_accuracy_is_that_after_the_last_epoch(sets, ranked) -> None:
    """Trained here again by the protocol, without anything of the ranking."""
    synthetic, data = SyntheticSet.load(sets[0]), small_data(synthetic=sets[0])
    column = ranked[1]["sets"][sets[0]]["columns"]["hard"]["set"]
    protocol = EvaluationProtocol(6, column["lr"], augment=Augmentation.of(AUGMENTATION))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(0, "fresh", 1))
        network = build_network("convnet", 1, 10, 8, **SMALL)
    images, seed = (synthetic.images, synthetic.labels), derive_seed(0, "rank", 1)
    train_fresh_networks([network], *images, protocol, seed=seed, indices=[1])
    assert column["each"][1] == accuracies([network], *data.test)[0]


def test_held_out_images_are_trained_on_but_not_where_the_rate_is_chosen(sets, tmp_path: Path) -> None:
    (one,) = prepared([changed(sets[0], tmp_path / "same.safetensors", step_size=torch.tensor(0.1))], tmp_path)
    assert one.learning_rates == [0.01, 0.1], "a step size that is listed is tried once"
    assert one.whole.labels.equal(torch.cat([one.data.train.labels, one.data.val.labels]))
    lessons, measured = [], one.measured
    one.measured = lambda lesson, *rest: lessons.append(len(lesson.labels)) or measured(lesson, *rest)
    assert one.real["accuracy"]["n"] == 2
    assert lessons == [130, 130, 140, 140]
    one.settings = replace(one.settings, real_epochs=None)
    assert one.protocol(0.1, real=True).epochs == 360, "as many as make 360 steps"


def test_real_images_go_through_the_transform_of_each_set(sets, tmp_path: Path) -> None:
    whitened = save(tmp_path / "zca.safetensors", small_data(zca=True, cache_dir=str(tmp_path)), 1)
    plain, soft, other = prepared([*sets, whitened], tmp_path / "out")
    assert plain.data is soft.data
    for one in (plain, other):
        assert one.data.transform.describe() == one.synthetic.transform.describe()
        pictures = one.synthetic.transform.invert(one.data.test.images)
        expected = plain.synthetic.transform.invert(plain.data.test.images)
        torch.testing.assert_close(pictures, expected, atol=1e-3, rtol=0)
    results = rank_sets([plain, other])
    ours, theirs = results["sets"].values()
    assert ours["real"]["each"] != theirs["real"]["each"]
    assert markdown(results).count(f"| {whitened} |") == 2


def test_a_ranking_that_was_ended_goes_on_and_gives_the_same(ranked, sets, tmp_path: Path, monkeypatch) -> None:
    train, done = rank.train_fresh_networks, []

    def until_the_ninth(*args: object, **options: object) -> None:
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(args)
        train(*args, **options)

    monkeypatch.setattr(rank, "train_fresh_networks", until_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        rank_sets(prepared(list(sets), tmp_path))
    monkeypatch.setattr(rank, "train_fresh_networks", lambda *a, **k: done.append(a) or train(*a, **k))
    resumed = rank_sets(prepared(list(sets), tmp_path))
    assert json.loads(json.dumps(resumed["sets"])) == ranked[1]["sets"]
    assert len(done) == len(list((ranked[0] / "evaluations").glob("*.json"))), "none twice"
    other = rank_sets(prepared([sets[0]], tmp_path, epochs=12, seed=1))
    assert every(other)[0] != every(resumed)[0], "other settings are trained anew"


def test_bad_input_is_one_line_before_anything_is_trained(sets, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rank, "train_fresh_networks", None)
    hard, _ = sets
    one = SyntheticSet.load(hard)
    names = [f"class {index}" for index in range(10)]
    images, labels = one.images.repeat(14, 1, 1, 1), one.labels.repeat(14)
    described = {**one.metadata["dataset"], "name": "cifar10"}
    network = {**NETWORK, "options": {"width": 8, "depth": 1}}

    def made(name: str, **fields: object) -> str:
        return changed(hard, Path(f"{name}.safetensors"), **fields)

    replace(one, metadata={}).save("bare.safetensors")
    cases = [
        ([hard, made("few", images=one.images[:3], labels=torch.arange(3), class_names=names[:3])], "few.safetensors"),
        ([made("many", images=images, labels=labels)], "has 14 images of class 0, real ones are 13"),
        (
            [hard, made("other", metadata={"dataset": described})],
            "other images than those here (another name)",
        ),
        ([hard, made("wide", metadata={"network": network})], "give --network for all"),
        ([hard, made("flip", metadata={"augmentation": {"strategy": "flip"}})], "give --augment for all"),
        (["bare.safetensors"], "give --data.dataset"),
        (["bare.safetensors", "--data.dataset=digits"], "does not name its network: give --network"),
        ([hard, "--network=convnet", "--network-options={depht: 1}"], "depht"),
        ([hard, "--network-options={depth: 1}"], "give network as well"),
        ([hard, "--data.val_fraction=0"], "give --data.val_fraction above 0"),
    ]
    for arguments, message in cases:
        assert message in refusal(capsys, "rank", *arguments), arguments
    prepared([hard, "wide.safetensors"], tmp_path, network="convnet", network_options=SMALL)
    prepared([hard, "flip.safetensors", made("classless", class_names=[])], tmp_path, augment="crop")
