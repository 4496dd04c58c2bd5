"""What SECURITY.md promises: no file makes this library import or call what it names."""

import contextlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from fits import SMALL, distil, make_trainer, rewrite, small_data, small_matching, small_teacher
from torch import nn

from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticEvaluation,
    SyntheticSet,
    TrajectoryMatching,
    TrajectoryStore,
    cli,
)
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.commands.export import export
from ftd_lightning.commands.info import describe
from ftd_lightning.core.networks import student_networks
from ftd_lightning.errors import InputError
from ftd_lightning.functional import InnerSGD
from ftd_lightning.modules import BilevelDistillation
from ftd_lightning.rules import RobustStart
from ftd_lightning.studies.label import label_random_images
from ftd_lightning.studies.rank import RankSettings, prepare
from ftd_lightning.studies.trajectory_error import measure_trajectory_error, trajectory_error

CANARY = """
from pathlib import Path

Path("canary_sang").touch()


def Net(*args, **kwargs):
    Path("canary_sang").touch()


FlatTeacher = TrajectoryMatching = SyntheticEvaluation = MatchingRule = Net
"""
PROBE = "ftd_lightning.core.LinearProbe"
SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": 8}
NETWORKS = {
    "a module of the current folder": {"name": "canary.Net", "options": {}, **SHAPE},
    "a command": {
        "name": "subprocess.call",
        "options": {"shell": True},
        **SHAPE,
        "in_channels": "touch canary_sang",
        "num_classes": -1,
        "image_size": None,
    },
    "a callable that claims its parameters": {
        "name": "canary.Net",
        "options": {},
        **SHAPE,
        "parameters": [["w", [3]]],
    },
    "a class path": {"class_path": "canary.Net", "init_args": {}},
    "a class path for a name": {"name": {"class_path": "canary.Net"}, "options": {}, **SHAPE},
    "a class path among the options": {"name": "convnet", "options": {"norm": {"class_path": "canary.Net"}}, **SHAPE},
    "an option that it does not take": {"name": "convnet", "options": {"shell": True}, **SHAPE},
    "an option in the place of a size": {"name": "convnet", "options": {"in_channels": 1}, **SHAPE},
}
SPELLINGS = ("canary.Net", {"class_path": "canary.Net", "init_args": {}}, ["canary.Net"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module that must never be imported."""
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("canary", None)


@contextlib.contextmanager
def silence(what):
    """The canary stays silent while a file is read, whether it is refused or not."""
    with contextlib.suppress(Exception, SystemExit):
        yield
    assert not Path("canary_sang").exists(), what
    assert "canary" not in sys.modules, what


def silent_or_refused(read, file, what, *, must=False):
    with silence(what):
        try:
            read(file)
        except InputError:
            return
        assert not must, f"{what}: was read"


def label(store, **network):
    module = SyntheticEvaluation(**(network or {"network_options": SMALL}), networks=1, augment="", compile=False)
    data = small_data(synthetic="random", trajectories=str(store))
    label_random_images(module, data, networks=1, epochs=1)


STORE_READERS = {
    "info": lambda store: describe(store),
    "matching": lambda store: student_networks(TrajectoryStore(store)),
    "coreset": lambda store: small_data(synthetic="herding", trajectories=str(store)).setup(),
    "label": label,
    "trajectory-error": lambda store: trajectory_error(Path("set.safetensors"), store, out=Path("curve")),
}
SET_READERS = {
    "info": lambda file: describe(file),
    "load": lambda file: SyntheticSet.load(file).training_labels(),
    "evaluation": lambda file: small_data(synthetic=str(file)).setup(),
    "export": lambda file: export(file, Path("exported")),
    "rank": lambda file: prepare([str(file)], RankSettings(out="ranked"), {"max_per_class": 14}),
    "trajectory-error": lambda file: trajectory_error(file, Path("store"), out=Path("curve")),
}


@pytest.fixture
def shelf(here, trajectories):
    """A store and a set in the folder."""
    (here / "store").symlink_to(trajectories)
    module = distil(here / "fit", trajectories, steps=1)
    module.synthetic_set().save("set.safetensors")
    return here


def changed(source, target, **metadata):
    target.parent.mkdir(exist_ok=True)
    rewrite(source, target, lambda tensors, old: {**old, **metadata})
    return target


def fields(source):
    found = []
    rewrite(source, Path("scratch.safetensors"), lambda tensors, metadata: found.append(metadata))
    return [key for key in found[0] if key not in ("kind", "format")]


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_that_stores_and_sets_name(network, shelf):
    named = {"network": NETWORKS[network]}
    teacher = changed(Path("store/teacher_0000.safetensors"), Path("bad/teacher_0000.safetensors"), **named)
    for name, read in STORE_READERS.items():
        silent_or_refused(read, teacher.parent, f"store, {network}, {name}", must=name != "info")
    file = changed(Path("set.safetensors"), Path("bad.safetensors"), **named)
    for name, read in SET_READERS.items():
        must = name in ("rank", "trajectory-error")
        silent_or_refused(read, file, f"set, {network}, {name}", must=must)


@pytest.mark.parametrize("spelling", range(len(SPELLINGS)))
def test_every_field_of_stores_and_sets(spelling, shelf):
    value = SPELLINGS[spelling]
    teacher, data = Path("store/teacher_0000.safetensors"), Path("store/data.safetensors")
    for field in fields(teacher):
        changed(teacher, Path("bad/teacher_0000.safetensors"), **{field: value})
        for name in ("info", "matching", "coreset"):
            silent_or_refused(STORE_READERS[name], Path("bad"), f"teacher, {field}, {name}")
    changed(teacher, Path("bad/teacher_0000.safetensors"))
    for field in fields(data):
        changed(data, Path("bad/data.safetensors"), **{field: value})
        silent_or_refused(STORE_READERS["coreset"], Path("bad"), f"store data, {field}")
    for field in fields(Path("set.safetensors")):
        file = changed(Path("set.safetensors"), Path("bad.safetensors"), **{field: value})
        for name in ("load", "evaluation", "rank"):
            silent_or_refused(SET_READERS[name], file, f"set, {field}, {name}")


def test_the_readers_read_what_is_good(shelf):
    for read in STORE_READERS.values():
        read(Path("store"))
    for read in SET_READERS.values():
        read(Path("set.safetensors"))


PHASES = {
    "teacher": lambda store: small_teacher(teachers=1, epochs=1),
    "matching": lambda store: small_matching(store, rules=[RobustStart(0.1)]),
    "bilevel": lambda store: BilevelDistillation(network_options=SMALL, syn_steps=2, optimizer=InnerSGD(0.5)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, trajectories):
    folder, found = tmp_path_factory.mktemp("checkpoints"), {}
    for name, make in PHASES.items():
        module = make(trajectories)
        trainer = make_trainer(folder / name, max_steps=-1 if name == "teacher" else 1)
        trainer.fit(module, datamodule=small_data())
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        found[type(module)] = folder / f"{name}.ckpt"
    return found


def spelled(fields):
    """Each field with one of the ways to name a callable."""
    return zip(fields, itertools.cycle(SPELLINGS))


def test_every_field_of_checkpoints(checkpoints, here):
    seen = set()
    for kind, path in checkpoints.items():
        kind.load_from_checkpoint(path)
        content, name = torch.load(path, weights_only=True), kind.__name__

        def load(changed, kind=kind):
            torch.save(changed, "bad.ckpt")
            return kind.load_from_checkpoint("bad.ckpt")

        hparams, own = content["hyper_parameters"], content["ftd_lightning"]
        instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        for field, value in spelled([field for field in (*hparams, "_instantiator") if field not in seen]):
            changed = {**content, "hyper_parameters": {**hparams, field: value}}
            silent_or_refused(load, changed, f"{name}, {field}", must=field == "network")
        for class_path in (f"canary.{name}", f"ftd_lightning.{name}"):
            both = {**hparams, **instantiator, "_class_path": class_path, "rules": ["canary.Net"]}
            silent_or_refused(load, {**content, "hyper_parameters": both}, f"{name}, {class_path}")
        for field, value in spelled([field for field in own if field not in seen]):
            changed = {**content, "ftd_lightning": {**own, field: value}}
            silent_or_refused(load, changed, f"{name}, {field}")
        seen |= {*hparams, *own, "_instantiator"} - {"network", "rules"}
        for words, network in NETWORKS.items() if kind is TrajectoryMatching else ():
            changed = {**content, "ftd_lightning": {**own, "network": network}}
            silent_or_refused(load, changed, f"{name}, {words}", must=True)


@pytest.mark.usefixtures("here")
def test_every_field_of_datamodules_in_checkpoints(checkpoints):
    path = checkpoints[FlatTeacher]
    DistillationDataModule.load_from_checkpoint(path)
    content = torch.load(path, weights_only=True)
    recorded = content["datamodule_hyper_parameters"]
    for field, value in spelled(["dataset", "synthetic", "trajectories", "_class_path", "_instantiator"]):
        torch.save({**content, "datamodule_hyper_parameters": {**recorded, field: value}}, "bad.ckpt")
        silent_or_refused(DistillationDataModule.load_from_checkpoint, "bad.ckpt", field)


def own(in_channels, num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))


def other(in_channels, num_classes, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes, bias=False))


OWN, OTHER = f"{__name__}.own", f"{__name__}.other"


def test_a_network_of_ones_own_is_passed_by_whoever_runs_the_command(here, refused):
    teacher = FlatTeacher(OWN, teachers=1, epochs=2, lr=0.1, augment="")
    trainer = make_trainer(here / "teacher", callbacks=[TrajectoryRecorder("own")])
    trainer.fit(teacher, datamodule=small_data())
    trainer.save_checkpoint("teacher.ckpt")
    recorded = TrajectoryStore("own").metadata["network"]
    assert recorded == {"name": OWN, "options": {}, **SHAPE, "parameters": [["1.weight", [10, 64]], ["1.bias", [10]]]}
    for refusal, network in (("not of this library: pass it as network", None), ("has other parameters", OTHER)):
        with refused("own: ", refusal):
            distil(here / "fit", Path("own"), steps=1, max_start_epoch=1, network=network)
    module = distil(here / "fit", Path("own"), steps=1, max_start_epoch=1, network=OWN)
    module.trainer.save_checkpoint("matching.ckpt")
    module.synthetic_set().save("set.safetensors")
    for kind, path in ((FlatTeacher, "teacher.ckpt"), (TrajectoryMatching, "matching.ckpt")):
        with refused(path, "not of this library: pass network="):
            kind.load_from_checkpoint(path)
        with refused("the checkpoint's network is", "pass the same network"):
            kind.load_from_checkpoint(path, network=OTHER)
        assert kind.load_from_checkpoint(path, network=OWN).hparams["network"] == OWN
    with refused("not of this library: give --network"):
        SET_READERS["rank"]("set.safetensors")
    prepare(["set.safetensors"], RankSettings(out="ranked", network=OWN), {"max_per_class": 14})
    with refused("not of this library: pass it as network"):
        trajectory_error(Path("set.safetensors"), Path("own"), out=Path("curve"))
    synthetic, store = SyntheticSet.load("set.safetensors"), TrajectoryStore("own")
    measure_trajectory_error(synthetic, store, small_data().part("test"), own(1, 10, 8))
    with refused("not of this library: choose by teachers of"):
        STORE_READERS["coreset"](Path("own"))
    with refused("has other parameters"):
        label(Path("own"))
    label(Path("own"), network=OWN)
    # Version 0.2 recorded no parameters.
    old = {key: value for key, value in recorded.items() if key != "parameters"}
    changed(Path("own/teacher_0000.safetensors"), Path("old/teacher_0000.safetensors"), network=old)
    student_networks(TrajectoryStore("old"), OWN)


@pytest.mark.filterwarnings("ignore:.*the fit ended early.*")  # the checkpoint is of a finished fit in another folder
@pytest.mark.parametrize("path", ["bad.ckpt", "last"])
def test_checkpoints_on_the_command_line(path, checkpoints, here):
    """Nothing in it is followed, nor overrules what was asked for."""
    content = torch.load(checkpoints[FlatTeacher], weights_only=True)
    named = dict.fromkeys(content["hyper_parameters"], "canary.Net")
    content["hyper_parameters"] = {
        **named,
        "_class_path": "canary.FlatTeacher",
        "rules": [{"class_path": "canary.Net"}],
    }
    place = here / "runs" / "digits" / "teacher_mtt" / "checkpoints" / "last.ckpt"
    place.parent.mkdir(parents=True)
    torch.save(content, here / "bad.ckpt" if path == "bad.ckpt" else place)
    arguments = ["fit", "--config", "digits/teacher_mtt", "--model.network_options={width: 4, depth: 1}"]
    arguments += [
        "--model.epochs=1",
        "--model.teachers=1",
        "--model.lr=0.1",
        "--model.augment=",
        "--data.max_per_class=14",
    ]
    cli.main([*arguments, "--data.batch_size=32", "--trainer.accelerator=cpu", f"--ckpt_path={path}"])
    with silence(path):
        pass


def test_a_backbone_that_a_checkpoint_names_is_not_built(here: Path, refused) -> None:
    options = {"backbone": "torch.nn.Flatten"}
    data = small_data(synthetic="random")
    module, trainer = SyntheticEvaluation(PROBE, options, networks=1), make_trainer(here, max_epochs=1)
    trainer.fit(module, data)
    trainer.save_checkpoint("probe.ckpt")
    saved = torch.load("probe.ckpt", weights_only=True)
    saved["hyper_parameters"]["network_options"] = {"backbone": "canary.Net"}
    torch.save(saved, "bad.ckpt")
    with refused("bad.ckpt", "pass network_options="):
        SyntheticEvaluation.load_from_checkpoint("bad.ckpt", network=PROBE)
    assert not Path("canary_sang").exists()
    SyntheticEvaluation.load_from_checkpoint("probe.ckpt", network=PROBE, network_options=options)
