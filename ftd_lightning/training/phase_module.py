"""The base of all modules of this library: how they are built, resumed, loaded and attached to data."""

from __future__ import annotations

import weakref
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from ftd_lightning.contracts import DataDescription, ImageShape, Stateful, data_source
from ftd_lightning.data.files import fingerprint
from ftd_lightning.data.transform import load_transform
from ftd_lightning.errors import InputError
from ftd_lightning.models.description import same_network
from ftd_lightning.models.registry import recorded_network
from ftd_lightning.training.compile_choice import choose_compile, training_operations
from ftd_lightning.training.fresh_networks import FreshNetworks
from ftd_lightning.training.plain_arguments import plain_settings
from ftd_lightning.training.ranks import all_ranks
from ftd_lightning.training.resume import mend_progress, refuse_own_network
from ftd_lightning.training.resumed_settings import (
    HARMLESS,
    LIMITS,
    as_json,
    refuse_changes,
    refuse_other_data,
)
from ftd_lightning.training.trainer_settings import deciding_settings, refuse_settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lightning.pytorch import Callback, Trainer

    from ftd_lightning.contracts import DataSource
    from ftd_lightning.functional.augment import Augmentation
    from ftd_lightning.functional.compiling import Compile
    from ftd_lightning.training.compile_choice import Worth
    from ftd_lightning.training.fresh_networks import Network

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
            InputError: for such settings, and where only some of several nodes have the checkpoint.
        """
        if self.trainer.num_nodes > 1 and len(set(all_ranks(self._resumed))) > 1:
            raise InputError("only some nodes have the checkpoint to resume from: copy it to the same place on each")
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
