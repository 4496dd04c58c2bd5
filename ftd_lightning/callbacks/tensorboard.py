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

import torch
from jsonargparse import dict_to_namespace
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor
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


def visible_channels(count: int, channels: int | Sequence[int] | None = None) -> list[int]:
    """Choose the one or three channels that pictures show, by their numbers from 0.

    By default one or three are shown as they are, of others the first three, or the first of two; a warning says so.
    An InputError refuses channels that are not there.
    """
    if channels is None:
        channels = range(3 if count >= 3 else 1)
        if count not in (1, 3):
            shown = f"pictures show the first {len(channels)} of {count} channels"
            warnings.warn(f"{shown}; channels= or --channels chooses others", stacklevel=2)
    chosen = [channels] if isinstance(channels, int) else list(channels)
    if len(chosen) not in (1, 3) or not all(0 <= channel < count for channel in chosen):
        raise InputError(f"channels: name one or three of the {count}, which are numbered from 0 to {count - 1}")
    return chosen


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
    visible = pictures[:, visible_channels(pictures.shape[1])].detach().cpu().clamp(0, 1)
    visible = (visible * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    factor = max(-(-LONG // max(visible.shape[2:])), -(-SHORT // min(visible.shape[2:])))
    visible = visible.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    visible = functional.pad(visible, (0, 0, 0, GAP), value=255)
    tiles = []
    for label in classes.unique().tolist():
        name = class_names[label] if label < len(class_names) else ""
        column = visible[(classes == label).cpu()][:per_class].transpose(0, 1).flatten(1, 2)
        tiles.append((_printable(WORDNET.get(name, name)) or str(label), column))
    height, width = max(column.shape[1] for _, column in tiles), visible.shape[3]
    wanted = columns or min(math.ceil(math.sqrt(2 * len(tiles) * height / width)), COLUMNS)
    return _titled(tiles, -(-len(tiles) // -(-len(tiles) // wanted)), NAME)  # the last band is as full as the others


def picture_sheet(grids: Mapping[str, Tensor], across: int = 1) -> Tensor:
    """Put grids below one another, or so many side by side, each under its name; (3, height, width) uint8."""
    tiles = [(_printable(name), grid) for name, grid in grids.items()]
    rows = [_titled(tiles[first : first + across], across, TITLE) for first in range(0, len(tiles), across)]
    width = max(row.shape[2] for row in rows)  # heights differ: each set has its own number of images
    rows = [functional.pad(row, (0, width - row.shape[2]), value=255) for row in rows]
    return torch.cat([rows[0], *(row[:, GAP:] for row in rows[1:])], 1)  # with one gap between two


def _printable(name: str) -> str:
    """Reduce a name to one line of ASCII, which Pillow's font can draw; letters lose their accents."""
    return " ".join(unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().replace("_", " ").split())


def _titled(tiles: Sequence[tuple[str, Tensor]], across: int, letters: int) -> Tensor:
    """Put pictures, (3, H, W) uint8, side by side, each under its name, on one line or two as far as it fits."""
    height, width = (max(picture.shape[axis] for _, picture in tiles) for axis in (1, 2))
    # Letters are half as wide as high on average.
    names = ["\n".join(textwrap.wrap(name, 2 * width // letters)[:2]) for name, _ in tiles]
    head = 6 + letters * (1 + any("\n" in name for name in names))
    cells = torch.full((len(tiles), 3, head + height, width), 255, dtype=torch.uint8)
    for cell, name, (_, picture) in zip(cells, names, tiles, strict=True):
        strip = Image.new("RGB", (width, head), "white")
        ImageDraw.Draw(strip).text((0, 0), name, fill="black", font=ImageFont.load_default(letters), spacing=0)
        cell[:, :head] = pil_to_tensor(strip)
        cell[:, head : head + picture.shape[1], : picture.shape[2]] = picture
    if len(cells) == 1:  # which ``make_grid`` leaves without a margin
        return functional.pad(cells[0], [GAP] * 4, value=255)
    return make_grid(cells, nrow=across, padding=GAP, pad_value=255)


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
        if not isinstance(pl_module, LearnsSet):  # whose epochs may be of unknown length
            return
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
