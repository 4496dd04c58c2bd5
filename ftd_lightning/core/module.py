"""Trainer settings that would change what is computed, refused before anything is trained."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ftd_lightning.contracts import DataDescription, ImageShape, Stateful, data_source
from ftd_lightning.core.arguments import plain_settings
from ftd_lightning.core.networks import FreshNetworks
from ftd_lightning.core.resume import (
    HARMLESS,
    LIMITS,
    as_json,
    mend_progress,
    refuse_changes,
    refuse_other_data,
    refuse_own_network,
)
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint
from ftd_lightning.files.transforms import load_transform
from ftd_lightning.functional.compiling import Compile, compiles
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import Callback, Trainer
    from torch import nn

    from ftd_lightning.contracts import DataSource
    from ftd_lightning.core.networks import Network
    from ftd_lightning.functional.augment import Augmentation


PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def refuse_callbacks(trainer: Trainer, *, several: bool) -> None:
    """Refuse callbacks that treat the teachers of a fit, trained one after the other, as one network.

    Args:
        trainer: of the fit.
        several: whether a process trains several teachers.

    Raises:
        InputError: for an EarlyStopping on a metric of single teachers, or a StochasticWeightAveraging.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging):
            raise InputError("StochasticWeightAveraging would average weights of different teachers: leave it out")
        if several and isinstance(callback, EarlyStopping) and callback.monitor.startswith("teacher/"):
            raise InputError(
                f"EarlyStopping compares {callback.monitor} of a teacher with the best of earlier teachers, and ends "
                "the whole fit: leave it out, or fit one teacher"
            )


def deciding_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer that change a fit's numbers; a resumed fit has those of its checkpoint."""
    return {"precision": trainer.precision, "gradient_clip_val": trainer.gradient_clip_val}


def refuse_settings(trainer: Trainer, augment: Augmentation) -> None:
    """Refuse settings under which a fit would not compute what it says.

    Half-precision weights lose what the methods compare, differences of close weight vectors; float16 autocast scales
    the loss, which the passes inside a step do not know of.

    Args:
        trainer: of the fit.
        augment: of the fit's images.

    Raises:
        InputError: naming the setting and what to use instead.
    """
    if trainer.precision not in PRECISIONS:
        raise InputError(f"trainer.precision={trainer.precision} is not supported: use {' or '.join(PRECISIONS)}")
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            "trainer.accumulate_grad_batches must be 1: every batch is one update; TrajectoryMatching averages several "
            "segments per update with model.segments_per_step"
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise InputError("trainer.overfit_batches is not supported: use trainer.limit_train_batches")
    if torch.are_deterministic_algorithms_enabled() and not augment.deterministic_on(trainer.strategy.root_device):
        raise InputError(
            "trainer.deterministic: scale and rotate have no deterministic gradient on a GPU: leave them out "
            "of augment, or set trainer.deterministic to false"
        )


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a fit's files: beside its logs, or the trainer's default where it keeps none.

    Loggers without a log folder of their own (Wandb) get ``save_dir/name/version``, where Lightning puts their
    checkpoints too, so that two runs never share a folder.

    Convention: not ``trainer.log_dir``, which is a broadcast: called by the first rank alone, it waits for the others
    for ever.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return Path(trainer.default_root_dir)  # "~" is expanded
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return Path(logger.log_dir).expanduser()
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir).expanduser() / str(logger.name) / version


def allowed_epochs(trainer: Trainer, *, first_epoch: int, first_step: int, otherwise: int) -> int:
    """Count the epochs that a fit may take, at least 1.

    Convention: ``max_epochs`` decides, else ``max_steps``; beside it, ``max_steps`` merely interrupts the fit.

    Args:
        trainer: of the fit, its loaders set up.
        first_epoch: the trainer's epoch when the fit began.
        first_step: its step then.
        otherwise: for a trainer without either limit.
    """
    epochs = otherwise
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs = trainer.max_epochs - first_epoch
    elif trainer.max_steps >= 0:
        epochs = math.ceil((trainer.max_steps - first_step) / trainer.num_training_batches)
    return max(1, epochs)


def steps_left(trainer: Trainer, first_step: int, first_epoch: int, *, steps_per_epoch: int) -> float:
    """Return how many optimizer steps a trainer's limits leave to a fit that starts there; NaN where none ends it."""
    if trainer.max_steps >= 0:
        return trainer.max_steps - first_step
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        return (trainer.max_epochs - first_epoch) * steps_per_epoch
    return float("nan")


FEWEST = 8  # images; the pixels of fewer vary too much
SAMPLED = 1000  # described images whose pixels are measured
# Pixels in [0, 1] have a standard deviation of at most 0.5, standardised ones of about 1. Augmentation changes it less.
TOLERANCE = 0.6


def refuse_other_batch(batch: Any, described: DataSource) -> None:
    """Refuse a batch whose images contradict their description.

    The images have to have the described shape (C, H, W). Their pixels have to have nearly the mean and the standard
    deviation of the described training images: the deviations may differ by a factor below 1/0.6, the means by less
    than 0.6 deviations. This tells images in [0, 1], or in [0, 255], from standardised ones, but not two
    standardisations by similar constants. Pixels of fewer than 8 images, and batches without an image tensor, are not
    checked.

    Args:
        batch: of a training loader: a tensor (N, C, H, W), or a list or mapping with one.
        described: the source of the description.

    Raises:
        InputError: for such images.
    """
    images = _images(batch)
    if images is None:
        return
    shape = tuple(described.description().shape.zeros(0).shape[1:])
    if tuple(images.shape[1:]) != shape:
        raise InputError(
            f"TrajectoryRecorder: data= describes images of shape {shape}, but the first training batch has "
            f"{tuple(images.shape[1:])}: give data= that describes the loader's images"
        )
    if len(images) < FEWEST:
        return
    known = described.part("train").images
    known = known[:: -(-len(known) // SAMPLED)]
    (mean, std), (wanted, spread) = ((float(x.float().mean()), float(x.float().std())) for x in (images, known))
    least = TOLERANCE * spread
    if not (least < std < spread / TOLERANCE and abs(mean - wanted) < least):
        raise InputError(
            f"TrajectoryRecorder: data= describes images whose pixels have mean {wanted:.2f} and standard deviation "
            f"{spread:.2f}, but the first training batch has {mean:.2f} and {std:.2f}: give data= that describes the "
            "loader's images with their normalisation"
        )


def _images(batch: Any) -> Tensor | None:
    """Find the first (N, C, H, W) tensor in a batch."""
    if isinstance(batch, Tensor):
        return batch.detach() if batch.ndim == 4 else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for part in parts if (found := _images(part)) is not None), None)


SMALL_BATCH = 1 << 16  # pixel values of an inner batch up to which launching kernels takes most of a step's time


class Worth(NamedTuple):
    """From when on compiling repays.

    Attributes:
        operations: floating-point operations of the whole job, on a CPU. One core does 1 to 3e10 a second.
        steps: optimizer steps of the whole job, on a GPU.
    """

    operations: float
    steps: float


# Eager, these take about one, four and two minutes on one core, of which compiling saves a third to a half; it costs a
# third of a minute for teachers and evaluations and one minute for both functions of an inner step. Narrow networks do
# fewer operations a second, so that compiling repays for them earlier still.
TEACHER = Worth(1e12, 1000)
MATCHING = Worth(5e12, 500)
EVALUATION = Worth(3e12, float("inf"))  # on a GPU tracing takes longer than an evaluation


def forward_operations(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of a forward pass for one image: those of convolutions and matrix products.

    Args:
        network: of any device and dtype; neither its buffers nor any generator are changed.
        image_shape: (C, H, W).

    Example:
        >>> forward_operations(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), (1, 2, 2))
        24
    """
    training = network.training
    like = next(network.parameters(), torch.zeros(()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(like.new_zeros(1, *image_shape))
    network.train(training)
    return int(counter.get_total_flops())


def training_operations(network: nn.Module, image_shape: tuple[int, ...], images: float) -> float:
    """Count the operations of forward and backward passes over so many images."""
    return 3 * images * forward_operations(network, image_shape)


def choose_compile(
    compile: Compile,  # noqa: A002
    device: torch.device,
    worth: Worth,
    *,
    steps: float,
    operations: Callable[[], float],
    batch_values: int | None = None,
) -> Compile:
    """Resolve "auto".

    Args:
        compile: the setting.
        device: where the fit runs.
        worth: of its kind.
        steps: that it takes in all; NaN where that is not known, which does not repay.
        operations: counts its floating-point operations; asked on a CPU only.
        batch_values: pixel values of a batch, where CUDA graphs are an option.

    Returns:
        ``compile`` itself unless it is "auto"; then whether to compile, or "cuda_graphs" for small batches on a GPU.

    Raises:
        InputError: for an unknown setting.

    Example:
        >>> cpu = torch.device("cpu")
        >>> [choose_compile("auto", cpu, MATCHING, steps=500, operations=lambda: size) for size in (3e11, 7e13)]
        [False, True]
    """
    compiles(compile, device)  # refuses an unknown setting
    if compile != "auto":
        return compile
    if device.type == "cuda":
        if not steps >= worth.steps:
            return False
        return "cuda_graphs" if batch_values is not None and batch_values <= SMALL_BATCH else True
    return device.type == "cpu" and steps > 0 and operations() >= worth.operations


KEY = "ftd_lightning"  # of what a checkpoint holds beside Lightning's own
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}  # hooks that verbs call


class PhaseModule(LightningModule):
    """A module that is built for the data it meets, resumes exactly, and loads with or without a trainer.

    Nothing that depends on the images is built in ``__init__``. ``configure_model`` builds it for the trainer's data;
    without a trainer (``load_from_checkpoint``) it is built from what the checkpoint says of them. Both call
    :meth:`build`, once.

    Epochs and steps are counted from the beginning of this module's own fit, so that one Trainer may fit several
    modules in turn.

    Attributes:
        data: what the data source, or the checkpoint, says of the training images; None where neither does.
        augment: the augmentation of the images.
        fresh: builds networks of the architecture, after :meth:`build`.
    """

    augment: Augmentation
    fresh: FreshNetworks

    def __init__(self) -> None:
        super().__init__()
        self.data: DataDescription | None = None
        self._built = False
        self._resumed = False
        self._recorded_network: dict[str, Any] | None = None  # of the checkpoint that is being loaded
        self._first_epoch = self._first_step = 0
        self._fitted_by: weakref.ref[Trainer] | None = None
        self._compile_choice: Compile | None = None  # what "auto" means for this fit, and for those that go on from it

    def build(self) -> None:
        """Build what depends on the images: networks, a synthetic set. ``data`` and the hyper-parameters are known.

        Raises:
            InputError: for what does not fit together.
        """
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` returned, before the weights of the checkpoint are loaded.

        Args:
            state: that.
            checkpoint: the whole checkpoint, which may be changed.
        """

    def extra_state(self) -> dict[str, Any]:
        """Return plain values and tensors that a checkpoint keeps beside the weights."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters as files record them."""
        return {**plain_settings(self.hparams), "augment": self.augment.plain()}

    def own_networks(self, network: Network | None, options: Mapping[str, Any] | None) -> FreshNetworks:
        """Return fresh networks of this module: for its data, or as the checkpoint that is being loaded records them.

        Args:
            network: the constructor's argument; None takes the recorded network.
            options: likewise.

        Raises:
            InputError: for None where the recorded network is not of this library.
        """
        recorded, shape = self._recorded_network or {}, None if self.data is None else self.data.shape
        if shape is None and set(ImageShape._fields) <= recorded.keys():
            shape = ImageShape(*(recorded[key] for key in ImageShape._fields))
        if network is None:
            network, options = recorded_network(recorded, "checkpoint", "pass it as network")
        return FreshNetworks(network, options, shape)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a module from a checkpoint; the arguments are Lightning's, but ``weights_only`` is true.

        No import path in the file is followed: rules have to be imported before.

        Raises:
            InputError: for another file, or a network that is not of this library and has to be passed as ``network``.
        """
        if weights_only and "network" not in kwargs:
            refuse_own_network(checkpoint_path)
        options: dict[str, Any] = {"hparams_file": hparams_file, "strict": strict, "weights_only": weights_only}
        # Without an instantiator of the command line, which would import the class paths that the file names.
        return super().load_from_checkpoint(checkpoint_path, map_location, **options, _instantiator=None, **kwargs)

    @property
    def attached(self) -> bool:
        """Whether the module belongs to a trainer."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    @property
    def source(self) -> DataSource | None:
        """The trainer's datamodule, where it answers a module's questions."""
        return data_source(self.trainer.datamodule) if self.attached else None  # type: ignore[attr-defined]

    @property
    def epoch(self) -> int:
        """Epoch of this module's fit, from 0."""
        return self.current_epoch - self._first_epoch

    @property
    def step(self) -> int:
        """Optimizer steps of this module's fit so far."""
        return self.global_step - self._first_step

    @property
    def epoch_complete(self) -> bool:
        """Whether the current epoch has had all its batches; to be asked in ``on_train_epoch_end``."""
        return bool(self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    def missing_callbacks(self, kind: type[Callback]) -> list[Callback]:
        """Return a callback of a kind, unless the trainer has one: Lightning would replace the user's by a module's."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, kind) for callback in callbacks) else [kind()]

    @property
    def verbs(self) -> list[str]:
        """Commands for this module: "fit", and "validate", "test" and "predict" where it has their step."""
        return ["fit", *(verb for verb, step in STEPS.items() if is_overridden(step, self))]

    def configure_callbacks(self) -> list[Callback]:
        """Add no callback; refuse verbs that this module lacks, in the first hook that Lightning calls.

        Raises:
            InputError: for a verb that it lacks, with those that it has.
        """
        verb = self.trainer.state.fn
        if verb is not None and verb.value not in self.verbs:
            raise InputError(f"{type(self).__name__} has no {verb.value}: it has {', '.join(self.verbs)}")
        return []

    def configure_model(self) -> None:
        """Build for the trainer's data; nothing without a trainer, or where everything has been built."""
        self._resumed = False
        if not self.attached:
            return
        if self.source is not None:
            self.data = self.source.description()
        if not (self.trainer.ckpt_path and self.data is None):  # else the checkpoint says what it was built for
            self._build_once()

    def _build_once(self) -> None:
        if not self._built:
            # Not on the trainer's device, as Lightning's context would have it: draws there are other ones.
            with torch.device("cpu"):
                self.build()
            self._built = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to build the module again."""
        data = self.data
        checkpoint[KEY] = {
            "data": None if data is None else _plain_data(data),
            "network": self.fresh.describe(),
            "first": (self._first_epoch, self._first_step),
            "compile": self._compile_choice,
            "settings": as_json(self.settings()),
            "trainer": deciding_settings(self.trainer),
            "set": self._training_set(),
            **self.extra_state(),
        }

    def _training_set(self) -> dict[str, Any] | None:
        """Describe the set that takes the place of the training images."""
        training = None if self.source is None else self.source.training_set()
        return None if training is None else {**as_json(training.metadata), "images": fingerprint(training.images)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build from the checkpoint what no trainer has built, and make its progress one that resumes exactly.

        Raises:
            InputError: for a checkpoint of another network, or of version 0.1; within a trainer also for other settings
                than the checkpoint's, and if a fit is resumed, for other images.
        """
        mend_progress(checkpoint)
        state = checkpoint.get(KEY)
        if state is None:
            raise InputError("the checkpoint was not saved by this version of ftd_lightning; begin this fit anew")
        if self.attached:  # version 0.2 recorded neither settings nor data
            refuse_changes(state.get("settings", {}), self.settings(), free=(*HARMLESS, *LIMITS))
            fits = self.trainer.state.fn == "fit"
            if fits:
                refuse_changes(state.get("trainer", {}), deciding_settings(self.trainer), prefix="trainer.")
            if fits and self.source is not None and self.data is not None:
                now = {"data": _plain_data(self.data), "set": self._training_set()}
                options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
                refuse_other_data(state, now, options, self.trainer)  # type: ignore[arg-type]
        if self.data is None and state["data"] is not None:
            self.data = _loaded_data(state["data"])
        self._recorded_network = state["network"]
        self._build_once()
        if not same_network(state["network"], self.fresh.describe()):
            raise InputError(
                f"the checkpoint's network is {state['network']['name']}, not {self.fresh.describe()['name']} as asked "
                "for here: pass the same network (load_from_checkpoint takes network=)"
            )
        self._first_epoch, self._first_step = state["first"]
        self._compile_choice = state["compile"]
        self._resumed = True
        try:
            self.restore(state, checkpoint)
        except KeyError as error:
            raise InputError(f"the checkpoint is not one of a {type(self).__name__}: it has no {error}") from error

    def on_fit_start(self) -> None:
        """Begin to count, unless the fit is resumed; refuse settings that change what is computed.

        Raises:
            InputError: for such settings.
        """
        refuse_settings(self.trainer, self.augment)
        continued = self._fitted_by is not None and self._fitted_by() is self.trainer
        if not self._resumed and not continued:
            self._first_epoch, self._first_step = self.current_epoch, self.global_step
        self._fitted_by = weakref.ref(self.trainer)

    def on_validation_start(self) -> None:
        """Refuse to measure, or to predict by, a module that neither a fit nor a checkpoint has given its weights.

        Raises:
            InputError: for such a module.
        """
        if self._fitted_by is None and self._recorded_network is None:
            raise InputError(
                f"this {type(self).__name__} is not trained: fit it first, or name a checkpoint (--ckpt_path last is "
                "the last one of the same fit)"
            )

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Refuse untrained modules, and several processes, which have different networks.

        Raises:
            InputError: for either.
        """
        self.on_validation_start()
        if self.trainer.world_size > 1:
            raise InputError("predict runs in one process: pass --trainer.devices 1")

    def choose_compile(
        self,
        compile: Compile,  # noqa: A002
        worth: Worth,
        *,
        steps: float,
        images: float,
        batch_values: int | None = None,
    ) -> Compile:
        """Resolve "auto" once; a fit that goes on from a checkpoint follows it, however long it has become.

        Args:
            compile: the setting; anything but "auto" stands as it is.
            worth: of the kind of fit.
            steps: that the fit takes.
            images: that go forward and backward through a network in it.
            batch_values: see ``compile_choice``.
        """
        if compile != "auto":
            return compile

        def operations() -> float:
            if self.data is None:
                return 0.0
            return training_operations(self.fresh.architecture(), tuple(self.data.shape.zeros(1).shape[1:]), images)

        if self._compile_choice is None:
            job: dict[str, Any] = {"steps": steps, "operations": operations, "batch_values": batch_values}
            self._compile_choice = choose_compile(compile, self.device, worth, **job)
        return self._compile_choice

    def warn_of_unordered_loader(self) -> None:
        """Say that the order of a foreign loader is not restored, where a fit resumes with one."""
        loader = self.trainer.train_dataloader
        if self._resumed and not isinstance(loader, Stateful):
            rank_zero_warn(
                f"the order of batches of this {type(loader).__name__} is not restored: the resumed fit differs from "
                "one that was never interrupted; a DistillationDataModule (from_datamodule) restores it"
            )


def _plain_data(data: DataDescription) -> dict[str, Any]:
    transform = data.transform
    return {
        "shape": tuple(data.shape),
        "class_names": list(data.class_names),
        "dataset": data.dataset,
        "batch_size": data.batch_size,
        "transform": transform.describe(),
        "tensors": transform.tensors(),
    }


def _loaded_data(state: Mapping[str, Any]) -> DataDescription:
    return DataDescription(
        shape=ImageShape(*state["shape"]),
        class_names=list(state["class_names"]),
        transform=load_transform(state["transform"], state["tensors"]),
        dataset=state["dataset"],
        batch_size=state["batch_size"],
    )
