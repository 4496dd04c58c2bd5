"""``ftd distill`` and ``ftd_lightning.distill``: plans, what they run, and what is refused."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fits import refusal
from PIL import Image

import ftd_lightning
from ftd_lightning import SyntheticSet, cli
from ftd_lightning.command_line import parse_command
from ftd_lightning.data import decoding
from ftd_lightning.models import build_network
from ftd_lightning.shipped_configs import read_config
from ftd_lightning.studies import distill as command
from ftd_lightning.studies.compare import run_rows
from ftd_lightning.studies.distill import Survey, buildable_size, depth_of, find_source, plan_configs, plan_job
from ftd_lightning.studies.fits import Deadline
from ftd_lightning.studies.tables import is_better

NAMES = tuple("abcdefghij")
DIGITS = Survey(NAMES, channels=1, size=8, train=(143,) * 9 + (146,), test=(36,) * 10, val_fraction=0.1)
CIFAR = Survey(NAMES, channels=3, size=32, train=(5000,) * 10, test=(1000,) * 10, val_fraction=0.1)
COMMAND = {"ipc": 1, "method": "ftd", "minutes": 6.0, "config": None, "seed": 0}
# Fits that take seconds.
TINY = [
    *("--model.network_options={width: 4, depth: 1}", "--trainer.enable_progress_bar=false"),
    *("--teacher.model.teachers=2", "--teacher.model.epochs=3", "--distill.model.max_start_epoch=1"),
    *("--distill.model.syn_steps=2", "--distill.trainer.max_steps=3", "--evaluate.model.networks=2"),
    "--evaluate.trainer.max_epochs=12",
]


@pytest.fixture
def tiny(here, monkeypatch, in_process):
    """Run fits in this process; give the runner."""
    run_job = command.run_job
    monkeypatch.setattr(command, "run_job", lambda *given: run_job(*given, in_process))
    return in_process


def planned(found, tmp_path, *, gpu=False, **changes):
    """Give the contents of the configs of a plan, by phase, and the settings on real images."""
    configs, real, size = plan_configs(found, {"dataset": "digits"}, tmp_path, {**COMMAND, **changes}, gpu=gpu)
    named = dict(zip(("distill", "evaluate", "teacher"), configs, strict=True))
    contents = {phase: read_config(Path(of.config)) for phase, of in named.items() if of is not None}
    assert all(content["data"]["init_args"]["image_size"] == size for content in contents.values())
    return contents, real


@pytest.mark.parametrize("found", [DIGITS, CIFAR])
@pytest.mark.parametrize("minutes", [8, 600])
@pytest.mark.parametrize("method", ["ftd", "mtt", "rat-bptt"])
def test_a_plan_has_the_settings_of_its_method(found, minutes, method, tmp_path):
    contents, real = planned(found._replace(size=2 * found.size), tmp_path, minutes=minutes, method=method)
    largest = 32 if minutes == 8 else 128
    assert contents["evaluate"]["data"]["init_args"]["image_size"] == min(2 * found.size, largest)
    model = {phase: content["model"]["init_args"] for phase, content in contents.items()}
    assert ("teacher" in contents) == (method != "rat-bptt")
    if "teacher" in contents:
        assert model["teacher"]["rho"] == {"ftd": 0.01, "mtt": 0.0}[method]
        assert model["distill"]["max_start_epoch"] + model["distill"]["expert_epochs"] <= model["teacher"]["epochs"]
        assert contents["teacher"]["data"] == contents["distill"]["data"]
        assert model["teacher"]["precision"] == "auto"
        assert model["teacher"].get("compile") == (True if minutes > 8 else None)
    averaged = "SyntheticEMA" in str(contents["distill"]["trainer"]["callbacks"])
    assert averaged == (method != "mtt")
    part = contents["distill"]["data"]["init_args"].get("max_per_class")
    assert (part or 5000) >= 20
    assert real.data == ({} if part is None else {"max_per_class": part})


@pytest.mark.parametrize("method", ["ftd", "rat-bptt"])
@pytest.mark.parametrize("early", [0, 20])
def test_a_job_ends_in_its_time_whatever_its_fits_take(method, early, here, monkeypatch):
    """A fit takes the seconds it is given, and those of its start; evaluations may end ``early`` and leave theirs."""
    clock, began = [1000.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    job = plan_job(find_source("digits"), Path("out"), {**COMMAND, "method": method, "minutes": 8}, [])
    fits = {fit.folder: fit for row in job.rows for fit in job.fits_of(row).each()}

    def run(arguments, log, seconds):
        fit = fits[log.parent]
        began.setdefault(fit.config.stem, clock[0] - 1000)
        given = json.loads(arguments[-1].removeprefix("--trainer.max_time="))["seconds"]
        clock[0] += given + command.START - (early if fit.config.stem == "evaluate" else 0)
        (fit.folder / fit.output).parent.mkdir(exist_ok=True)
        (fit.folder / fit.output).touch()
        return 0

    given = {**COMMAND, "method": method, "minutes": 8}
    run_rows(job, list(job.rows), Deadline(None), run, command.time_limits(job, given, Deadline(8)))
    assert 480 - 2 * command.START - early <= clock[0] - 1000 <= 480
    assert list(began) == ["evaluate", *(["teacher"] if method == "ftd" else []), "distill"], "random images come first"
    assert began["distill"] < 240, "the set is being written at half of the budget"


def test_networks_on_real_images_are_trained_until_they_level_off(tmp_path, capsys):
    few = DIGITS._replace(train=(8,) * 60, test=(2,) * 60, names=tuple(map(str, range(60))))
    for found in (few, DIGITS, CIFAR):
        contents, real = planned(found, tmp_path)
        used = sum(min(count, real.data.get("max_per_class", count)) for count in found.train)
        steps = -(-int((1 - found.val_fraction) * used) // contents["evaluate"]["data"]["init_args"]["batch_size"])
        assert real.model["patience"] * real.model["measure_every"] * steps >= 360
        assert real.trainer["max_epochs"] >= 10 * real.model["patience"] * real.model["measure_every"]
    assert "no images are held out" not in capsys.readouterr().out
    _, real = planned(few._replace(train=(4,) * 60), tmp_path)
    assert (real.model, real.trainer) == ({"networks": 2, "measure_every": 0}, {"max_epochs": 45})
    assert "real images until 360 steps, as no images are held out" in capsys.readouterr().out


def test_a_network_can_be_built_for_every_size():
    for channels in (1, 3):
        for size in {buildable_size(channels, native) for native in range(8, 301)}:
            with torch.device("meta"):
                build_network("convnet", channels, 10, size, depth=depth_of(size), width=1)
    assert all(buildable_size(3, native) == pytest.approx(native, rel=0.25) for native in range(8, 301))


def test_what_cannot_be_planned_is_refused(tmp_path, refused):
    with refused("--method dm: plans are made for ftd, mtt, rat-bptt"):
        planned(DIGITS, tmp_path, method="dm")
    with refused("--data.image_size 60: its ConvNet halves images 4 times; give 64"):
        planned(CIFAR._replace(size=60, asked=True), tmp_path)
    with refused("--data.image_size [60, 90]: its ConvNet halves images 4 times; give [64, 96]"):
        planned(CIFAR._replace(size=(60, 90), asked=True), tmp_path)


def test_a_folder_is_decoded_once_at_the_size_of_the_plan(here, image_folder, monkeypatch, capsys, refused):
    image_folder(here / "photos", ["cat", "dog"], count=10, size=(48, 40))
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    decode, sizes = decoding.decode, []

    def noted(*args, size, **options):
        sizes.append(size)
        return decode(*args, size=size, **options)

    monkeypatch.setattr(decoding, "decode", noted)
    config, texts = Path("out/configs/teacher.yaml"), []
    for _ in range(2):
        plan_job(find_source("photos"), Path("out"), COMMAND, [])
        texts.append(config.read_text())
        config.write_text("model: canary.Net")  # configs are programs: they are written again, not read
    assert texts[0] == texts[1]
    assert sizes == [32]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "photos: 20 images of 48 x 40 px in colour; 2 classes of 10 each",
        "16 training images, 4 test images",
        "warning: few test images, 2 in the smallest class: an accuracy is uncertain by 25 points; add some",
    ]
    reduced = "images are reduced to 32 x 32 px; more --minutes allow larger ones, or give --data.image_size"
    assert reduced in lines
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    options = ["--data.image_size", "16", "--data.val_fraction=0.5", "--data.test_fraction", "0.1"]
    job = plan_job(find_source("photos"), Path("other"), COMMAND, options)
    written = read_config(Path(job.evaluate.config))["data"]["init_args"]
    assert (written["image_size"], written["val_fraction"], written["test_fraction"]) == (16, 0.5, 0.1)
    for out in ("photos/out", "photos/cat/out"):
        with refused(out, "is among the images of"):
            plan_job(find_source("photos"), Path(out), COMMAND, [])
    assert {path.name for path in Path("photos").iterdir()} == {"cat", "dog"}


def test_a_class_that_is_smaller_than_ipc_is_refused_at_once(here, image_folder, capsys):
    """The number is what is left after the test part and the held-out one: 8 images, 6 in training, 5 not held out."""
    image_folder(here / "photos", ["cat", "dog"], count=20)
    image_folder(here / "photos", ["emu"], count=8)
    for further in (["--minutes", "8"], ["--config", "digits/distill_ftd_ipc1"]):
        line = refusal(capsys, "distill", "photos", "--ipc", "6", "--out", "out", *further)
        assert "--ipc=6: class emu has 5 images to train on; this works: [6,6,5]" in line
    assert not Path("out").exists()
    assert "sise" in refusal(capsys, "distill", "photos", "--ipc", "6", "--out", "out", "--data.sise", "3")


def test_unequal_classes_get_what_is_asked_for_each(here, image_folder, tmp_path):
    tail = DIGITS._replace(train=(500, 400, *(100,) * 7, 6))
    assert (DIGITS.resolved("auto"), tail.resolved("auto")) == (1, [4, 4, *[1] * 8])
    assert planned(tail, tmp_path, ipc=[4, 4, *[1] * 8])[0]["distill"]["model"]["init_args"]["lr_images"] == 38.0
    for classes, count in (("cat", 20), ("emu", 6)):
        image_folder(here / "photos", [classes], count=count)
    for given, ipc in (("3,2", [3, 2]), ("[3, 2]", [3, 2]), ("auto", 1)):
        parsed = parse_command(command.distill_source, "distill", ["photos", "--ipc", given, "--out", "out"])
        job = plan_job(find_source("photos"), Path(f"out {given}"), {**COMMAND, "ipc": parsed["ipc"]}, [])
        assert job.ipc == ipc
        assert read_config(Path(job.rows["ftd"].distill.config))["model"]["init_args"]["ipc"] == ipc
        assert f"--data.ipc={ipc}" in next(iter(job.fits_of("random").evaluations.values())).options
    assert (job.title, job.rows["ftd"].label) == ("photos, 1 image per class", "FTD, 1 per class")


def write_digits(folder: Path, count: int = 20) -> None:
    data = ftd_lightning.DistillationDataModule("digits", val_fraction=0)
    pictures, labels = data.transform.invert(data.train.images), data.train.labels
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index, image in enumerate(pictures[labels == label][:count]):
            values = (image[0].clamp(0, 1) * 255).round().numpy().astype(np.uint8)
            Image.fromarray(values).save(folder / str(label) / f"{index}.png")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ftd", "rat-bptt"])
def test_a_folder_becomes_a_set(method, tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = {"ftd": "rat-bptt", "rat-bptt": "ftd"}[method]
    write_digits(Path("pictures"))
    arguments = ["distill", "pictures", "--ipc", "1", "--method", method, "--out", "out", "--minutes", "6"]
    steps = [option for option in TINY if method == "ftd" or "max_start" not in option]
    arguments += [*steps, *(["--distill.model.window=1"] if method != "ftd" else [])]
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "remaining", lambda self: 0 if list(Path("out").rglob("evaluation.json")) else None)
        cli.main([*arguments, "--stop-after", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == "not done: run the same command again"
    assert not Path("out/results.json").exists()
    cli.main(arguments)
    out = capsys.readouterr().out
    assert "pictures: 200 images of 8 x 8 px in grey; 10 classes of 20 each\n160 training images, 40 test images" in out
    assert "random real images, 1 per class: evaluation: done before, in " in out
    assert "Measured on 40 test images: an accuracy is uncertain by 7.9 points. Chance: 10.0 %." in out
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["accuracy"]) == ["random", method, "real"]
    worse = out.splitlines()[-1].startswith("The set is not clearly better than random images: ")
    assert worse != is_better(results["difference"][method])
    assert out.endswith(f"name another --out and give --minutes 24, a larger --ipc, a GPU or --method {other}.\n")
    assert (results["dataset"], results["ipc"]) == ("folder", 1)
    synthetic = SyntheticSet.load("out/set.safetensors")
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.ema_images is not None
    assert synthetic.metadata["iterations"] == 3
    assert np.asarray(Image.open("out/images.png")).ndim == 3

    done = len(tiny.commands)
    cli.main(arguments)
    assert len(tiny.commands) == done, "what is done is not done again"
    assert "out: was created with --ipc 1; name another folder" in refusal(
        capsys, *("2" if part == "1" else part for part in arguments)
    )
    next(Path("pictures/3").iterdir()).unlink()
    changed = refusal(capsys, *arguments)
    assert changed == "ftd: error: out: the images of pictures have changed since it was begun; name another folder"


@pytest.mark.slow
def test_a_budget_in_which_no_teacher_ends_is_told(tiny, capsys):
    arguments = ["digits", "--ipc", "1", "--out", "out", "--minutes", "0.02", *TINY, "--teacher.model.epochs=1000"]
    said = refusal(capsys, "distill", *arguments)
    assert "teachers ftd: ended before it had a result (see out/fits/teacher_ftd_" in said
    assert said.endswith("or --method rat-bptt, which has no teachers")
    assert [arguments[2].rpartition("/")[2] for arguments in tiny.commands] == ["evaluate.yaml", "teacher.yaml"]


@pytest.mark.slow
def test_anybodys_datasets_become_a_set(tiny, monkeypatch):
    data = ftd_lightning.DistillationDataModule("digits", val_fraction=0)
    images, labels = data.transform.invert(data.train.images).clamp(0, 1), data.train.labels
    train, test = (images[:300], labels[:300]), (images[300:400], labels[300:400])
    plan = command.plan_job
    monkeypatch.setattr(command, "plan_job", lambda *given: plan(*given[:3], [*given[3], *TINY]))
    options = {"ipc": (2,) * 10, "method": "mtt", "out": "out", "class_names": NAMES, "batch_size": 16}
    options |= {"image_size": 48, "batch": None}  # more than a plan of 30 minutes has by itself
    synthetic = ftd_lightning.distill(train, test, **options)
    assert synthetic.images.shape == (20, 1, 48, 48)
    assert synthetic.ema_images is None
    assert tuple(synthetic.class_names) == NAMES
    saved = yaml.safe_load(next(Path("out/fits").glob("teacher_*/config.yaml")).read_text())
    assert (saved["data"]["init_args"]["batch_size"], saved["data"]["init_args"]["image_size"]) == (16, 48)
    assert list(json.loads(Path("out/results.json").read_text())["accuracy"]) == ["random", "mtt", "real"]
    done = len(tiny.commands)
    assert torch.equal(ftd_lightning.distill(train, test, **options).images, synthetic.images)
    assert len(tiny.commands) == done


def test_published_settings_are_taken_from_a_config(here, capsys):
    def planned_from(config, **changes):
        return plan_job(
            find_source("digits"), Path("out") / config, {**COMMAND, **changes, "minutes": None, "config": config}, []
        )

    job = planned_from("digits/distill_ftd_ipc1")
    assert "as published" in capsys.readouterr().out
    assert list(job.rows) == ["random", "ftd", "real"]
    teachers, distillation, evaluation = job.fits_of("ftd").each()
    assert (teachers.config.stem, distillation.config.stem) == ("teacher_ftd", "distill_ftd_ipc1")
    assert "--data.ema=true" in evaluation.options
    job = planned_from("digits/distill_dm", method="dm")
    assert [fit.config.stem for fit in job.fits_of("dm").each()] == ["distill_dm", "evaluate"]
    assert job.rows["dm"].label == "distill_dm, 1 per class"


def test_bad_input_is_one_line(here, capsys, refused):
    Path("full").mkdir()
    Path("full/other").write_text("")
    common = ["--ipc", "1", "--out", "out"]
    wrong = "no such folder, and no data set of that name"
    assert refusal(capsys, "distill", "digts", *common).endswith(f"error: digts: {wrong}; did you mean digits?")
    assert f"no/folder: {wrong}; did you mean cifar10" in refusal(capsys, "distill", "no/folder", *common)
    assert "full: is not empty and holds no plan.json" in refusal(
        capsys, "distill", "digits", "--ipc", "1", "--out", "full"
    )
    line = refusal(capsys, "distill", "digits", *common, "--minutes", "3", "--config", "digits/distill_ftd_ipc1")
    assert "--config names all settings; leave out --minutes" in line
    assert not Path("out").exists()
    pair = torch.zeros(4, 1, 8, 8), torch.arange(4) % 2
    for option in ("transform", "root", "synthetic"):
        with refused(f"distill() does not accept {option}="):
            ftd_lightning.distill(pair, pair, **{option: None})
