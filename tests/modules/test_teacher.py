import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from fits import SMALL, make_trainer, record, small_data, small_teacher
from lightning.pytorch import Callback
from torch import nn

from ftd_lightning import FlatTeacher, TrajectoryStore
from ftd_lightning.callbacks import TrajectoryRecorder
from ftd_lightning.core import losses as teacher_pass
from ftd_lightning.core.module import computes_bf16
from ftd_lightning.errors import DivergenceError, InputError
from ftd_lightning.functional import flatten_parameters, load_flat
from ftd_lightning.models import ConvNet
from ftd_lightning.modules import teacher as teacher_module
from ftd_lightning.modules.teacher import LONGEST


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_teachers_of_rho_0_are_plain_sgd(tmp_path: Path, momentum: float) -> None:
    """Against a loop that shares nothing with the module but the order of batches."""
    store = TrajectoryStore(record(tmp_path, momentum=momentum))
    data = small_data()
    data.setup()
    loader = data.train_dataloader()
    for teacher in range(2):
        network = ConvNet(1, 10, 8, **SMALL)
        recorded = store.trajectory(teacher)
        load_flat(network, recorded[0])
        sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=momentum)
        for epoch in range(4):
            loader.sampler.set_epoch(teacher * LONGEST + epoch)
            right = 0
            for images, labels in loader:
                sgd.zero_grad()
                logits = network(images)
                nn.functional.cross_entropy(logits, labels).backward()
                sgd.step()
                right += int((logits.argmax(1) == labels).sum())
            torch.testing.assert_close(flatten_parameters(network), recorded[epoch + 1], rtol=1e-5, atol=1e-6)
            said = store.teacher_metadata(teacher)["accuracies"][epoch]  # of training images, because none is held out
            assert said == pytest.approx(right / len(data.part("train").labels), abs=1e-6)


def test_the_store_says_what_it_is(trajectories: Path) -> None:
    store = TrajectoryStore(trajectories)
    assert (len(store), store.epochs) == (2, 4)
    assert store.metadata["network"]["options"] == SMALL
    assert store.metadata["dataset"]["name"] == "digits"
    assert store.metadata["transform"]["kind"] == "standardization"
    assert (store.metadata["rho"], store.metadata["optimizer"], store.metadata["batch_size"]) == (0.0, "SGD", 32)
    own = [store.teacher_metadata(index) for index in range(2)]
    assert own[0]["seed"] != own[1]["seed"]
    assert len(own[0]["accuracies"]) == 4
    assert own[0]["versions"]["torch"] == torch.__version__


def test_running_statistics_are_those_of_the_first_pass_alone(tmp_path: Path) -> None:
    module = small_teacher(network_options={**SMALL, "norm": "batch"}, rho=0.5, teachers=1, epochs=1)
    data = small_data()
    make_trainer(tmp_path, limit_train_batches=1).fit(module, datamodule=data)
    reference = module.fresh.build(0, "teacher", 0)
    images, _ = next(iter(data.train_dataloader()))
    reference(images)
    norms = [next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)) for net in (module.network, reference)]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)
    assert torch.equal(norms[0].running_var, norms[1].running_var)
    assert norms[0].num_batches_tracked == 1


def test_max_epochs_of_the_trainer_bounds_the_fit_with_a_word(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(str(tmp_path / "store"))
    trainer = make_trainer(tmp_path, max_epochs=4, callbacks=[recorder], limit_val_batches=0)
    told = pytest.warns(UserWarning, match="store: 1 of 2 teachers of 4 epochs are recorded")
    with pytest.warns(UserWarning, match="ends this fit before its 2 teachers"), told:
        trainer.fit(small_teacher(), datamodule=small_data())
    assert len(TrajectoryStore(tmp_path / "store")) == 1


def test_a_store_of_other_settings_is_not_mixed_up(tmp_path: Path) -> None:
    folder = record(tmp_path, teachers=1)
    with pytest.raises(InputError, match="holds teachers recorded with another lr"):
        record(tmp_path, teachers=1, lr=0.05)
    with pytest.raises(InputError, match=r"teacher_0000.*recorded with another seed"):
        record(tmp_path, teachers=1, seed=1)
    assert len(list(folder.glob("teacher_*"))) == 1


def test_recorded_teachers_are_not_trained_again(tmp_path: Path, refused) -> None:
    folder = record(tmp_path, teachers=1, epochs=1)
    with refused(f"{folder}: holds all 1 teachers of 1 epochs already"):
        record(tmp_path, teachers=1, epochs=1)
    record(tmp_path, epochs=2)
    assert TrajectoryStore(folder).lengths == [2, 2]


def test_teachers_that_diverge_end_the_fit_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="lower its lr"):
        record(tmp_path, lr=1e38)
    assert not list((tmp_path / "trajectories").glob("teacher_*"))


def test_predictions_are_the_logits_of_the_test_images(tmp_path: Path, refused) -> None:
    module, data, trainer = small_teacher(teachers=1, epochs=1), small_data(), make_trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    logits = torch.cat(trainer.predict(module, datamodule=data))
    with torch.no_grad():
        expected = module.network(data.test.images)
        assert torch.equal(module(data.test.images), expected)
    torch.testing.assert_close(logits, expected)
    with refused("FlatTeacher has no test: it has fit, validate, predict"):
        trainer.test(module, datamodule=data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "batch"},
        {"precision": "bf16"},
        {"adaptive": True, "momentum": 0.9, "weight_decay": 0.1},
        {"rho": 0.0},
    ],
    ids=["instance", "batch", "bf16", "momentum", "plain"],
)
def test_compiled_teachers_are_the_eager_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options) -> None:
    """With another backend than the default, which takes a minute; Dynamo is the same. The last batch is smaller."""
    settings = {"teachers": 1, "epochs": 2, "rho": 0.1, **options}
    network, precision = {**SMALL, "norm": settings.pop("norm", "instance")}, options.get("precision", "float32")
    monkeypatch.setattr(teacher_pass, "compiled", partial(teacher_pass.compiled, backend="aot_eager"))

    def trained(compiles: bool | str):
        module = small_teacher(compile=compiles, network_options=network, **settings)
        make_trainer(tmp_path / str(compiles)).fit(module, datamodule=small_data())
        return module.network.state_dict()

    eager, *compiled = trained(False), trained(True), trained("cuda_graphs")  # the last one: whole steps
    close = {"rtol": 0, "atol": 5e-3} if precision == "bf16" else {"rtol": 1e-5, "atol": 1e-6}  # weights move by 0.1
    for fast in compiled:
        for name, value in fast.items():
            torch.testing.assert_close(value, eager[name], **close)


class Seen(Callback):
    """Keeps the types of outputs, weights and GSAM's directions."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        weights = list(pl_module.network.parameters())
        self.types = {w.dtype for w in weights}, {w.grad.dtype for w in weights}

    def on_fit_start(self, trainer, pl_module) -> None:
        pl_module.network.register_forward_hook(lambda module, given, logits: setattr(self, "logits", logits.dtype))


def test_bf16_is_lightnings_and_weights_stay_float32(tmp_path: Path, monkeypatch, refused) -> None:
    """The module's precision and the trainer's are one thing, which store and checkpoint record."""
    seen = Seen()

    def trained(name: str, trainer=None, ckpt_path=None, **options) -> TrajectoryStore:
        recorder = TrajectoryRecorder(str(tmp_path / name))
        module = small_teacher(rho=0.1, teachers=1, epochs=2, **options)
        settings = {"callbacks": [recorder, seen], "limit_val_batches": 0, **(trainer or {})}
        (fitted := make_trainer(tmp_path, **settings)).fit(module, datamodule=small_data(), ckpt_path=ckpt_path)
        fitted.save_checkpoint(tmp_path / f"{name}.ckpt")
        return TrajectoryStore(tmp_path / name)

    by_trainer = trained("trainer", {"precision": "bf16-mixed"})
    by_module = trained("module", precision="bf16")
    assert (seen.logits, *seen.types) == (torch.bfloat16, {torch.float32}, {torch.float32})
    assert torch.equal(by_module.trajectory(0), by_trainer.trajectory(0))
    assert by_module.metadata == by_trainer.metadata
    assert by_module.metadata["precision"] == "bf16-mixed"

    full = trained("float32")
    assert (full.metadata["precision"], seen.logits) == ("32-true", torch.float32)
    assert not torch.equal(full.trajectory(0), by_module.trajectory(0))
    for able, same in ((True, by_module), (False, full)):
        monkeypatch.setattr(teacher_module, "computes_bf16", lambda device, able=able: able)
        assert torch.equal(trained(f"auto-{able}", precision="auto").trajectory(0), same.trajectory(0))

    with refused("trainer.precision='32-true', but the checkpoint was made with 'bf16-mixed'"):
        trained("resumed", ckpt_path=tmp_path / "module.ckpt")


@pytest.mark.parametrize(("able", "capabilities"), [(True, {"avx512_bf16": True}), (False, {"avx512_f": True})])
def test_bf16_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, able: bool, capabilities: dict) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_bf16(torch.device("cpu")) is able
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_bf16(torch.device("cpu"))


def test_unknown_settings_are_refused(tmp_path: Path, refused) -> None:
    with refused("parallel='ranks'", "teachers", "data"):
        small_teacher(parallel="ranks")
    with refused("precision='float16'", "auto"):
        small_teacher(precision="float16")
    with refused("compile='yes'"):
        make_trainer(tmp_path).fit(small_teacher(compile="yes"), datamodule=small_data())


def test_a_fit_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        record(tmp_path, teachers=1)


def test_a_store_is_lengthened_by_the_same_fit_with_more_epochs(tmp_path: Path) -> None:
    options = {"rho": 0.05, "augment": "crop", "teachers": 2}
    folder = record(tmp_path, epochs=2, **options)
    short = [TrajectoryStore(folder).trajectory(teacher).clone() for teacher in range(2)]
    assert record(tmp_path, epochs=3, **options) == folder
    for teacher, recorded in enumerate(short):
        longer = TrajectoryStore(folder).trajectory(teacher)
        assert len(longer) == 4
        assert torch.equal(longer[:3], recorded)
    with pytest.raises(InputError, match="holds all 2 teachers of 1 epochs already"):
        record(tmp_path, epochs=1, **options)
    assert len(TrajectoryStore(folder).trajectory(0)) == 4


def test_an_epoch_is_logged_once_and_whole_also_where_it_is_resumed_in_its_middle(tmp_path: Path, monkeypatch) -> None:
    logged = []
    monkeypatch.setattr(
        FlatTeacher,
        "log",
        lambda self, name, metric, **_: logged.append((name, float(metric.mean_value / metric.weight))),
    )

    def fit(folder: str, resumed: Path | None = None, **limits) -> None:
        trainer = make_trainer(tmp_path / folder, limit_val_batches=0, **limits)
        trainer.fit(small_teacher(teachers=1, epochs=1), datamodule=small_data(), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / folder / "saved.ckpt", weights_only=False)

    fit("whole")
    assert [name for name, _ in logged] == ["teacher/train_loss", "teacher/train_accuracy"]
    with pytest.warns(UserWarning, match="0 of 1 teachers"):
        fit("part", max_steps=2)
    assert len(logged) == 2
    fit("part", tmp_path / "part" / "saved.ckpt")
    assert logged[2:] == logged[:2]
