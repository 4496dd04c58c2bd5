"""TensorBoard, beside the modules' scalars: pictures, histograms, hyper-parameters with their results."""

from __future__ import annotations

import inspect
import math
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jsonargparse import dict_to_namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from ftd_lightning.bounds import check_bounds
from ftd_lightning.callbacks.evaluation import is_due, is_last_epoch
from ftd_lightning.contracts import LearnsSet, data_source
from ftd_lightning.core.arguments import plain, plain_settings
from ftd_lightning.data.imagenet import SUBSETS
from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

LONG, SHORT = 96, 48  # least length of the sides of a picture in a grid, in pixels
GAP = 2
COLUMNS = 10  # classes side by side: a wider grid is shrunk wherever it is shown
NAME, TITLE = 14, 20  # height of letters in pixels
WORDNET = {wnid: name for names in SUBSETS.values() for wnid, name in names.items()}


def visible_channels(count: int, channels: Sequence[int] | None = None) -> list[int]:
    """Choose the one or three channels that pictures show, by their numbers from 0.

    By default one or three are shown as they are, of others the first three, or the first of two; a warning says so.
    An InputError refuses channels that are not there.
    """
    if channels is None:
        channels = range(3 if count >= 3 else 1)
        if count not in (1, 3):
            text = (
                f"pictures show the first {len(channels)} of {count} channels; channels= or --channels chooses others"
            )
            warnings.warn(text, stacklevel=2)
    if len(channels) not in (1, 3) or not all(0 <= channel < count for channel in channels):
        raise InputError(f"channels: name one or three of the {count}, which are numbered from 0 to {count - 1}")
    return list(channels)


def picture_grid(
    pictures: Tensor,
    labels: Tensor,
    *,
    class_names: Sequence[str] = (),
    per_class: int = 10,
    columns: int | None = None,
) -> Tensor:
    """Lay pictures out with one column per class under its name, so many columns side by side, the next ones below.

    Small pictures are enlarged by a whole factor, to 96 pixels on the longer side and 48 on the shorter one.

    Args:
        pictures: (N, C, H, W) in [0, 1]; see :func:`visible_channels`.
        labels: (N,) classes, or (N, K) probabilities.
        class_names: in label order, written without accents and as far as they fit; WordNet ids of the ImageNet subsets
            by their words. Classes without a name in ASCII are numbered.
        per_class: rows at most; a class with fewer images leaves the rest of its column white.
        columns: side by side; None: at most ten, for a grid about twice as wide as high.

    Returns:
        (3, height, width) uint8, on the CPU.
    """
    classes = labels if labels.ndim == 1 else labels.argmax(1)
    places = {label: (classes == label).nonzero().squeeze(1)[:per_class] for label in classes.unique().tolist()}
    visible = pictures[:, visible_channels(pictures.shape[1])].detach().cpu().clamp(0, 1)
    visible = (visible * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    factor = max(-(-LONG // max(visible.shape[2:])), -(-SHORT // min(visible.shape[2:])))
    visible = visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    # Labels of teachers may give one class two images and another none: all of them are shown.
    rows, (height, width) = max(len(index) for index in places.values()), visible.shape[2:]
    wanted = columns or min(math.ceil(math.sqrt(2 * len(places) * rows * height / width)), COLUMNS)
    columns = -(-len(places) // -(-len(places) // wanted))  # the last band is about as full as the others
    bands = []
    for first in range(0, len(places), columns):
        band = list(places.items())[first : first + columns]
        cells = torch.full((rows, columns, *visible.shape[1:]), 255, dtype=torch.uint8)
        for column, (_, index) in enumerate(band):
            cells[: len(index), column] = visible[index]
        grid = make_grid(cells.flatten(0, 1), nrow=columns, padding=GAP, pad_value=255)
        names = {label: class_names[label] if label < len(class_names) else "" for label, _ in band}
        texts = [_printable(WORDNET.get(name, name)) or str(label) for label, name in names.items()]
        bands += [_heading(texts, width, grid.shape[-1]), grid]
    return torch.cat(bands, 1)


def picture_sheet(grids: Mapping[str, Tensor], across: int = 1) -> Tensor:
    """Put grids below one another, or so many side by side, each under its name; (3, height, width) uint8."""
    font, line = ImageFont.load_default(TITLE), TITLE + 6
    height = line + max(grid.shape[1] for grid in grids.values())
    width = max(max(grid.shape[2], 8 + math.ceil(font.getlength(_printable(name)))) for name, grid in grids.items())
    cells = torch.full((len(grids), 3, height, width), 255, dtype=torch.uint8)
    for cell, (name, grid) in zip(cells, grids.items(), strict=True):
        strip = Image.new("RGB", (width, line), "white")
        ImageDraw.Draw(strip).text((4, 2), _printable(name), fill="black", font=font)
        cell[:, :line] = torch.from_numpy(np.array(strip)).permute(2, 0, 1)
        cell[:, line : line + grid.shape[1], : grid.shape[2]] = grid
    return make_grid(cells, nrow=across, padding=0)


def _printable(name: str) -> str:
    """Reduce a name to one line of ASCII, which Pillow's font can draw; letters lose their accents."""
    return " ".join(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().split())


def _heading(texts: Sequence[str], column: int, width: int) -> Tensor:
    """Write texts above columns of so many pixels each, on one line or two; (3, 20 or 34, width) uint8."""
    font, room = ImageFont.load_default(NAME), column - 3 * GAP  # neighbours do not touch
    wrapped = [textwrap.wrap(text.replace("_", " "), room // 7, break_long_words=False)[:2] for text in texts]
    strip = Image.new("RGB", (width, 6 + NAME * max(map(len, wrapped))), "white")
    for place, lines in enumerate(wrapped):
        middle = GAP + place * (column + GAP) + column // 2
        for row, line in enumerate(lines):
            while font.getlength(line) > room:
                line = line[:-1]
            ImageDraw.Draw(strip).text((middle, GAP + NAME * row), line, fill="black", font=font, anchor="ma")
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)


def _boards(trainer: Trainer) -> list[Any]:
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class TensorBoardPictures(Callback):
    """Shows the synthetic images, whitening undone, below those that they began as, and histograms of their values.

    Args:
        every_n_epochs: how often, in Lightning epochs of ``iterations_per_epoch``, and at the beginning and the end;
            None: ten times in a fit; 0: never between.
        per_class: pictures of each class at most.
        channels: numbers, from 0, of the one or three channels to show; None: the first three, or the first of two.
    """

    def __init__(
        self, every_n_epochs: int | None = None, per_class: int = 10, channels: list[int] | None = None
    ) -> None:
        check_bounds(TensorBoardPictures, locals())
        self.every_n_epochs = every_n_epochs
        self.per_class = per_class
        self.channels = channels

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the initial images."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the present images."""
        if is_last_epoch(trainer) or is_due(trainer, self.every_n_epochs, times=10):
            self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        if not isinstance(module, LearnsSet) or not (boards := _boards(trainer)):
            return
        synthetic, step = module.synthetic_set(), trainer.global_step
        channels = visible_channels(synthetic.images.shape[1], self.channels)

        def grid(*, ema: bool = False) -> Tensor:
            pictures = synthetic.pictures(ema=ema, channels=channels)
            return picture_grid(pictures, synthetic.labels, class_names=synthetic.class_names, per_class=self.per_class)

        values = {"raw": synthetic.images, "ema": synthetic.ema_images}
        grids = {name: grid(ema=name == "ema") for name, images in values.items() if images is not None}
        start = {}
        if step > 0 and module.initial_images is not None:
            synthetic.images = module.initial_images.cpu()
            start["initial images"] = grid()
        for name, learned in grids.items():
            sheet = picture_sheet({**start, f"{step} iterations": learned})
            for logger in boards:
                logger.experiment.add_image(f"synthetic/{name}", sheet, step)
                logger.experiment.add_histogram(f"values/{name}", values[name], step)


def run_settings(trainer: Trainer, module: LightningModule) -> dict[str, float | str]:
    """Return what tells runs apart: data set, method, set, ipc, network, seed, and arguments that are no defaults."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    options, source = {} if datamodule is None else datamodule.hparams, data_source(datamodule)
    parameters = inspect.signature(type(module)).parameters
    defaults = {name: plain(parameter.default) for name, parameter in parameters.items()}
    kept, own = ("seed", "ipc", "network"), plain_settings(module.hparams)
    found: dict[str, Any] = {"dataset": options.get("dataset")}
    found |= {key: own[key] for key in own if key in kept or own[key] not in (defaults.get(key), [])}
    if isinstance(module, LearnsSet):
        learned = module.synthetic_set().metadata
        found |= {"method": learned.get("method"), "network": learned.get("network", {}).get("name")}
    elif source is not None and (synthetic := source.training_set()) is not None:
        found["method"], file = synthetic.metadata.get("method"), options.get("synthetic")
        found["set"] = file and "/".join(Path(file).parts[-2:])
        found["ipc"] = len(synthetic.images) / source.description().shape.num_classes
    if isinstance(found.get("augment"), Mapping):
        found["augment"] = found["augment"]["strategy"]
    flat = {key: value for key, value in dict_to_namespace(found).items() if value is not None}
    return {key: value if type(value) in (int, float) else str(value) for key, value in flat.items()}


class HyperparameterReport(Callback):
    """Writes the settings of a run to TensorBoard's HPARAMS page, once, at the end.

    They are data set, method, set, ipc, network, seed, and arguments of the module that are not at their default; an
    empty cell is the default. Nested ones have names like ``network_options.width``. The page shows them beside the
    run's last scalars. A logger of your own needs ``default_hp_metric=False``, or Lightning's entry is shown.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, unless a test with the result follows."""
        if not is_overridden("test_step", pl_module):
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them with the result of the test."""
        self._write(trainer, pl_module)

    @staticmethod
    def _write(trainer: Trainer, pl_module: LightningModule) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for logger in _boards(trainer):
            # Without the summary of an experiment: TensorBoard would take the columns of the first run for all.
            _, start, end = hparams(run_settings(trainer, pl_module), {})
            with SummaryWriter(logger.log_dir) as writer:
                for summary in (start, end):
                    writer.file_writer.add_summary(summary)
