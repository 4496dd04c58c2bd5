"""``ftd distill`` and ``ftd_lightning.distill``: anybody's images distilled within a budget of minutes."""

from __future__ import annotations

import difflib
import json
import math
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser

from ftd_lightning.bounds import check_bounds
from ftd_lightning.command_line import parse_command, with_values
from ftd_lightning.core.evaluation import REAL_STEPS
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.data.folder import PARTS
from ftd_lightning.data.in_memory import read_datasets, write_images_file
from ftd_lightning.data.splits import share_of
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import read_json, replacing, write_json
from ftd_lightning.functional.selection import Ipc, images_per_class
from ftd_lightning.shipped_configs import find_config, read_config
from ftd_lightning.sizes import as_size, plain, sides, size_text
from ftd_lightning.studies.compare import run_rows, write_results
from ftd_lightning.studies.comparison import Comparison, Row, Teachers
from ftd_lightning.studies.fits import PHASES, WHERE, Deadline, Settings, UnfinishedError, run_child, split_by_phase
from ftd_lightning.studies.reproduce import Published, belonging
from ftd_lightning.studies.tables import copy_set, short_table, summarize, verdict

if TYPE_CHECKING:
    from ftd_lightning.sizes import ImageSize
    from ftd_lightning.studies.fits import Fit, Runner

PLAN = "plan.json"
MINUTES = 30.0  # if none are given
METHODS: dict[str, float | None] = {"ftd": 0.01, "mtt": 0.0, "rat-bptt": None}  # rho of the teachers; FTD, Table 7
TEACHING = 0.45  # of the time for teachers and distillation
EVALUATING, REFERENCE = 0.1, 0.25  # shares of the budget: a set's evaluation, and training on real images
START = 8.0  # seconds in which a fit starts, and measures test images
PATIENCE = 8  # measurements of held-out images
COMPILED = 15  # minutes from which compiling teachers repays: half a minute, for passes twice as fast
TEACHER_STEPS = 400  # of each teacher at least, where 40 epochs give so many
VALUES = 120_000  # of real images per minute of the budget, for one CPU core: 40 images of 32 x 32 px
SPEED = 1.8e6  # values of images per second that a network learns from on one CPU core
GPU = 30  # times as fast
RAT_BPTT = "cifar10/distill_rat_bptt_w32_ipc1"  # whose settings a plan takes
EMA = {"decay": 0.99, "bias_correction": True}
AVERAGE = {"class_path": "ftd_lightning.callbacks.SyntheticEMA", "init_args": EMA}
# Nothing is chosen by measurements on the way, which take time.
UNMEASURED = {"class_path": "ftd_lightning.callbacks.EvaluateSynthetic", "init_args": {"every_n_epochs": 0}}
AUTO = 0.01  # share of the training images of each class that "--ipc auto" stands for
# Options of from_datasets that would contradict where distill() keeps the images.
FIXED = {"transform", "dataset", "root", "download", "test_fraction", "synthetic", "trajectories", "teacher"}


class Source(NamedTuple):
    """Images to distil: the data set's name, the folder of its files, and a title for people."""

    name: str
    root: str | None
    title: str


class Survey(NamedTuple):
    """Counts of the images."""

    names: tuple[str, ...]  # of the classes
    channels: int
    size: ImageSize  # their own or the one that is asked for
    train: tuple[int, ...]  # images of each class, those to be held out included
    test: tuple[int, ...]
    val_fraction: float  # share of the training images that is held out
    val: int = 0  # images that are held out beside them
    asked: bool = False  # whether the size was asked for

    def used(self, limit: int | None) -> tuple[int, int]:
        """Count the images that are trained on and those that are held out, at most ``limit`` of a class together."""
        kept = [min(count, limit or count) for count in self.train]
        held_out = sum(share_of(count, self.val_fraction) for count in kept)
        return sum(kept) - held_out, held_out + self.val

    def resolved(self, ipc: Ipc | str) -> Ipc:
        """Return ``ipc``, "auto" by the images that are not held out; more than a class has of these are refused."""
        left = [count - share_of(count, self.val_fraction) for count in self.train]
        if isinstance(ipc, str):
            shares = [max(round(AUTO * count), 1) for count in left]
            return shares if len(set(shares)) > 1 else shares[0]
        try:
            images_per_class(ipc, left, self.names)
        except InputError as error:
            raise InputError(f"--{error}") from error
        return ipc


def depth_of(size: ImageSize) -> int:
    """Give the depth of the ConvNet for images of a size: their shorter side ends with 4 values, or 2."""
    return min(max(round(math.log2(min(sides(size)))) - 2, 2), 5)


def buildable_size(channels: int, size: ImageSize) -> ImageSize:
    """Give a size for which the ConvNet of a plan can be built: this one, or the nearest that can be halved."""
    halved = 2 ** depth_of(size)
    # The network pads grey images of 28 px itself.
    return size if (channels, size) == (1, 28) else as_size([halved * max(round(s / halved), 1) for s in sides(size)])


def reference(steps: int, *, held_out: bool) -> Settings:
    """Settings of networks that are trained on real images, in epochs of so many steps, until they level off.

    Without held-out images they take a fixed number of steps.
    """
    every = math.ceil(REAL_STEPS / PATIENCE / steps) if held_out else 0
    epochs = 20 * PATIENCE * every or math.ceil(REAL_STEPS / steps)
    patience = {"patience": PATIENCE} if held_out else {}
    return Settings(model={"networks": 2, "measure_every": every, **patience}, trainer={"max_epochs": epochs})


def plan_configs(
    found: Survey, images: Mapping[str, Any], out: Path, command: Mapping[str, Any], *, gpu: bool
) -> tuple[Published, Settings, ImageSize]:
    """Plan a job within its budget, print the plan, and write it as configs into ``out/configs``.

    ``images`` are the options of the DataModule that find them.

    Returns:
        The configs, the settings of an evaluation on real images, and the size of the images.
    """
    ipc, method, seed, minutes = (command[key] for key in ("ipc", "method", "seed", "minutes"))
    if method not in METHODS:
        raise InputError(f"--method {method}: plans are made for {', '.join(METHODS)}; --config takes any other")
    speed = GPU if gpu else 1
    # Four times the minutes allow twice the size.
    most = 128 if speed * minutes >= 16 * MINUTES else 64 if speed * minutes >= 4 * MINUTES else 32
    size = buildable_size(found.channels, found.size if found.asked else min(*sides(found.size), most))
    if found.asked and size != found.size:
        why = f"its ConvNet halves images {depth_of(found.size)} times"
        raise InputError(f"--data.image_size {plain(found.size)}: {why}; give {plain(size)}")
    area = math.prod(sides(size))
    # Images of an inner step, iterations of an epoch, epochs of an evaluation at most.
    inner, often, most = (50, 20, 500) if area <= 32**2 else (20, 5, 300)
    classes, largest, rho = len(found.names), max(found.train), METHODS[method]
    each = images_per_class(ipc, found.train)
    total = sum(each)
    affordable = round(VALUES * minutes * speed / (found.channels * area * classes))
    least = max(20, math.ceil((max(each) + 0.5) / (1 - found.val_fraction)))  # the initial images are not held out
    per_class = min(max(affordable, least), largest)
    used, held_out = found.used(per_class)
    batch_size = images.get("batch_size") or int(min(max(2 ** round(math.log2(max(used, 80) / 10)), 8), 256))
    steps = math.ceil(used / batch_size)
    epochs = min(max(math.ceil(TEACHER_STEPS / steps), 8), 40)
    # As many networks, and epochs of each, as its share of the budget allows: 3 at least.
    epoch = max(total * found.channels * area / (SPEED * speed), 0.008)  # seconds
    affordable = math.floor(max(EVALUATING * 60 * minutes - START, START) / epoch)  # epochs of all networks
    on_sets = min(max(affordable // 3, 50), most)
    networks = min(max(affordable // on_sets, 3), 10)

    data = {"seed": seed, **images, "image_size": size, "val_fraction": found.val_fraction, "batch_size": batch_size}
    part = {"max_per_class": per_class} if per_class < largest else {}
    network: dict[str, Any] = {"network_options": {"width": 128 if gpu else 32, "depth": depth_of(size)}}
    # Without flips and colours for grey images, which are often characters.
    grey = f"crop_{'cutout_' * (min(sides(size)) >= 16)}scale_rotate"
    network["augment"] = {"strategy": grey if found.channels == 1 else "color_crop_cutout_flip_scale_rotate"}
    teachers: dict[str, Any] = {"teachers": 50, "epochs": epochs, "lr": 0.05, "rho": rho, "precision": "auto"}
    teachers |= {"compile": True} if minutes >= COMPILED else {}
    learned = {"ipc": ipc, "syn_batch": inner if inner < total else None, "iterations_per_epoch": often}
    if rho is None:
        shipped = read_config(find_config(RAT_BPTT))["model"]["init_args"]
        learned = {**shipped, "batch_real": 256, **network, **learned}
    else:
        learned |= {"augment": network["augment"], "trajectories": "runs/teacher/trajectories", "syn_steps": 15}
        learned |= {"expert_epochs": 2, "max_start_epoch": epochs // 2, "lr_step_size": 1e-4, "step_size_init": 0.05}
        learned |= {"lr_images": float(f"{30 * math.sqrt(area) / 8 * math.sqrt(total / classes):.2g}")}
    callbacks = [UNMEASURED] if method == "mtt" else [AVERAGE, UNMEASURED]
    evaluation = {"networks": networks, "measure_every": 0}

    def write(phase: str, module: str, model: dict[str, Any], images: dict[str, Any], **trainer: Any) -> Settings:
        content = {
            "seed_everything": seed % 2**32,
            "model": {"class_path": f"ftd_lightning.{module}", "init_args": {**model, "seed": seed}},
            "data": {"class_path": "ftd_lightning.DistillationDataModule", "init_args": {**data, **images}},
            "trainer": trainer,
        }
        file = out / "configs" / f"{phase}.yaml"
        with replacing(file) as temporary:
            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
            temporary.write_text(f"# From a plan of ftd distill: ftd fit --config {file}\n{text}", encoding="utf-8")
        return Settings(str(file))

    module = "modules.BilevelDistillation" if rho is None else "TrajectoryMatching"
    distillation = write("distill", module, learned, part, max_steps=5000, callbacks=callbacks)
    of_set = {"synthetic": "runs/distill/set.safetensors"}
    evaluate = write(
        "evaluate", "SyntheticEvaluation", {**network, **evaluation}, {**part, **of_set}, max_epochs=on_sets
    )
    teacher = None
    print(f"plan for {minutes:g} minutes: a ConvNet of depth {depth_of(size)}, {per_class} real images per class")
    learning = minutes * (1 - REFERENCE - 2 * EVALUATING)
    if rho is not None:
        teacher = write("teacher", "FlatTeacher", {**network, **teachers}, part, max_epochs=-1)
        print(f"  teachers      about {TEACHING * learning:.1f} min: as many of {epochs} epochs as end, rho {rho:g}")
        learning *= 1 - TEACHING
    print(f"  distillation  about {learning:.1f} min: {total} images of {size_text(size)}")
    until = "held-out accuracy levels off" if held_out else f"{REAL_STEPS} steps, as no images are held out"
    print(f"  evaluations   the rest: {networks} networks on each set; real images until {until}")
    if area < math.prod(sides(found.size)):
        print(f"images are reduced to {size_text(size)}; more --minutes allow larger ones, or give --data.image_size")
    return Published(distillation, evaluate, teacher), reference(steps, held_out=held_out > 0).having(data=part), size


def find_source(source: str) -> Source:
    """Find images: a folder of classes, which wins, or a data set by its name; others raise InputError."""
    path, names = Path(source), DATASETS.keys() - {"folder", "images"}
    if path.is_dir():
        return Source("folder", str(path), path.resolve().name)
    if source in names:
        return Source(source, None, source)
    near = difflib.get_close_matches(source.lower(), names, n=3) or sorted(names)
    raise InputError(f"{source}: no such folder, and no data set of that name; did you mean {', '.join(near)}?")


def _data_options(overrides: Sequence[str]) -> dict[str, Any]:
    """Read the options of the images that are given for all phases or for the teachers."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationDataModule, "data")
    groups = with_values(split_by_phase(overrides)["teacher"])
    given = [argument for group in groups if group[0].startswith("--data.") for argument in group]
    try:
        found: dict[str, Any] = parser.parse_args(given, defaults=False).as_dict().get("data", {})
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from error
    return found


def survey(data: DistillationDataModule, val_fraction: float) -> Survey:
    """Count images and classes, none held out yet; those of a folder by the headers of its files."""
    census, train, asked = data.census, tuple(data.count("train")), data.hparams["image_size"]
    return Survey(
        names=tuple(data.hparams["classes"] or (census.classes if census else data.class_names)),
        channels=census.channels if census else data.in_channels,
        size=asked or (census.size if census else data.image_size),
        train=train,
        test=tuple(data.count("test")),
        val_fraction=0.0 if sum(data.count("val")) else val_fraction,
        val=sum(data.count("val")),
        asked=asked is not None,
    )


def _say(title: str, data: DistillationDataModule, found: Survey) -> None:
    """Print which images there are."""
    counts = f"{sum(found.train):,} training images, {sum(found.test):,} test images"
    if data.census is None or data.hparams["classes"]:
        colour = "grey" if found.channels == 1 else "colour"
        print(f"{title}: {counts}, {len(found.names)} classes, {size_text(found.size)}, {colour}")
    else:
        first, *rest = data.census.lines()
        print("\n".join([f"{title}: {first}", *rest, counts]))
    if (least := min(found.test)) < 20:
        uncertain = f"an accuracy is uncertain by {50 / sum(found.test) ** 0.5:.2g} points"
        print(f"warning: few test images, {least} in the smallest class: {uncertain}; add some")


def _is_among_images(out: Path, root: Path) -> bool:
    """Tell whether a folder would be read as a class, or for its pictures; hidden ones are not."""
    inside = out.relative_to(root).parts if out.is_relative_to(root) else ()
    hidden = any(part.startswith(".") for part in inside)
    return bool(inside) and not hidden and (inside[0] in PARTS or not (root / "train").is_dir())


def plan_job(source: Source, out: Path, command: Mapping[str, Any], overrides: Sequence[str]) -> Comparison:
    """Plan a job and print the plan, which ``out/plan.json`` records; another command is refused in that folder."""
    ipc, method, config = (command[key] for key in ("ipc", "method", "config"))
    recorded = read_json(out / PLAN)
    if source.name == "folder" and _is_among_images(out.resolve(), Path(str(source.root)).resolve()):
        raise InputError(f"{out}: is among the images of {source.root}; name a folder elsewhere")
    if not recorded and out.exists() and (not out.is_dir() or any(entry.name != "data" for entry in out.iterdir())):
        raise InputError(f"{out}: is not empty and holds no {PLAN}; name another folder")
    gpu = torch.cuda.is_available()
    asked = {"source": source.name, "root": source.root, **command, "gpu": gpu, "overrides": list(overrides)}
    before = recorded.get("command", asked)
    if different := [f"--{key} {before.get(key)}" for key, value in asked.items() if before.get(key) != value]:
        raise InputError(f"{out}: was created with {', '.join(different)}; name another folder")

    options = {"dataset": source.name, **({"root": source.root} if source.root else {}), **_data_options(overrides)}
    if config is not None:
        own = read_config(find_config(config)).get("data", {}).get("init_args", {})
        options = {"image_size": own.get("image_size"), "max_per_class": own.get("max_per_class"), **options}
        options = {"val_fraction": own.get("val_fraction", 0.1), **options}
    val_fraction = options.pop("val_fraction", 0.1)
    data = DistillationDataModule(**{**options, "val_fraction": 0.0})
    found = survey(data, val_fraction)
    ipc = found.resolved(ipc)
    _say(source.title, data, found)
    label, ema, whitening = "all real images", method != "mtt", dict[str, Any]()
    if config is not None:
        configs = belonging(find_config(config), ipc)
        names = [Path(str(of.config)).stem for of in configs if of is not None]
        print(f"plan: the settings of {', '.join(names)}, as published")
        whitening = {"zca": own.get("zca", False)}
        used, held_out = found.used(options["max_per_class"])
        real = reference(math.ceil(used / own.get("batch_size", 256)), held_out=held_out > 0).having(data=whitening)
        distillation, ema = configs.distill.having(trainer={"callbacks+": [UNMEASURED]}), configs.averages_images
    else:
        # Configs are programs: they are written again, never read from the folder.
        groups = with_values(overrides)  # options of one phase are written into no config
        of_all = [each for group in groups if group[0][2:].partition(".")[0] not in PHASES for each in group]
        images = {key: options[key] for key in ("dataset", "root") if key in options} | _data_options(of_all)
        configs, real, options["image_size"] = plan_configs(found, images, out, {**command, "ipc": ipc}, gpu=gpu)
        distillation = configs.distill
        if real.data:
            label = f"{real.data['max_per_class']} real images per class"
    # Decodes the images into the cache that the fits read.
    described = DistillationDataModule(**{key: options[key] for key in WHERE if key in options}).describe()
    content = json.loads(json.dumps({"command": asked, "data": described}))
    if recorded and recorded.get("data") != content["data"]:
        raise InputError(f"{out}: the images of {source.title} have changed since it was begun; name another folder")
    write_json(out / PLAN, content)
    count = f"{min(ipc)} to {max(ipc)}" if isinstance(ipc, list) else ipc
    each, teachers = f"{count} per class", configs.teacher
    title = f"{method.upper().replace('RAT-', 'RaT-') if config is None else Path(config).stem}, {each}"
    where = [] if source.root is None else [f"--data.root={source.root}"]
    return Comparison(
        title=f"{source.title}, {count} image{'s' * (count != 1)} per class",
        dataset=source.name,
        ipc=ipc,
        run=str(out),
        teachers={} if teachers is None else {method: Teachers(**vars(teachers))},
        evaluate=configs.evaluate,
        rows={
            "random": Row(f"random real images, {each}", synthetic="random", evaluate=Settings(data=whitening)),
            method: Row(title, distill=distillation, teachers=method if teachers else None, ema=ema),
            "real": Row(label, synthetic="real", evaluate=real),
        },
        paired_with="random",
        file=out / PLAN,
        overrides=split_by_phase([*where, *overrides]),
    )


def time_limits(job: Comparison, command: Mapping[str, Any], end: Deadline) -> Callable[[Fit], float | None]:
    """Divide the time until the end of a budget: a fit that begins gets its share, in seconds, of what is left then."""
    random, learned, real = (job.fits_of(name) for name in ("random", command["method"], "real"))
    (first,), (last,) = (list(fits.evaluations.values()) for fits in (random, real))
    spent = sum(fit.status()["seconds"] for fits in (random, learned, real) for fit in fits.each())
    budget = 60 * (command["minutes"] or 0)

    def limit(fit: Fit) -> float | None:
        if (left := end.remaining()) is None:
            return None
        left -= spent + START  # of the command itself, and its tables
        if fit is not last:
            left -= REFERENCE * budget
        if fit in (learned.teachers, learned.distill):
            left -= first.status()["seconds"]  # as long as that of random images
        if fit.folder == first.folder:
            left = max(EVALUATING * budget, 2 * START)
        elif fit is learned.teachers:
            left *= TEACHING
        return max(left - START, 1.0)

    return limit


def run_job(
    job: Comparison, out: Path, command: Mapping[str, Any], end: Deadline, deadline: Deadline, run: Runner = run_child
) -> bool:
    """Run what there is time for; write the set and results when all is done. A failed fit raises InputError.

    ``command`` holds its arguments; ``end`` is that of its budget, ``deadline`` that of this slice of the work.
    """
    fits = job.fits_of(command["method"])
    assert fits.distill is not None
    print(f"the set is written to {fits.distill.folder / fits.distill.output} while it is learned")
    try:
        _, in_time = run_rows(job, list(job.rows), deadline, run, time_limits(job, command, end), go_on=False)
    except UnfinishedError as error:
        more = "give more --minutes, a smaller --data.image_size or --data.max_per_class"
        more += ", or --method rat-bptt, which has no teachers" if fits.teachers else ""
        raise InputError(f"{error}: {more}") from error
    if not in_time:
        return False
    results = write_results(job, {})
    file = copy_set(job, command["method"], out / "set.safetensors")
    write_json(out / "results.json", summarize(results))
    print(f"\n{short_table(results)}\n")
    print(f"set       {file}\nresults   {out / 'results.json'}\nimages    {out / 'images.png'}")
    longer = "" if command["minutes"] is None else f"--minutes {4 * command['minutes']:g}, "
    gpu = "" if torch.cuda.is_available() else ", a GPU"
    other = "ftd" if command["method"] == "rat-bptt" else "rat-bptt"
    advice = f"For a better set, name another --out and give {longer}a larger --ipc{gpu} or --method {other}."
    print(f"\n{verdict(results)} {advice}")
    return True


def distill_source(
    source: str,
    *,
    ipc: int | list[int] | Literal["auto"],
    out: Path,
    method: str = "ftd",
    minutes: float | None = None,
    config: str | None = None,
    stop_after: float | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    overrides: Sequence[str] = (),
) -> None:
    """Distil images into a set, and measure it beside random and all real images.

    Counts the images, divides the minutes over teachers, distillation and evaluations, and runs them. OUT holds
    set.safetensors, results.json, images.png, and the plan as configs for a longer, careful run. The same command
    resumes where it stopped. Further options (--data.root DIR) go to every fit; those with --teacher., --distill. or
    --evaluate. in front go to the fits of that phase.

    Args:
        source: a folder with a folder of images for each class, or a data set's name.
        ipc: images per class; for unequal classes numbers in label order (10,10,6), or auto, 1 % of each class's.
        out: the folder to write to.
        method: ftd, mtt, rat-bptt (without teachers), or any whose settings ship.
        minutes: budget of the whole job; by default 30.
        config: take the settings of this distillation's config, and of what belongs to it.
        stop_after: minutes; the same command continues.
        seed: of everything that is drawn.
        skip_broken: leave image files out that cannot be read.
        overrides: further options, for the fits.

    Raises:
        InputError: for images that cannot be read, a budget in which no teacher ends, or a folder of another command.
    """
    check_bounds(distill_source, locals())
    overrides = [*overrides, *(["--data.skip_broken=true"] if skip_broken else [])]
    if config is not None and minutes is not None:
        raise InputError("--config names all settings; leave out --minutes, or --config")
    minutes = MINUTES if minutes is None and config is None else minutes
    end = Deadline(minutes)
    command = {"ipc": ipc, "method": method, "minutes": minutes, "config": config, "seed": seed}
    job = plan_job(find_source(source), out, command, overrides)
    if not run_job(job, out, command, end, Deadline(stop_after)):
        print("not done: run the same command again")


def distill(
    train: Any,
    test: Any,
    *,
    ipc: int | list[int] | Literal["auto"] = 1,
    method: str = "ftd",
    minutes: float | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    **data_options: Any,
) -> SyntheticSet:
    """Distil a dataset into a few synthetic images per class, and measure them beside real ones.

    The images are written to ``out/data`` once, and child processes train teachers, distil and evaluate, as ``ftd
    distill`` does: ``out`` holds the same files, and the same call resumes where it stopped.

    Args:
        train: a torch ``Dataset`` of (image, label), torchvision's with or without ``ToTensor``; or a pair of tensors,
            images (N, C, H, W), uint8 or floats in [0, 1], and labels (N,).
        test: images that fresh networks are measured on, in the same form.
        ipc: images per class, a list of those of each, or "auto", 1 % of each class's training images.
        method: "ftd", "mtt" or "rat-bptt".
        minutes: budget of the whole job; None: 30.
        out: folder to write to; None: a temporary one, so only the set is kept.
        seed: of everything that is drawn.
        data_options: ``val``, ``class_names``, ``image_size`` and other options of
            ``DistillationDataModule.from_datasets``, but ``transform``.

    Returns:
        The distilled set. Accuracies of random images, the set and all images are in ``out/results.json``.

    Raises:
        InputError: for data that are not images, a budget in which no teacher ends, or ``out`` of another call.

    Example:
        >>> from torchvision.datasets import CIFAR10
        >>> train, test = (CIFAR10("data", train=part, download=True) for part in (True, False))  # doctest: +SKIP
        >>> synthetic = distill(train, test, ipc=10, minutes=120, out="cifar10")  # doctest: +SKIP
    """
    check_bounds(distill, locals())
    minutes = MINUTES if minutes is None else minutes
    end = Deadline(minutes)
    if fixed := sorted(FIXED & data_options.keys()):
        raise InputError(f"distill() does not accept {', '.join(fixed)}=; pass unnormalised images in [0, 1] or uint8")
    reading = {name: data_options.pop(name, None) for name in ("val", "class_names", "image_size", "batch")}
    dataset = read_datasets(train, test, transform=None, **reading)
    data_options |= {"image_size": reading["image_size"]} if reading["image_size"] else {}
    overrides = [f"--data.{name}={json.dumps(value)}" for name, value in data_options.items()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if out is None else out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        source = Source("images", str(write_images_file(dataset, folder / "data").parent), "own images")
        of_each = list(ipc) if isinstance(ipc, tuple) else ipc  # as the plan records it
        command = {"ipc": of_each, "method": method, "minutes": minutes, "config": None, "seed": seed}
        run_job(plan_job(source, folder, command, overrides), folder, command, end, Deadline(None))
        return SyntheticSet.load(folder / "set.safetensors")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd distill``."""
    distill_source(**parse_command(distill_source, "distill", arguments))
