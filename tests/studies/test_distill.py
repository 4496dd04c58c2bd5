"""``ftd distill`` and ``ftd_lightning.distill``: plans, what they run, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ftd_lightning
from ftd_lightning import SyntheticSet, cli
from ftd_lightning.data import decoding as decoded_cache
from ftd_lightning.data import get_dataset
from ftd_lightning.models import build_network
from ftd_lightning.shipped_configs import read_config
from ftd_lightning.studies import distill as command
from ftd_lightning.studies import distill as distill_plan
from ftd_lightning.studies.distill import (
    Costs,
    Estimate,
    Plan,
    Sizes,
    Survey,
    depth_of,
    make_plan,
    measure,
    planned_sizes,
)
from ftd_lightning.studies.fits import TimeSlice
from ftd_lightning.studies.tables import is_better

CPU = torch.device("cpu")
NAMES = tuple("abcdefghij")
DIGITS = Survey(NAMES, channels=1, size=8, counts=(143,) * 9 + (146,), tests=(36,) * 10, val_fraction=0.1)
CIFAR = Survey(NAMES, channels=3, size=32, counts=(5000,) * 10, tests=(1000,) * 10, val_fraction=0.02)


@pytest.fixture
def fixed_costs(monkeypatch):
    """A machine that takes as long for every image of a size; give what it was asked."""
    asked = []

    def costs(sizes: Sizes, augment, rho, device) -> Costs:
        asked.append(sizes)
        image = 2e-3 * sizes.channels / 3 * (sizes.size / 32) ** 2 * sizes.width / 32  # as a ConvNet on one core
        batch = image * sizes.batch
        return Costs(
            (2 if rho else 1) * batch, batch, 2 * image * sizes.inner_batch, image * sizes.inner_batch, batch / 3
        )

    monkeypatch.setattr(distill_plan, "measure", costs)
    return asked


@pytest.mark.parametrize("found", [DIGITS, CIFAR])
@pytest.mark.parametrize("minutes", [8, 30, 600])
@pytest.mark.parametrize("ipc", [1, 10])
def test_a_plan_fits_its_budget_and_the_teachers(found, minutes, ipc, fixed_costs):
    plan, estimate = make_plan(found, ipc, "ftd", minutes, CPU)
    assert 0.2 * 60 * minutes < estimate.total <= 60 * minutes or plan.iterations == 5000
    assert plan.max_start_epoch + plan.expert_epochs <= plan.epochs
    assert plan.teachers >= 2
    assert plan.iterations >= 50
    assert plan.syn_batch is None or plan.syn_batch < ipc * found.classes
    assert plan.image_size <= found.size
    assert plan.image_size % 2**plan.depth == 0
    assert (plan.max_per_class or found.per_class) >= 20


def test_more_minutes_make_more_of_everything(fixed_costs):
    little, much = (make_plan(CIFAR, 1, "ftd", minutes, CPU)[0] for minutes in (30, 600))
    assert little.max_per_class < (much.max_per_class or CIFAR.per_class)
    assert little.teachers * little.epochs * little.max_per_class < much.teachers * much.epochs * 5000
    assert little.iterations <= much.iterations


def test_a_method_decides_the_teachers(fixed_costs):
    flat, plain = (make_plan(DIGITS, 1, method, 6, CPU)[0] for method in ("ftd", "mtt"))
    assert (flat.rho, plain.rho) == (0.01, 0.0)


def test_what_cannot_be_planned_is_refused(fixed_costs, refused):
    with refused("--minutes 6: too few for these images on this device; try 8"):
        make_plan(CIFAR, 10, "ftd", 6, CPU)
    with refused("--method dm: plans are made for ftd and mtt"):
        make_plan(DIGITS, 1, "dm", 6, CPU)
    with refused("--ipc 130: class a has 129 training images that are not held out; give --ipc 129 at most"):
        DIGITS.check_ipc(130)
    with refused("--data.image_size 60: the ConvNet of a plan halves its images 4 times; give 64"):
        make_plan(CIFAR._replace(size=60, size_asked=True), 1, "ftd", 30, CPU)


@pytest.mark.parametrize("minutes", [0.5, 1, 2, 3])
def test_more_minutes_than_were_given_are_asked_for(minutes, fixed_costs, refused):
    with refused(f"--minutes {minutes:g}: too few for these images on this device; try ") as caught:
        make_plan(CIFAR, 10, "ftd", minutes, CPU)
    asked = int(str(caught.value).rpartition(" ")[2])
    assert asked > minutes
    make_plan(CIFAR, 10, "ftd", asked, CPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_network_can_be_built_for_every_size_that_is_tried(device):
    largest, built = 64 if device == "cpu" else 128, set()
    for native in range(8, 301):
        for channels in (1, 3):
            sizes = planned_sizes(CIFAR._replace(channels=channels, size=native), torch.device(device))
            assert sizes[0] == pytest.approx(min(native, largest), rel=0.25)
            built |= {(channels, size) for size in sizes}
    for channels, size in built:
        with torch.device("meta"):
            build_network("convnet", channels, 10, size, depth=depth_of(size), width=1)
    asked = CIFAR._replace(size=32, size_asked=True)
    assert planned_sizes(asked, torch.device(device)) == [32]


def test_networks_on_real_images_are_trained_to_their_end_where_there_is_time(fixed_costs):
    few = CIFAR._replace(counts=(5,) * 60, tests=(2,) * 60, names=tuple(map(str, range(60))))
    for found, minutes in ((few, 30), (DIGITS, 8), (DIGITS, 30)):
        plan, _ = make_plan(found, 1, "ftd", minutes, CPU)
        part = (plan.real_per_class or found.per_class) / found.per_class
        steps = plan.real_epochs * -(-int((1 - plan.val_fraction) * found.train * part) // plan.batch_size)
        assert steps >= 360, (minutes, plan)


def test_a_plan_leaves_enough_images_to_begin_with(fixed_costs):
    plan, _ = make_plan(CIFAR, 50, "ftd", 60, CPU)
    assert plan.max_per_class is not None
    assert plan.max_per_class - round(plan.val_fraction * plan.max_per_class) >= 50


def test_a_plan_writes_ten_checkpoints(fixed_costs):
    plan, _ = make_plan(DIGITS, 1, "ftd", 8, CPU)
    assert plan.iterations_per_epoch == plan.iterations // 10


def test_costs_are_measured_on_this_device():
    costs = measure(Sizes(1, 8, 10, 4, 1, 8, 10), ftd_lightning.functional.Augmentation("flip"), 0.01, CPU)
    assert all(0 < seconds < 5 for seconds in costs)


TINY = Plan(
    image_size=8, max_per_class=None, val_fraction=0.1, batch_size=32, width=4, depth=1, augment="crop_scale_rotate",
    teachers=2, epochs=3, lr=0.05, rho=0.01, expert_epochs=1, max_start_epoch=2, syn_steps=2, syn_batch=None,
    lr_images=30.0, iterations=3, iterations_per_epoch=1, decay=0.9, networks=2, evaluation_epochs=12, real_epochs=4,
    real_per_class=None,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Plans that take seconds, in an empty folder; give how often one was made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = []

    def plan(found, ipc, method, minutes, device):
        made.append(found)
        return replace(TINY, rho=0.01 if method == "ftd" else 0.0), Estimate(1.0, 2.0, 3.0)

    monkeypatch.setattr(command, "make_plan", plan)
    return made


def write_digits(folder: Path, count: int = 20) -> None:
    images, labels = get_dataset("digits").load()["train"]
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index, image in enumerate(images[labels == label][:count]):
            Image.fromarray((image[0] * 255).byte().numpy()).save(folder / str(label) / f"{index}.png")


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", *arguments])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


COMMAND = {"ipc": 1, "method": "ftd", "minutes": 6.0, "config": None, "seed": 0}


def test_a_folder_is_decoded_once_at_the_size_of_the_plan(tiny, image_folder, tmp_path, monkeypatch, capsys):
    image_folder(tmp_path / "photos", ["cat", "dog"], count=10, size=(18, 12))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    decode, sizes = decoded_cache.decode, []

    def noted(*args, size, **options):
        sizes.append(size)
        return decode(*args, size=size, **options)

    monkeypatch.setattr(decoded_cache, "decode", noted)
    source = command.find_source("photos")
    for _ in range(2):
        command.plan_job(source, Path("out"), COMMAND, [])
    assert sizes == [8]
    assert len(tiny) == 1
    lines = capsys.readouterr().out.splitlines()
    squashed = "images become 8 x 8 px: 20 of 20 are squashed, aspect ratio changed by up to 1.50"
    assert lines[:4] == [
        "photos: 20 images of 18 x 12 px in colour; 2 classes of 10 each",
        "16 training images, 4 test images",
        "warning: few test images, 2 in the smallest class: an accuracy is uncertain by 25 points; add some",
        f"{squashed}; --data.image_size asks for another size",
    ]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    options = ["--data.image_size", "16", "--data.val_fraction=0.5", "--data.test_fraction", "0.1"]
    command.plan_job(source, Path("other"), COMMAND, options)
    assert tiny[1] == Survey(("cat", "dog"), 3, 16, (9, 9), (1, 1), 0.5, size_asked=True)
    assert {path.name for path in tmp_path.joinpath("photos").iterdir()} == {"cat", "dog"}


def test_a_class_that_is_smaller_than_ipc_is_refused_at_once(tiny, image_folder, tmp_path, capsys):
    """The number is what is left after the test part and the held-out one: 8 images, 6 in training, 5 not held out."""
    image_folder(tmp_path / "photos", ["cat", "dog"], count=20)
    image_folder(tmp_path / "photos", ["emu"], count=8)
    for further in (["--minutes", "8"], ["--config", "digits/distill_ftd_ipc1"]):
        line = refusal(capsys, "photos", "--ipc", "6", "--out", "out", *further)
        assert "--ipc 6: class emu has 5 training images that are not held out; give --ipc 5 at most" in line
    assert tiny == []
    assert not Path("out").exists()
    line = refusal(capsys, "photos", "--ipc", "6", "--out", "out", "--data.sise", "3")
    assert line.count("sise") == 1


@pytest.mark.slow
def test_a_folder_becomes_a_set(tiny, capsys, monkeypatch):
    write_digits(Path("pictures"))
    arguments = ["distill", "pictures", "--ipc", "1", "--out", "out", "--minutes", "6"]
    with monkeypatch.context() as patch:
        patch.setattr(TimeSlice, "left", lambda self: -1 if list(Path("out").rglob("evaluation.json")) else 1)
        cli.main([*arguments, "--stop-after", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == "not done: run the same command again"
    assert not Path("out/results.json").exists()
    cli.main(arguments)
    out = capsys.readouterr().out
    assert "pictures: 200 images of 8 x 8 px in grey; 10 classes of 20 each\n160 training images, 40 test images" in out
    assert "[1/5] random: evaluation: done before, in " in out
    assert "[2/5] teachers ftd\n" in out
    assert "real images (140, 4 epochs, not trained to their end)" in out
    assert "Measured on 40 test images: an accuracy is uncertain by 7.9 points. Chance: 10.0 %." in out
    assert "plan for 6 minutes on " in out
    assert len(tiny) == 1, "a plan is made once"
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["accuracy"]) == ["random", "ftd", "real"]
    worse = "FTD, 1 per class is not better than random real images, 1 per class: " in out.splitlines()[-1]
    assert worse != is_better(results["difference"]["ftd"])
    assert all(set(value) == {"mean", "std", "n"} for value in results["accuracy"].values())
    assert (results["dataset"], results["ipc"]) == ("folder", 1)
    synthetic = SyntheticSet.load("out/set.safetensors")
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.ema_images is not None
    assert synthetic.metadata["iterations"] == 3
    assert np.asarray(Image.open("out/images.png")).ndim == 3
    teacher = read_config(Path("out/configs/teacher.yaml"))
    assert teacher["model"]["init_args"]["teachers"] == 2
    assert teacher["data"]["init_args"]["root"] == "pictures"

    times = {path: path.stat().st_mtime_ns for path in Path("out/fits").rglob("wall_time.json")}
    assert len(times) == 5
    cli.main(arguments)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "what is done is not done again"
    changed = refusal(capsys, *arguments[1:-1], "7")
    assert changed == "ftd: error: out: was begun with another minutes 6.0; name another folder"
    next(Path("pictures/3").iterdir()).unlink()
    changed = refusal(capsys, *arguments[1:])
    assert changed == "ftd: error: out: the images of pictures have changed since it was begun; name another folder"


@pytest.mark.slow
def test_anybodys_datasets_become_a_set(tiny, tmp_path):
    images, labels = get_dataset("digits").load()["train"]
    train, test = (images[:300], labels[:300]), (images[300:400], labels[300:400])
    synthetic = ftd_lightning.distill(
        train, test, ipc=2, method="mtt", out="out", class_names=list("abcdefghij"), batch_size=16
    )
    assert synthetic.images.shape == (20, 1, 8, 8)
    assert synthetic.ema_images is None
    assert tuple(synthetic.class_names) == tuple("abcdefghij")
    assert read_config(next(Path("out/fits").glob("teacher_*/config.yaml")))["data"]["init_args"]["batch_size"] == 16
    counts, tests = (tuple(part.bincount().tolist()) for part in (labels[:300], labels[300:400]))
    assert tiny == [Survey(tuple("abcdefghij"), 1, 8, counts, tests, 0.1)]
    assert list(json.loads(Path("out/results.json").read_text())["accuracy"]) == ["random", "mtt", "real"]
    again = ftd_lightning.distill(
        train, test, ipc=2, method="mtt", out="out", class_names=list("abcdefghij"), batch_size=16
    )
    assert torch.equal(again.images, synthetic.images)
    assert len(tiny) == 1


def test_a_plan_holds_numbers_and_no_program(tiny, refused):
    write_digits(Path("pictures"), count=5)
    asked = {"ipc": 1, "method": "ftd", "minutes": 6.0, "config": None, "seed": 0}
    file, config = Path("out/plan.json"), Path("out/configs/teacher.yaml")

    def plan():
        return command.plan_job(command.find_source("pictures"), Path("out"), asked, [])

    rows = plan().rows
    content, text = json.loads(file.read_text()), config.read_text()
    file.write_text(json.dumps({**content, "comparison": {"evaluate": "canary.yaml"}}))
    config.write_text(text.replace("ftd_lightning.FlatTeacher", "canary.Net"))
    assert plan().rows == rows
    assert config.read_text() == text
    file.write_text(json.dumps({"command": content["command"], "comparison": {}}))  # as version 0.2 wrote it
    with refused("plan.json: is not a plan of this version"):
        plan()
    for value in ("canary.Net", {"class_path": "canary.Net"}):
        file.write_text(json.dumps({**content, "plan": {**content["plan"], "width": value}}))
        with refused("plan.json: is not a plan, its width is"):
            plan()


def test_published_settings_are_taken_for_a_name(tiny, capsys):
    job = command.plan_job(
        command.find_source("digits"),
        Path("out"),
        {**COMMAND, "minutes": None},
        [],
    )
    assert tiny == []
    assert "plan: the settings of distill_ftd_ipc1, evaluate, teacher_ftd, as published" in capsys.readouterr().out
    assert list(job.rows) == ["random", "ftd", "real"]
    teachers, distillation, evaluation = job.steps(job.rows["ftd"])
    assert (teachers.config.stem, distillation.config.stem) == ("teacher_ftd", "distill_ftd_ipc1")
    assert "true" in evaluation.arguments[evaluation.arguments.index("--data.ema") + 1]
    command.plan_job(
        command.find_source("digits"),
        Path("dm"),
        {**COMMAND, "minutes": None, "method": "dm"},
        [],
    )
    assert "the settings of distill_dm, evaluate, as published" in capsys.readouterr().out


def test_bad_input_is_one_line(tiny, capsys, refused):
    Path("file.png").write_text("")
    Path("full").mkdir()
    Path("full/other").write_text("")
    common = ["--ipc", "1", "--out", "out"]
    wrong = "no such folder, and no data set of that name"
    assert refusal(capsys, "digts", *common).endswith(f"error: digts: {wrong}; did you mean digits?")
    assert refusal(capsys, "nowhere", *common).endswith(f"error: nowhere: {wrong}")
    assert "no such folder; give a folder of classes, or one of cifar10" in refusal(capsys, "no/folder", *common)
    assert "file.png: is a file" in refusal(capsys, "file.png", *common)
    assert "full: is not empty and holds no plan.json" in refusal(capsys, "digits", "--ipc", "1", "--out", "full")
    assert "ipc=0 must be at least 1" in refusal(capsys, "digits", "--ipc", "0", "--out", "out")
    assert "minutes=0.0 must be above 0" in refusal(capsys, "digits", *common, "--minutes", "0")
    line = refusal(capsys, "digits", *common, "--minutes", "3", "--config", "digits/distill_ftd_ipc1")
    assert "--config names all settings; leave out --minutes" in line
    assert "no such config; did you mean digits/distill_ftd_ipc1" in refusal(
        capsys, "digits", *common, "--config", "digits/distill_ftd_ipc"
    )
    assert not Path("out").exists()
    pair = torch.zeros(4, 1, 8, 8), torch.arange(4) % 2
    for option in ("transform", "root", "synthetic"):
        with refused(f"distill: leave {option}= out"):
            ftd_lightning.distill(pair, pair, **{option: None})
