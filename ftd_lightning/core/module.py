"""The base of all modules: built for its data, resumed exactly, loaded with or without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from ftd_lightning.contracts import DataDescription, ImageShape, data_source
from ftd_lightning.core import resume
from ftd_lightning.core.arguments import plain, plain_settings
from ftd_lightning.core.networks import NetworkFactory, refuse_object
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import fingerprint
from ftd_lightning.files.transforms import load_transform
from ftd_lightning.functional.seeding import make_generator
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning.pytorch import Callback, Trainer

    from ftd_lightning.contracts import DataSource
    from ftd_lightning.core.networks import Network
    from ftd_lightning.functional.augment import Augmentation

# Half-precision weights lose the differences of close weight vectors that the methods compare; float16 autocast scales
# the loss, which the passes inside a step do not know of.
PRECISIONS = ("32-true", "64-true", "bf16-mixed")
KEY = "ftd_lightning"  # of this library's entry in a checkpoint
STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}  # hooks that verbs call


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has instructions for bf16, as torch knows it; emulation is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ask = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch cannot be asked
    found: dict[str, Any] = ask() if device.type == "cpu" else {}
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def deciding_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer that change a fit's numbers, and that a resumed fit must keep."""
    return {"precision": trainer.precision, "gradient_clip_val": trainer.gradient_clip_val}


def refuse_settings(trainer: Trainer, augment: Augmentation) -> None:
    """Refuse settings that would change a fit's result, and name their replacements."""
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

    Loggers without a log folder (Wandb) get ``save_dir/name/version``, as Lightning's checkpoints do.
    """
    # Not ``trainer.log_dir``, which is a broadcast: called by the first rank alone, it waits for ever.
    logger = trainer.loggers[0] if trainer.loggers else None
    if logger is None:
        return Path(trainer.default_root_dir)  # "~" is expanded
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return Path(logger.log_dir).expanduser()
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir).expanduser() / str(logger.name) / version


class BaseModule(LightningModule):
    """A module that is built for the data it meets, resumes exactly, and loads with or without a trainer.

    Constructors raise InputError (a ValueError) for arguments out of their range.

    Nothing that depends on the images is built in ``__init__``. ``configure_model`` builds it for the trainer's data;
    without a trainer (``load_from_checkpoint``) it is built from the checkpoint's description of them. Both call
    :meth:`build`, once.

    Args:
        network: a name, a function that builds one, or a module where one network is enough; None takes the recorded
            one.
        network_options: for a named network.
        augment: of the images.
        seed: of all random numbers.

    Raises:
        InputError: for a module where fresh networks are drawn.

    Attributes:
        data: description of the training images by the data source or the checkpoint; None where neither has one.
        augment: the augmentation of the images.
        fresh: builds networks of the architecture, after :meth:`build`.
    """

    accepts_module: ClassVar[bool] = False  # whether one module is enough as a network
    fresh: NetworkFactory

    def __init__(
        self,
        *,
        network: Network | None,
        network_options: Mapping[str, Any] | None,
        augment: Augmentation,
        seed: int,
    ) -> None:
        super().__init__()
        if not self.accepts_module:
            refuse_object(network)
        self.augment = augment
        self.seed = seed
        self.data: DataDescription | None = None
        self._network_arguments = (network, plain(network_options))  # a tuple: a network in it is no submodule
        self._built = self._resumed = self._has_weights = False
        self._recorded_network: dict[str, Any] = {}  # of the checkpoint that is being loaded

    def save_arguments(self, arguments: Mapping[str, Any], *, leave_out: Sequence[str] = (), **resolved: Any) -> None:
        """Save the constructor's arguments as hyper-parameters: plain values that build the module again.

        Real images, and networks that have no name, are left out.

        Args:
            arguments: ``locals()`` of the constructor, called before it defines other names.
            leave_out: names of other arguments to leave out.
            resolved: objects in place of arguments that may be given in several forms.
        """
        values = {**arguments, **resolved}
        left_out = {"self", "__class__", "real", *leave_out, *(["network"] if callable(values["network"]) else [])}
        self.save_hyperparameters({key: plain(value) for key, value in values.items() if key not in left_out})

    def make_networks(self) -> NetworkFactory:
        """Return the builder of networks: for this module's data, or as the checkpoint that is being loaded says."""
        recorded, shape = self._recorded_network, None if self.data is None else self.data.shape
        if shape is None and set(ImageShape._fields) <= recorded.keys():
            shape = ImageShape.of(recorded)
        network, options = self._network_arguments
        if network is None:
            network, options = recorded_network(recorded, "checkpoint", "pass it as network")
        return NetworkFactory(network, options, shape)

    def build(self) -> None:
        """Build what depends on the images; ``data``, ``fresh`` and the hyper-parameters are known."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """Return plain values and tensors that a checkpoint keeps beside the weights."""
        return {}

    def restore(self, state: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint, before its weights are loaded.

        Args:
            state: from :meth:`extra_state`.
            checkpoint: the whole checkpoint, which may be changed.
        """

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters as files record them."""
        return {**plain_settings(self.hparams), "augment": self.augment.plain()}

    def inputs(self) -> dict[str, Any]:
        """Describe what a fit begins with beside its settings, as JSON holds it.

        That is its images, or the set in their place, and a frozen backbone.
        """
        data = None if self.data is None else resume.as_json(self.data.metadata())
        return {"data": data, "set": self._training_set(), "backbone": self.fresh.backbone}

    def generator(self, *keys: int | str) -> torch.Generator:
        """Return a CPU generator for a purpose; equal keys give equal numbers."""
        return make_generator(self.seed, *keys)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path | IO[bytes],
        *arguments: Any,
        weights_only: bool = True,
        **options: Any,
    ) -> Self:
        """Load a module from a checkpoint; the arguments are Lightning's, but ``weights_only`` is true.

        No import path in the file is followed: rules have to be imported before.

        Raises:
            InputError: for another file, or a network that is not of this library and has to be passed as ``network``.
        """
        if weights_only:
            resume.refuse_own_network(checkpoint_path, options)
        # Without an instantiator of the command line, which would import the class paths that the file names.
        options |= {"weights_only": weights_only, "_instantiator": None}
        return super().load_from_checkpoint(checkpoint_path, *arguments, **options)

    def progress_label(self) -> str:
        """Return a few words for the progress bar."""
        return type(self).__name__

    def planned_epochs(self) -> int | None:
        """Return the epoch after which the module ends the fit by itself; None where it does not."""
        return None

    @property
    def attached(self) -> bool:
        """Whether the module belongs to a trainer."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    @property
    def source(self) -> DataSource | None:
        """The trainer's datamodule, where it is a data source."""
        return data_source(self.trainer.datamodule) if self.attached else None  # type: ignore[attr-defined]

    @property
    def epoch_complete(self) -> bool:
        """Whether the current epoch has had all its batches; to be asked in ``on_train_epoch_end``."""
        return bool(self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)

    def missing_callbacks(self, kind: type[Callback]) -> list[Callback]:
        """Return a callback of a kind, unless the trainer has one: Lightning would replace the user's by a module's."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if any(isinstance(callback, kind) for callback in callbacks) else [kind()]

    @property
    def verbs(self) -> tuple[str, ...]:
        """Commands for this module: "fit", and "validate", "test" and "predict" where it has their step."""
        return ("fit", *(verb for verb, step in STEPS.items() if is_overridden(step, self)))

    def configure_callbacks(self) -> list[Callback]:
        """Add no callback; refuse verbs that this module lacks, in the first hook that Lightning calls."""
        verb = self.trainer.state.fn
        if verb is not None and verb.value not in self.verbs:
            raise InputError(f"{type(self).__name__} has no {verb.value}: it has {', '.join(self.verbs)}")
        return []

    def configure_model(self) -> None:
        """Build for the trainer's data; refuse a Trainer whose counters are those of another fit."""
        self._resumed = False
        if not self.attached:
            return
        began = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready  # global_step of another optimization is 0
        if self.trainer.state.fn == "fit" and began and not self.trainer.ckpt_path:
            raise InputError("this Trainer has fitted a module already: make a new Trainer, or resume with ckpt_path")
        data = self.data if self.source is None else self.source.description()
        if not (self.trainer.ckpt_path and data is None):  # else the checkpoint has the description
            self.build_for(data)

    def build_for(self, data: DataDescription | None) -> None:
        """Build for such data, unless everything has been built."""
        self.data = data
        if not self._built:
            # Not on the trainer's device, as Lightning's context would have it: other numbers would be drawn there.
            with torch.device("cpu"):
                self.fresh = self.make_networks()
                self.build()
            self._built = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the descriptions that build the module again."""
        # Lightning's own CLI builds the module of a checkpoint by this.
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["_class_path"] = f"{type(self).__module__}.{type(self).__name__}"
        checkpoint[KEY] = {
            "module": type(self).__name__,
            "data": None if self.data is None else _plain_data(self.data),
            "network": self.fresh.describe(),
            "settings": resume.as_json(self.settings()),
            "trainer": deciding_settings(self.trainer),
            "set": self._training_set(),
            **self.extra_state(),
        }

    def _training_set(self) -> dict[str, Any] | None:
        """Describe the set that takes the place of the training images."""
        training = None if self.source is None else self.source.training_set()
        if training is None:
            return None
        return {**resume.as_json(training.metadata), "images": fingerprint(training.images)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build from the checkpoint, unless a trainer has built the module, and fix its progress for an exact resume.

        Raises:
            InputError: for a checkpoint of another network, or of an earlier version; within a trainer also for other
                settings than the checkpoint's, and if a fit is resumed, for other images.
        """
        resume.fix_loop_progress(checkpoint)
        state = checkpoint.get(KEY, {})
        if "settings" not in state:
            raise InputError("the checkpoint was not saved by this version of ftd_lightning; begin this fit anew")
        if self.attached:
            if state["module"] not in (kind.__name__ for kind in type(self).mro()):
                raise InputError(f"is a checkpoint of a {state['module']}, the model here is a {type(self).__name__}")
            resume.refuse_changes(state["settings"], self.settings(), free=(*resume.HARMLESS, *resume.LIMITS))
            fits = self.trainer.state.fn == "fit"
            if fits:
                resume.refuse_changes(state["trainer"], deciding_settings(self.trainer), prefix="trainer.")
            if fits and self.source is not None and self.data is not None:
                now = {"data": _plain_data(self.data), "set": self._training_set()}
                options = checkpoint.get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY, {})
                resume.refuse_other_data(state, now, options, self.trainer)  # type: ignore[arg-type]
        self._recorded_network = state["network"]
        loaded = None if state["data"] is None else _loaded_data(state["data"])
        self.build_for(loaded if self.data is None else self.data)
        if not same_network(state["network"], self.fresh.describe()):
            raise InputError(
                f"the checkpoint's network is {state['network']['name']}, not {self.fresh.describe()['name']} as asked "
                "for here: pass the same network (load_from_checkpoint takes network=)"
            )
        self._resumed = self._has_weights = True
        try:
            self.restore(state, checkpoint)
        except KeyError as error:
            raise InputError(f"the checkpoint is not one of a {type(self).__name__}: it has no {error}") from error

    def on_fit_start(self) -> None:
        """Refuse settings that change the result."""
        refuse_settings(self.trainer, self.augment)
        self._has_weights = True

    def on_validation_start(self) -> None:
        """Refuse to measure, or to predict by, a module without weights of a fit or a checkpoint."""
        if not self._has_weights:
            raise InputError(
                f"this {type(self).__name__} is not trained: fit it first, or name a checkpoint (--ckpt_path last is "
                "the last one of the same fit)"
            )

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Refuse untrained modules, and several processes, which have different networks."""
        self.on_validation_start()
        if self.trainer.world_size > 1:
            raise InputError("predict runs in one process: pass --trainer.devices 1")

    def warn_of_unordered_loader(self) -> None:
        """Warn that the order of a foreign loader is not restored, where a fit resumes with one."""
        loader = self.trainer.train_dataloader
        if self._resumed and not hasattr(loader, "state_dict"):
            rank_zero_warn(
                f"the order of batches of this {type(loader).__name__} is not restored: the resumed fit differs from "
                "one that was never interrupted; a DistillationDataModule (from_datamodule) restores it"
            )


def _plain_data(data: DataDescription) -> dict[str, Any]:
    return {
        "shape": tuple(data.shape),
        "class_names": list(data.class_names),
        "dataset": data.dataset,
        "batch_size": data.batch_size,
        "transform": data.transform.describe(),
        "tensors": data.transform.tensors(),
    }


def _loaded_data(state: Mapping[str, Any]) -> DataDescription:
    return DataDescription(
        shape=ImageShape(*state["shape"]),
        class_names=list(state["class_names"]),
        transform=load_transform(state["transform"], state["tensors"]),
        dataset=state["dataset"],
        batch_size=state["batch_size"],
    )
