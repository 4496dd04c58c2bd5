"""What TensorBoard shows, read back from the event files."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fits import SMALL, distil, make_trainer, small_data, small_teacher
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader, IterableDataset

from ftd_lightning import DistillationDataModule, SyntheticEvaluation
from ftd_lightning.callbacks import EvaluateSynthetic, HyperparameterReport, SyntheticEMA, TensorBoardPictures
from ftd_lightning.callbacks.tensorboard import picture_grid, picture_sheet, visible_channels
from ftd_lightning.errors import InputError
from ftd_lightning.modules import DistributionMatching


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def board(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="run", version="", default_hp_metric=False)


def hparams(events: EventAccumulator) -> dict[str, object]:
    # TensorBoard takes the columns of the whole page from the first experiment that it finds.
    assert "_hparams_/experiment" not in events.summary_metadata
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("hp")]
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

    def shows(tag: str, place: int, **pictures: torch.Tensor) -> bool:
        shown = np.asarray(Image.open(io.BytesIO(events.Images(tag)[place].encoded_image_string)))
        grids = {
            name.replace("_", " "): picture_grid(each, synthetic.labels, class_names=synthetic.class_names)
            for name, each in pictures.items()
        }
        return np.array_equal(shown, picture_sheet(grids).permute(1, 2, 0).numpy())

    assert [event.step for event in events.Images("synthetic/raw")] == [0, 5, 10]
    start = synthetic.transform.invert(module.initial_images).clamp(0, 1)
    assert shows("synthetic/raw", 0, **{"0_iterations": start})
    assert shows("synthetic/raw", -1, initial_images=start, **{"10_iterations": synthetic.pictures()})
    assert shows("synthetic/ema", -1, initial_images=start, **{"10_iterations": synthetic.pictures(ema=True)})
    histogram = events.Histograms("values/raw")[-1].histogram_value
    assert histogram.num == module.images.numel()
    assert histogram.max == pytest.approx(float(module.images.detach().max()), rel=1e-5)
    given = {"syn_steps": 3, "expert_epochs": 1, "max_start_epoch": 3, "lr_images": 10, "lr_step_size": 1e-3}
    given |= {"step_size_init": 0.1, "iterations_per_epoch": 5, "augment": "", "trajectories": str(trajectories)}
    found = {"dataset": "digits", "method": "mtt", "network": "convnet", "ipc": 1, "seed": 0}
    assert hparams(events) == {**found, **given}, "without what is at its default"


def test_foreign_modules_of_unknown_length_are_left_alone(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.zeros(3, 2, 32))

    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[TensorBoardPictures()])
    trainer.fit(BoringModel(), DataLoader(Stream(), batch_size=None))
    assert trainer.global_step == 6


def test_an_evaluation_shows_the_result_of_its_test(tmp_path: Path) -> None:
    module = SyntheticEvaluation(network_options=SMALL, networks=2, augment="")
    data = small_data(synthetic="random")
    trainer = make_trainer(tmp_path, logger=board(tmp_path), callbacks=[HyperparameterReport()], max_epochs=2)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    events = read(tmp_path / "run")
    assert hparams(events).items() >= {"networks": 2, "method": "random", "set": "random", "ipc": 1, "seed": 0}.items()
    shown = events.Scalars("evaluation/test_accuracy_mean")[-1].value
    assert shown == pytest.approx(module.results["accuracy"]["random"]["mean"])


def test_tensorboard_shows_settings_and_results_of_all_runs_side_by_side(tmp_path: Path) -> None:
    """As its HPARAMS page reads them: a column for each setting that any run has, and for each scalar."""
    for rho in (0.0, 0.5):
        logger = TensorBoardLogger(tmp_path, name=f"rho_{rho}", version="", default_hp_metric=False)
        callbacks = [HyperparameterReport()]
        trainer = make_trainer(tmp_path, logger=logger, callbacks=callbacks, log_every_n_steps=1)
        options = {"network_options": {"width": 4}, "augment": {"strategy": "crop"}}
        trainer.fit(small_teacher(teachers=1, epochs=1, rho=rho, **options), datamodule=small_data())
    values = hparams(read(tmp_path / "rho_0.5"))
    assert values.items() >= {"augment": "crop", "network_options.width": 4, "rho": 0.5, "dataset": "digits"}.items()
    assert {"alpha", "adaptive", "parallel", "weight_decay"}.isdisjoint(values), "at their default"
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    backend = Context(TBContext(logdir=str(tmp_path), multiplexer=multiplexer, data_provider=provider))
    infos = backend.hparams_metadata(RequestContext(), "")
    page = backend.experiment_from_metadata(RequestContext(), "", True, infos, [])
    assert {info.name for info in page.hparam_infos if info.differs} == {"rho"}
    assert {"teacher/val_accuracy", "teacher/train_loss"} <= {info.name.tag for info in page.metric_infos}


def test_the_grid_has_a_column_a_class_and_ten_columns_a_band() -> None:
    pictures = (torch.arange(200).view(200, 1, 1, 1) % 100).expand(200, 3, 32, 32) / 255
    grid = picture_grid(pictures, torch.arange(200) % 100)
    band = 2 + 20 + 2 * 98
    assert grid.shape == (3, 2 + 10 * band, 2 + 10 * 98)
    single = {count: picture_grid(pictures[:count], torch.arange(count)).shape[1:] for count in (2, 10, 13, 60)}
    sizes = {2: (1, 2), 10: (2, 5), 13: (3, 5), 60: (6, 10)}
    assert single == {count: (2 + rows * 120, 2 + columns * 98) for count, (rows, columns) in sizes.items()}
    for row in range(2):
        shown = grid[0, 22 + 98 * row :: band, 2::98][:10, :10]
        assert shown.flatten().tolist() == list(range(100))


@pytest.mark.parametrize(("size", "cell"), [((8, 8), (96, 96)), ((32, 24), (96, 72)), ((8, 64), (48, 384))])
def test_any_height_and_width_is_enlarged_by_a_whole_factor(size: tuple[int, int], cell: tuple[int, int]) -> None:
    labels = torch.eye(2)[[0, 1, 1]]  # a teacher's: a class with fewer images hides none of another
    grid = picture_grid(torch.zeros(3, 1, *size), labels, class_names=["a", "n02105641"], columns=2)
    head = 34 if cell[1] < 100 else 20  # "old english sheepdog" takes two lines above a narrow column
    assert grid.shape == (3, 4 + head + 2 * (cell[0] + 2), 2 + 2 * (cell[1] + 2))
    assert int((grid == 0).all(0)[2 + head :].sum()) == 3 * cell[0] * cell[1]


def test_a_sheet_puts_grids_under_their_names() -> None:
    grids = {name: torch.full((3, 50, 300), value, dtype=torch.uint8) for name, value in (("one", 0), ("two", 99))}
    below, beside = picture_sheet(grids), picture_sheet(grids, 2)
    assert (below.shape, beside.shape) == ((3, 2 + 2 * 78, 304), (3, 80, 606))
    assert torch.equal(below[:, 28:78, 2:302], grids["one"])
    high = picture_sheet({"high": torch.zeros(3, 90, 200, dtype=torch.uint8), **grids})
    assert torch.equal(high[:, 118:], below), "each set takes its own height"
    assert torch.equal(beside[:, 28:78, 304:604], grids["two"])
    assert (below[:, 2:28] == 0).any(), "the name"


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3), (13, 3)])
def test_channels_that_eyes_lack_are_left_out(channels: int, shown: int) -> None:
    pictures = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    with pytest.warns(UserWarning, match=f"pictures show the first {shown} of {channels} channels"):
        assert torch.equal(picture_grid(pictures, labels), picture_grid(pictures[:, :shown], labels))


def test_a_distillation_of_thirteen_channels_shows_those_that_are_chosen(tmp_path: Path) -> None:
    pictures = torch.rand(20, 13, 8, 8, generator=torch.Generator().manual_seed(0))
    data = DistillationDataModule.from_datasets((pictures, torch.arange(20) % 2), (pictures, torch.arange(20) % 2))
    module = DistributionMatching(network="convnet", network_options=SMALL, augment="", iterations_per_epoch=1)
    callbacks = [TensorBoardPictures(channels=[3, 2, 1])]
    make_trainer(tmp_path, logger=board(tmp_path), callbacks=callbacks, max_steps=1).fit(module, datamodule=data)
    encoded = read(tmp_path / "run").Images("synthetic/raw")[0].encoded_image_string
    synthetic = replace(module.synthetic_set(), images=module.initial_images)
    grid = picture_grid(synthetic.pictures(channels=[3, 2, 1]), synthetic.labels, class_names=synthetic.class_names)
    sheet = picture_sheet({"0 iterations": grid})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), sheet.permute(1, 2, 0).numpy())
    for refused in ([0, 1], [0, 1, 13]):
        with pytest.raises(InputError, match="one or three of the 13, which are numbered from 0 to 12"):
            visible_channels(13, refused)
