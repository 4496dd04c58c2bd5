"""What TensorBoard shows, read back from the event files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import SMALL, distil, make_trainer, small_data
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ftd_lightning import SyntheticEvaluation, lightning_cli
from ftd_lightning.callbacks import EvaluateSynthetic, HyperparameterReport, SyntheticEMA, TensorBoardPictures
from ftd_lightning.callbacks.tensorboard import picture_grid


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def board(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="run", version="", default_hp_metric=False)


def hparams(events: EventAccumulator) -> dict[str, object]:
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()}


def test_a_distillation_shows_scalars_pictures_histograms_and_settings(tmp_path: Path, trajectories: Path) -> None:
    measure = EvaluateSynthetic(every_n_epochs=2, networks=2, epochs=2)
    callbacks = [SyntheticEMA(0.5), measure, TensorBoardPictures(every_n_epochs=1), HyperparameterReport()]
    trainer = {"logger": board(tmp_path), "log_every_n_steps": 1}
    module = distil(tmp_path, trajectories, steps=10, callbacks=callbacks, trainer=trainer)
    events, synthetic = read(tmp_path / "run"), module.synthetic_set()
    for tag in ("matching/loss", "matching/step_size", "gradient_norm/images", "gradient_norm/step_size"):
        assert [event.step for event in events.Scalars(tag)] == list(range(10)), tag
        assert all(np.isfinite(event.value) and event.value >= 0 for event in events.Scalars(tag)), tag
    assert events.Scalars("evaluation/ema_val_accuracy_mean")

    def differs(tag: str, place: int, pictures: torch.Tensor) -> bool:
        shown = np.asarray(Image.open(io.BytesIO(events.Images(tag)[place].encoded_image_string)))
        grid = picture_grid(pictures, synthetic.labels, class_names=synthetic.class_names)
        return not np.array_equal(shown, grid.permute(1, 2, 0).numpy())

    assert [event.step for event in events.Images("synthetic/raw")] == [0, 5, 10]
    assert not differs("synthetic/raw", 0, synthetic.transform.invert(module.initial_images).clamp(0, 1))
    assert not differs("synthetic/raw", -1, synthetic.pictures())
    assert not differs("synthetic/ema", -1, synthetic.pictures(ema=True))
    histogram = events.Histograms("values/raw")[-1].histogram_value
    assert histogram.num == module.images.numel()
    assert histogram.max == pytest.approx(float(module.images.detach().max()), rel=1e-5)
    assert (hparams(events)["syn_steps"], hparams(events)["lr_images"]) == (3, 10)
    assert events.Scalars("hp/matching/loss")[-1].value == events.Scalars("matching/loss")[-1].value


def test_settings_of_a_command_are_flat_and_its_own_keys_left_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).resolve().parents[2] / "configs" / "digits" / "teacher_ftd.yaml"
    options = ["--model.teachers=1", "--model.epochs=1", "--model.network_options={width: 8, depth: 2}"]
    options += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.max_per_class=14"]
    lightning_cli.run(["fit", "--config", str(config), *options])
    (file,) = tmp_path.rglob("events*")
    events = read(file)
    values = hparams(events)
    nested = {"augment/strategy": "crop_scale_rotate", "network_options/width": 8, "network_options/depth": 2}
    assert values.items() >= {**nested, "epochs": 1, "network": "convnet"}.items()
    assert not [key for key in values if any(part.startswith("_") for part in key.split("/"))]
    shown = {tag for tag in events.Tags()["scalars"] if tag.startswith("hp/")}
    assert shown >= {"hp/teacher/train_accuracy", "hp/teacher/val_accuracy"}


def test_an_evaluation_shows_the_result_of_its_test(tmp_path: Path) -> None:
    module = SyntheticEvaluation(network_options=SMALL, networks=2, augment="")
    data = small_data(synthetic="random")
    trainer = make_trainer(tmp_path, logger=board(tmp_path), callbacks=[HyperparameterReport()], max_epochs=2)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    scalars: dict[str, float] = {}
    for file in (tmp_path / "run").glob("events*"):
        events = read(file)
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        if "_hparams_/session_start_info" in events.summary_metadata:
            assert hparams(events)["networks"] == 2
    shown = scalars["hp/evaluation/test_accuracy_mean"]
    assert shown == pytest.approx(module.results["accuracy"]["random"]["mean"])


def test_the_grid_has_a_column_a_class_and_ten_columns_a_band() -> None:
    pictures = (torch.arange(200).view(200, 1, 1, 1) % 100).expand(200, 3, 32, 32) / 255
    grid = picture_grid(pictures, torch.arange(200) % 100)
    band = 20 + 2 + 2 * 98
    assert grid.shape == (3, 10 * band, 2 + 10 * 98)
    for row in range(2):
        shown = grid[0, 22 + 98 * row :: band, 2::98][:10, :10]
        assert shown.flatten().tolist() == list(range(100))


def test_a_class_with_fewer_images_hides_none_of_another() -> None:
    labels = torch.eye(3)[[0, 1, 1]]  # a teacher's, who takes the third image for one of the second class
    grid = picture_grid(torch.zeros(3, 1, 96, 96), labels)
    black = [[not grid[:, 22 + 98 * row, 2 + 98 * column].any() for column in range(2)] for row in range(2)]
    assert black == [[True, True], [False, True]]


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (13, 3)])
def test_channels_that_eyes_lack_are_left_out(channels: int, shown: int) -> None:
    pictures = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    assert torch.equal(picture_grid(pictures, labels), picture_grid(pictures[:, :shown], labels))
