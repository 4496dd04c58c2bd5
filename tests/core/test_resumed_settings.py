"""A resumed fit has the settings and images of its checkpoint, or is refused in one line that names what differs."""

import shutil
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching, small_teacher
from lightning.pytorch import Callback

from ftd_lightning import DistillationDataModule, SyntheticEvaluation
from ftd_lightning.callbacks import SyntheticEMA, SyntheticSetWriter
from ftd_lightning.modules import DistributionMatching
from ftd_lightning.rules import RobustStart


class Save(Callback):
    """Saves a checkpoint after the second batch and ends the fit."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def on_train_batch_end(self, trainer, *args) -> None:
        self.count += 1
        if self.count == 2:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


class Fits:
    """Makes checkpoints of small fits, and resumes them with changed settings."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store

    def module(self, kind: str, **options):
        common = {"network_options": SMALL, "iterations_per_epoch": 3}
        make = {
            "teacher": lambda: small_teacher(**{"momentum": 0.5, **options}),
            "matching": lambda: small_matching(self.store, **options),
            "dm": lambda: DistributionMatching(**{**common, "batch_real": 4, **options}),
            "evaluation": lambda: SyntheticEvaluation(**{"network_options": SMALL, "networks": 1, **options}),
        }
        return make[kind]()

    def data(self, kind: str, **options) -> DistillationDataModule:
        return small_data(**({"synthetic": "random"} if kind == "evaluation" else {}), **options)

    def checkpoint(self, kind: str, *callbacks: Callback, data=None, **options) -> Path:
        path = self.folder / f"{kind}{len(list(self.folder.glob('*.ckpt')))}.ckpt"
        trainer = make_trainer(self.folder / path.stem, max_epochs=4, callbacks=[*callbacks, Save(path)])
        with pytest.raises(InterruptedError):
            trainer.fit(self.module(kind, **options), datamodule=data or self.data(kind))
        return path

    def resume(self, path: Path, kind: str, *callbacks: Callback, data=None, **options):
        module, limits = self.module(kind, **options), {"max_epochs": -1 if kind == "teacher" else 2}
        trainer = make_trainer(path.with_suffix(""), callbacks=list(callbacks), **limits)
        trainer.fit(module, datamodule=data or self.data(kind), ckpt_path=path)
        return module


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> Fits:
    folder = tmp_path_factory.mktemp("fits")
    return Fits(folder, record(folder / "teachers"))


@pytest.fixture(scope="module")
def checkpoints(fits: Fits) -> dict[str, Path]:
    kinds = ("teacher", "matching", "dm", "evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **options: None)
        return {kind: fits.checkpoint(kind) for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        # Not applied, as the optimizer's state or the checkpoint's weights win.
        ("matching", {"lr_images": 3000.0}, "lr_images=3000.0, but the checkpoint was made with 10.0"),
        ("evaluation", {"lr": 0.3}, "lr=0.3, but the checkpoint was made with None"),
        # Applied from the middle on.
        ("matching", {"syn_steps": 9, "seed": 4}, "syn_steps=9, but the checkpoint was made with 3; seed=4, but"),
        ("matching", {"augment": "flip"}, "augment.strategy='flip', but the checkpoint was made with ''"),
        ("matching", {"rules": [RobustStart(0.1)]}, "rules=[{"),
        ("dm", {"network_options": {**SMALL, "pooling": "max"}}, "network_options={'width': 4, 'depth': 1, 'pooling'"),
        # Of other shapes.
        ("dm", {"ipc": 2}, "ipc=2, but the checkpoint was made with 1"),
    ],
)
def test_another_setting_is_refused(kind, options, words, fits: Fits, checkpoints, refused) -> None:
    with refused(words, "give its values, or begin anew"):
        fits.resume(checkpoints[kind], kind, **options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("teacher", {"batch_size": 16}, "data.batch_size=16, but the checkpoint was made with 32"),
        ("dm", {"val_fraction": 0.2}, "data.val_fraction=0.2, but the checkpoint was made with 0.1"),
        ("evaluation", {"synthetic": "real"}, "data.synthetic.method='real', but the"),
    ],
)
def test_other_images_are_refused(kind, options, words, fits: Fits, checkpoints, refused) -> None:
    with refused(words):
        fits.resume(checkpoints[kind], kind, data=small_data(**options))


@pytest.mark.parametrize("option", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.5}])
def test_a_trainer_that_computes_otherwise_is_refused(option, fits: Fits, checkpoints, refused) -> None:
    trainer = make_trainer(fits.folder / "otherwise", max_epochs=2, **option)
    with refused("trainer." + "".join(f"{key}={value!r}, but" for key, value in option.items())):
        trainer.fit(fits.module("dm"), datamodule=fits.data("dm"), ckpt_path=checkpoints["dm"])


def test_images_of_other_contents_are_refused(fits: Fits, refused) -> None:
    def data(seed: int) -> DistillationDataModule:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(40, 1, 8, 8, generator=generator)
        return DistillationDataModule.from_datasets(*[(images, torch.arange(40) % 2)] * 2, val_fraction=0.0)

    path = fits.checkpoint("dm", data=data(0))
    with refused("data.dataset.fingerprint=", "data.transform.mean="):
        fits.resume(path, "dm", data=data(1))
    fits.resume(path, "dm", data=data(0))


def test_other_teachers_and_another_set_in_a_place_are_refused(fits: Fits, tmp_path: Path, refused) -> None:
    own = Fits(tmp_path, tmp_path / "store")
    shutil.copytree(fits.store, own.store)
    path = own.checkpoint("matching")
    own.store = own.store.rename(tmp_path / "elsewhere")
    made = own.resume(path, "matching", SyntheticSetWriter(str(tmp_path / "set.safetensors")))
    (own.store / "teacher_0001.safetensors").unlink()
    with refused("trajectories: teachers.count=1, but the checkpoint was made with 2"):
        own.resume(path, "matching")

    file = str(tmp_path / "set.safetensors")
    path = own.checkpoint("evaluation", data=small_data(synthetic=file))
    shutil.copy(file, tmp_path / "copy.safetensors")
    own.resume(path, "evaluation", data=small_data(synthetic=str(tmp_path / "copy.safetensors")))
    longer = made.synthetic_set()
    longer.metadata["iterations"] = 300
    longer.save(file)
    with refused("data.synthetic.iterations=300, but the checkpoint was made with 10"):
        own.resume(path, "evaluation", data=small_data(synthetic=file))


def test_what_decides_no_result_may_change(fits: Fits, checkpoints) -> None:
    same = fits.resume(checkpoints["matching"], "matching")
    moved = {"compile": False, "data": small_data(on_device="no", batch_size=7, download=False)}
    assert torch.equal(fits.resume(checkpoints["matching"], "matching", **moved).images, same.images)
    assert fits.resume(checkpoints["teacher"], "teacher", teachers=3).current_epoch == 12


def test_a_subclass_of_ones_own_resumes_its_base(fits: Fits, checkpoints, monkeypatch) -> None:
    own = type("Own", (DistributionMatching,), {})
    monkeypatch.setattr(fits, "module", lambda kind: own(network_options=SMALL, iterations_per_epoch=3, batch_real=4))
    assert type(fits.resume(checkpoints["dm"], "dm")) is own


def test_the_rhythm_of_files_may_change(fits: Fits, checkpoints) -> None:
    whole = fits.module("dm")
    make_trainer(fits.folder / "whole", max_steps=8).fit(whole, datamodule=small_data())
    for per_epoch in (2, 4):
        module = fits.module("dm", iterations_per_epoch=per_epoch)
        trainer = make_trainer(fits.folder / f"every{per_epoch}", max_steps=8)
        trainer.fit(module, datamodule=small_data(), ckpt_path=checkpoints["dm"])
        assert torch.equal(module.images, whole.images)


def test_an_average_begins_with_the_fit(fits: Fits, checkpoints, refused) -> None:
    with refused("SyntheticEMA", "begins with the fit"):
        fits.resume(checkpoints["dm"], "dm", SyntheticEMA(0.9))
    averaged = fits.checkpoint("dm", SyntheticEMA(0.9))
    with refused("SyntheticEMA.decay=0.999, but the checkpoint was made with 0.9"):
        fits.resume(averaged, "dm", SyntheticEMA(0.999))
    made = fits.resume(averaged, "dm", SyntheticEMA(0.9)).synthetic_set()
    assert made.metadata["ema_initial_weight"] == pytest.approx(0.9**6, rel=1e-5)
