"""Modules inside other people's Lightning code: checkpoints, loggers, callbacks, precision, teachers, trainers."""

import shutil
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_matching, small_teacher
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn

from ftd_lightning import (
    DistillationDataModule,
    FlatTeacher,
    SyntheticEvaluation,
    SyntheticSet,
    TrajectoryMatching,
    TrajectoryStore,
)
from ftd_lightning.callbacks import AtomicCheckpointIO, EvaluateSynthetic, SyntheticSetWriter, TrajectoryRecorder
from ftd_lightning.callbacks.trajectory_recorder import check_first_batch
from ftd_lightning.cli import main
from ftd_lightning.files import Standardization
from ftd_lightning.functional import Augmentation, make_generator
from ftd_lightning.lightning_cli import run
from ftd_lightning.models import describe_network
from ftd_lightning.modules import DistributionMatching, GradientMatching
from ftd_lightning.rules import RobustStart

NET = {"network_options": SMALL}
RIVAL = {**NET, "batch_real": 4, "iterations_per_epoch": 2}


def own_network() -> nn.Module:
    """A network with BatchNorm that no name builds."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def fit(folder: Path, module, data=None, **options):
    """Fit a module and return the path of its last checkpoint."""
    keep = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True)
    callbacks = [keep, *options.pop("callbacks", [])]
    trainer = make_trainer(folder, enable_checkpointing=True, callbacks=callbacks, **options)
    trainer.fit(module, datamodule=data or small_data())
    return folder / "checkpoints" / "last.ckpt"


class TestLoadFromCheckpoint:
    def test_teachers(self, tmp_path: Path) -> None:
        module = small_teacher(augment=Augmentation("flip"))
        path = fit(tmp_path, module)
        loaded = FlatTeacher.load_from_checkpoint(path)
        assert all(map(torch.equal, loaded.network.parameters(), module.network.parameters()))
        assert loaded.augment == Augmentation("flip")
        assert loaded.network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

    def test_own_networks_are_asked_for(self, tmp_path: Path, refused) -> None:
        path = fit(tmp_path, FlatTeacher(network=own_network, teachers=1, epochs=1, lr=0.1))
        with refused("Sequential", "pass the same network"):
            FlatTeacher.load_from_checkpoint(path)
        loaded = FlatTeacher.load_from_checkpoint(path, network=own_network)
        assert loaded.network[1].running_mean.abs().sum() > 0

    def test_distillation(self, tmp_path: Path, trajectories: Path) -> None:
        module = small_matching(trajectories, rules=[RobustStart(0.1)])
        loaded = TrajectoryMatching.load_from_checkpoint(fit(tmp_path, module, max_steps=7))
        ours, theirs = loaded.synthetic_set(), module.synthetic_set()
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.step_size, theirs.step_size)
        assert ours.metadata == theirs.metadata
        assert ours.metadata["iterations"] == 7
        assert ours.transform.describe() == theirs.transform.describe()
        make_trainer(tmp_path / "again", max_steps=2).fit(loaded, datamodule=small_data())
        assert not torch.equal(ours.images, loaded.images)

    def test_evaluation_of_two_ranks(self, tmp_path: Path) -> None:
        """What two processes save: each its share of the networks, the third filled up by a fourth."""
        module = SyntheticEvaluation(**NET, networks=3)
        path = fit(tmp_path, module, small_data(synthetic="random"), max_epochs=1)
        self.check_networks(path, module)
        checkpoint = torch.load(path, weights_only=True)
        whole = checkpoint["state_dict"]
        ranks = [{key: value for key, value in whole.items() if not key.startswith("networks.")} for _ in range(2)]
        for rank, own in enumerate(([0, 2], [1, 2])):
            for place, number in enumerate(own):
                for key, value in whole.items():
                    if key.startswith(f"networks.{number}."):
                        ranks[rank][key.replace(f"networks.{number}.", f"networks.{place}.")] = value
        checkpoint["state_dict"], checkpoint["ranks"] = ranks[0], [{"state_dict": state} for state in ranks]
        torch.save(checkpoint, path)
        self.check_networks(path, module)

    @staticmethod
    def check_networks(path: Path, module: SyntheticEvaluation) -> None:
        loaded = SyntheticEvaluation.load_from_checkpoint(path)
        assert len(loaded.networks) == 3
        for ours, theirs in zip(loaded.networks, module.networks, strict=True):
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    def test_checkpoints_of_0_1_are_refused(self, tmp_path: Path, refused) -> None:
        path = fit(tmp_path, small_teacher(teachers=1, epochs=1))
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["ftd_lightning"]
        torch.save(checkpoint, path)
        with refused("not saved by this version"):
            FlatTeacher.load_from_checkpoint(path)


def own_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


class Own(LightningModule):
    """Somebody's classifier."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.add_module("network" if head else "body", own_net())

    def training_step(self, batch, batch_idx):
        images, labels = batch
        net = next(iter(self.children()))
        return nn.functional.cross_entropy(net(images), labels)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Theirs(Own):
    """The shape of lightning-hydra-template's module: a network among other parameters, names with a slash."""

    def __init__(self) -> None:
        super().__init__(head=False)
        self.temperature = nn.Parameter(torch.ones(1))

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val/acc": 0.125 * (self.current_epoch + 1), "val/loss": 2.5})


class Bare(LightningDataModule):
    """Normalised images, as somebody else's loaders give them."""

    def train_dataloader(self):
        data = small_data(val_fraction=0.0)
        images, labels = data.part("train")
        normalised = (data.transform.invert(images) - 0.3) / 0.4
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(normalised, labels), batch_size=64)

    val_dataloader = test_dataloader = train_dataloader


class TestOwnTeachers:
    def test_one_teacher_per_fit(self, tmp_path: Path) -> None:
        for epochs in (3, 2):
            recorder = TrajectoryRecorder(str(tmp_path / "store"))
            make_trainer(tmp_path, callbacks=[recorder], max_epochs=epochs).fit(Own(), datamodule=small_data())
        store = TrajectoryStore(tmp_path / "store")
        assert store.lengths == [3, 2]
        assert store.epochs == 2
        assert store.metadata["method"] == "mtm"
        assert store.num_parameters == 650
        assert [path.name for path in sorted((tmp_path / "store").iterdir())] == [
            "data.safetensors",
            "teacher_0000.safetensors",
            "teacher_0001.safetensors",
        ]

    def test_all_parameters_without_a_network(self, tmp_path: Path) -> None:
        recorder = TrajectoryRecorder(str(tmp_path / "store"))
        make_trainer(tmp_path, callbacks=[recorder], max_epochs=1).fit(Own(head=False), datamodule=small_data())
        names = [name for name, _ in TrajectoryStore(tmp_path / "store").metadata["network"]["parameters"]]
        assert names == ["body.1.weight", "body.1.bias"]
        # A prefix is all that a student's names differ in.
        module = small_matching(tmp_path / "store", network=own_net(), max_start_epoch=1)
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data())
        assert SyntheticSet.load(tmp_path / "set.safetensors").metadata["method"] == "mtm"

    def test_the_first_batch_is_compared_with_its_description(self, tmp_path: Path, refused) -> None:
        data = small_data()
        data.setup()
        images, labels = data.part("train")
        augmented = Augmentation("color_crop_flip_scale_rotate")(images, make_generator(0))
        check_first_batch({"image": augmented, "label": labels}, data)
        with pytest.warns(UserWarning, match=r"mean 0.00 .* has 1.00 and 1.00: if this is not its augmentation"):
            check_first_batch([images + 1, labels], data)
        for given, words in (
            (data.transform.invert(images), "mean 0.00 and standard deviation 1.0"),
            (images.repeat_interleave(2, 2), "of shape (1, 8, 8), but the first training batch has (1, 16, 8)"),
        ):
            loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(given, labels), batch_size=32)
            trainer = make_trainer(tmp_path, callbacks=[TrajectoryRecorder(data=data)], max_epochs=1)
            with refused(words, "give data="):
                trainer.fit(Own(), loader, loader)
        assert not list(tmp_path.rglob("teacher_*"))

    def test_a_part_of_a_module_is_recorded_and_matched(self, tmp_path: Path, refused) -> None:
        def record_one(store: str, **options) -> TrajectoryStore:
            recorder = TrajectoryRecorder(str(tmp_path / store), monitor="val/acc", **options)
            trainer = make_trainer(tmp_path, callbacks=[recorder], max_epochs=3, check_val_every_n_epoch=2)
            trainer.fit(Theirs(), datamodule=small_data())
            return TrajectoryStore(tmp_path / store)

        def match(store: str) -> None:
            module = small_matching(tmp_path / store, network=own_net, max_start_epoch=1)
            make_trainer(tmp_path / f"{store} set", max_steps=1).fit(module, datamodule=small_data())

        part, layer = record_one("part", network="body"), record_one("layer", network="body.1")
        assert part.num_parameters == layer.num_parameters == 650
        assert part.metadata["network"] == describe_network(own_net())
        assert part.metadata["precision"] == "32-true"
        assert part.teacher_metadata(0)["accuracies"] == [None, 0.25, None]
        match("part")
        match("layer")
        assert record_one("whole").num_parameters == 651
        with refused("only theirs has temperature (1,)", "TrajectoryRecorder(network=...)"):
            match("whole")

    def test_arguments_that_no_teacher_can_be_recorded_with_are_refused(self, tmp_path: Path, refused) -> None:
        with refused("data= is a Bare", "from_datamodule"):
            TrajectoryRecorder(data=Bare())
        for options, trainer, words in (
            ({"network": "backbone"}, {}, ("network='backbone'", "Theirs, which has body")),
            ({"network": "body"}, {"precision": "bf16-true"}, ("torch.bfloat16", "bf16-mixed or 32-true")),
            ({"monitor": "val/loss"}, {}, ("monitor='val/loss' is 2", "in [0, 1]")),
        ):
            recorder = TrajectoryRecorder(str(tmp_path / "store"), **options)
            with refused(*words):
                make_trainer(tmp_path, callbacks=[recorder], max_epochs=1, **trainer).fit(Theirs(), Bare())
        recorder = TrajectoryRecorder(str(tmp_path / "store"), monitor="val_acc")
        with pytest.warns(UserWarning, match="monitor='val_acc' was not logged; logged are val/acc, val/loss"):
            make_trainer(tmp_path, callbacks=[recorder], max_epochs=1).fit(Theirs(), Bare())

    @pytest.mark.parametrize("named", [None, "my digits"])
    def test_teachers_of_data_that_nobody_described_are_matched(self, named, tmp_path: Path) -> None:
        recorder = TrajectoryRecorder(str(tmp_path / "store"), network="body", data=named)
        make_trainer(tmp_path, callbacks=[recorder], max_epochs=2).fit(Theirs(), Bare())
        data = DistillationDataModule.from_datamodule(Bare(), transform=Standardization([0.3], [0.4]))
        module = small_matching(tmp_path / "store", network=own_net, max_start_epoch=1)
        with pytest.warns(UserWarning, match="store: does not describe its teachers' images"):
            make_trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
        made = module.synthetic_set()
        assert made.metadata["dataset"] == data.describe()["dataset"]
        assert made.transform.describe() == Standardization([0.3], [0.4]).describe()

    def test_a_whitening_that_was_not_set_up_describes_teachers(self, tmp_path: Path) -> None:
        data = small_data(zca=True, val_fraction=0.0)
        data.setup()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.part("train")), batch_size=64)
        for _ in range(2):
            recorder = TrajectoryRecorder(str(tmp_path / "store"), data=small_data(zca=True, val_fraction=0.0))
            make_trainer(tmp_path, callbacks=[recorder], max_epochs=1).fit(Theirs(), loader, loader)
        assert TrajectoryStore(tmp_path / "store").metadata["transform"] == data.transform.describe()

    def test_unnamed_data_joins_no_store(self, tmp_path: Path, refused) -> None:
        loader = torch.utils.data.DataLoader([(torch.randn(1, 8, 8), i % 10) for i in range(20)], batch_size=10)

        def record_one(store: str, **options) -> None:
            recorder = TrajectoryRecorder(str(tmp_path / store), **options)
            make_trainer(tmp_path, callbacks=[recorder], max_epochs=1).fit(Own(), loader, loader)

        record_one("unnamed")
        with refused("unnamed", "joins no store", "data="):
            record_one("unnamed")
        for _ in range(2):
            record_one("named", data="twenty images")
        assert len(TrajectoryStore(tmp_path / "named")) == 2

    def test_a_resumed_fit_keeps_its_number(self, tmp_path: Path) -> None:
        path = tmp_path / "store"
        checkpoint = fit(tmp_path, Own(), callbacks=[TrajectoryRecorder(str(path))], max_steps=7)
        assert TrajectoryStore(path).lengths == [1]  # of five batches, and two more that are no epoch
        keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
        trainer = make_trainer(
            tmp_path, enable_checkpointing=True, callbacks=[TrajectoryRecorder(str(path)), keep], max_epochs=3
        )
        trainer.fit(Own(), datamodule=small_data(), ckpt_path=str(checkpoint))
        assert TrajectoryStore(path).lengths == [3]


@pytest.mark.parametrize("first", [small_matching, lambda _: small_teacher()], ids=["matching", "teacher"])
def test_a_trainer_fits_one_module(first, tmp_path: Path, trajectories: Path, refused) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(first(trajectories), datamodule=small_data())
    with refused("this Trainer has fitted a module already", "make a new Trainer", "ckpt_path"):
        trainer.fit(DistributionMatching(**RIVAL), datamodule=small_data())


def test_early_stopping_ends_a_teacher_and_keeps_it(tmp_path: Path) -> None:
    stop = EarlyStopping("teacher/train_loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="0 of 1 teachers of 4 epochs are recorded"):
        make_trainer(tmp_path, callbacks=[stop]).fit(small_teacher(teachers=1), datamodule=small_data())
    store = TrajectoryStore(tmp_path / "trajectories")
    assert store.lengths == [2]
    assert not (tmp_path / "trajectories" / ".unfinished").exists()


def test_callbacks_that_take_several_teachers_for_one_are_refused(tmp_path: Path, refused) -> None:
    for callback, words in (
        (EarlyStopping("teacher/val_accuracy", mode="max"), "teacher/val_accuracy of a teacher with the best of"),
        (StochasticWeightAveraging(0.1, swa_epoch_start=1), "average weights of different teachers"),
    ):
        with refused(words, "leave it out"):
            make_trainer(tmp_path, callbacks=[callback]).fit(small_teacher(), datamodule=small_data())


def test_fast_dev_run_leaves_nothing(tmp_path: Path, trajectories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, data in (
        (small_teacher(), small_data()),
        (small_matching(trajectories), small_data()),
        (SyntheticEvaluation(**NET, networks=1), small_data(synthetic="random")),
    ):
        callbacks = [EvaluateSynthetic(1, networks=1, epochs=1)]
        make_trainer(tmp_path, fast_dev_run=True, callbacks=callbacks).fit(module, datamodule=data)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow  # wandb takes seconds
def test_csv_and_offline_wandb_loggers(tmp_path: Path, trajectories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, logger = small_matching(trajectories), CSVLogger(tmp_path, name="csv")
    make_trainer(tmp_path, max_steps=5, logger=logger, log_every_n_steps=1).fit(module, datamodule=small_data())
    assert (Path(logger.log_dir) / "set.safetensors").is_file()
    assert "matching/loss" in (Path(logger.log_dir) / "metrics.csv").read_text()
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(offline=True)
    make_trainer(tmp_path, max_steps=1, logger=logger).fit(small_matching(trajectories), datamodule=small_data())
    logger.experiment.finish()
    assert len(list(tmp_path.rglob("lightning_logs/*/set.safetensors"))) == 1


def test_paths_may_begin_with_the_home_folder(tmp_path: Path, trajectories: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trajectories, tmp_path / "store")
    logger, keep = CSVLogger("~/logs", name="", version=""), ModelCheckpoint("~/checkpoints", save_last=True)
    options = {"logger": logger, "callbacks": [keep], "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    make_trainer("~/fit", max_steps=1, **options).fit(small_matching("~/store"), datamodule=small_data())
    assert TrajectoryMatching.load_from_checkpoint("~/checkpoints/last.ckpt").iterations == 1
    SyntheticSet.load("~/logs/set.safetensors").save("~/again.safetensors")
    assert SyntheticSet.read_metadata("~/again.safetensors")["iterations"] == 1
    make_trainer("~/fit", callbacks=[TrajectoryRecorder("~/own")]).fit(
        small_teacher(teachers=1, epochs=1), datamodule=small_data()
    )
    main(["info", "~/again.safetensors"])
    assert "again.safetensors" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("model: {class_path: TrajectoryMatching, init_args: {trajectories: ~/store}}\n")
    options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=~/runs", "--trainer.callbacks=SyntheticEMA"]
    options += ["--trainer.callbacks+=SyntheticSetWriter", "--trainer.callbacks.path=~/here/set.safetensors"]
    cli = run(
        ["--config=~/mine.yaml", "--data=DistillationDataModule", "--data.synthetic=~/set", *options], start=False
    )
    assert cli.model.hparams["trajectories"] == str(tmp_path / "store")
    assert cli.trainer.logger.save_dir == str(tmp_path / "runs")
    writers = [callback for callback in cli.trainer.callbacks if isinstance(callback, SyntheticSetWriter)]
    assert [writer.path for writer in writers] == [tmp_path / "here" / "set.safetensors"]
    found = {path.name for path in tmp_path.iterdir()}
    assert found >= {"logs", "checkpoints", "own", "again.safetensors"}
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert "~" not in found


def test_settings_that_change_the_result_are_refused(tmp_path: Path, trajectories: Path, refused) -> None:
    modules = [small_teacher(), small_matching(trajectories), DistributionMatching(**RIVAL)]
    modules.append(SyntheticEvaluation(**NET, networks=1))
    for module in modules:
        data = small_data(synthetic="random")
        for name, value, words in (
            ("precision", "bf16-true", "bf16-true"),
            ("precision", "16-true", "16-true"),
            ("overfit_batches", 1, "limit_train_batches"),
        ):
            with refused(words):
                make_trainer(tmp_path, max_steps=1, **{name: value}).fit(module, datamodule=data)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.precision_plugin.precision = "16-mixed"  # a Trainer on a CPU refuses to be made with it
        with refused("16-mixed"):
            trainer.fit(module, datamodule=data)
    for option in ({"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}):
        with refused("FlatTeacher", *option):
            make_trainer(tmp_path, **option).fit(small_teacher(), datamodule=small_data())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


WORKING = [{"precision": "64-true"}, {"precision": "bf16-mixed"}, {"barebones": True}]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("options", WORKING, ids=str)
def test_settings_that_work(options, tmp_path: Path) -> None:
    base = {"logger": None, "enable_checkpointing": None} if "barebones" in options else {}
    base |= {"enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None} if base else {}

    def trainer(**more):
        return make_trainer(tmp_path, **{**base, **options, **more})

    trainer().fit(small_teacher(epochs=2, rho=0.01), datamodule=small_data())
    module = small_matching(tmp_path / "trajectories", max_start_epoch=1)
    callbacks = [] if base else [EvaluateSynthetic(1, networks=1, epochs=2)]
    trainer(max_steps=3, callbacks=callbacks).fit(module, datamodule=small_data())
    assert torch.isfinite(SyntheticSet.load(tmp_path / "set.safetensors").images).all()
    evaluation, data = SyntheticEvaluation(**NET, networks=1), small_data(synthetic=str(tmp_path / "set.safetensors"))
    last = trainer(max_epochs=2)
    last.fit(evaluation, datamodule=data)
    last.test(evaluation, datamodule=data, verbose=False)
    assert 0 <= evaluation.results["accuracy"]["ftd"]["mean"] <= 1


def test_reloaded_dataloaders_continue(tmp_path: Path, trajectories: Path) -> None:
    sets = []
    for every in (0, 1):
        module = small_matching(trajectories)
        options = {"max_steps": 7, "reload_dataloaders_every_n_epochs": every}
        make_trainer(tmp_path / str(every), **options).fit(module, datamodule=small_data())
        sets.append(module.images.detach())
    assert torch.equal(*sets)


def test_a_store_is_enough_without_a_datamodule(tmp_path: Path) -> None:
    store = record(tmp_path)
    data = small_data()
    data.setup()
    module = small_matching(store, real=tuple(data.part("train")))
    make_trainer(tmp_path, max_steps=3).fit(module)
    with_data = small_matching(store)
    make_trainer(tmp_path / "data", max_steps=3).fit(with_data, datamodule=small_data())
    assert torch.equal(module.images, with_data.images)
    ours, theirs = module.synthetic_set(), with_data.synthetic_set()
    assert ours.class_names == theirs.class_names == data.class_names
    assert ours.transform.describe() == theirs.transform.describe()


def test_a_network_object_is_one_network(tmp_path: Path, trajectories: Path, refused) -> None:
    from ftd_lightning.models import ConvNet

    network = ConvNet(1, 10, 8, **SMALL)
    for kind in (FlatTeacher, SyntheticEvaluation, GradientMatching):
        with refused("ConvNet", "function"):
            kind(network=network)
    module = small_matching(trajectories, network=network)
    make_trainer(tmp_path, max_steps=1).fit(module, datamodule=small_data())
    by_name = small_matching(trajectories, network="convnet", network_options=SMALL)
    make_trainer(tmp_path / "name", max_steps=1).fit(by_name, datamodule=small_data())
    assert torch.equal(module.images, by_name.images)
    trainer = make_trainer(tmp_path / "e", max_steps=1, callbacks=[EvaluateSynthetic(1, networks=1, epochs=1)])
    with refused("function"):
        trainer.fit(small_matching(trajectories, network=network), datamodule=small_data())


def test_dropout_is_refused_before_teachers_are_trained(tmp_path: Path, refused) -> None:
    def module_dropout():
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))

    class Functional(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x.flatten(1), training=self.training))

    for network, words in ((module_dropout, "dropout"), (lambda: Functional(64, 10), "random numbers")):
        with refused(words):
            make_trainer(tmp_path).fit(FlatTeacher(network=network, teachers=1, epochs=1), datamodule=small_data())
    assert not list(tmp_path.rglob("teacher_*.safetensors"))
