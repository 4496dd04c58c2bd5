"""Constructor arguments as plain values, which checkpoints and sets record and modules are built from again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from ftd_lightning.decoders.base import Decoder
from ftd_lightning.errors import InputError
from ftd_lightning.functional.inner_optimizers import InnerOptimizer
from ftd_lightning.rules.base import EXCLUSIVE, MatchingRule, only_one

Built = TypeVar("Built")


def plain(value: Any) -> Any:
    """Turn an argument into plain values that build it again.

    A dataclass becomes a mapping, a rule, decoder or inner optimizer ``{"class_path": ..., "init_args": ...}``, a tuple
    a list.
    """
    if isinstance(value, (MatchingRule, InnerOptimizer, Decoder)):
        if not is_dataclass(value):
            raise InputError(f"{type(value).__name__} is no dataclass: its fields have to be its options")
        return {"class_path": _path(type(value)), "init_args": plain(asdict(value))}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value


def plain_settings(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyper-parameters as plain values, without those that LightningCLI adds."""
    return {key: plain(value) for key, value in hparams.items() if not key.startswith("_")}


def matching_rules(rules: Iterable[MatchingRule | Mapping[str, Any]]) -> list[MatchingRule]:
    """Build matching rules from the values of :func:`plain`; refuse rules that exclude each other.

    A class path is looked up among the rules that are imported already, so loading a checkpoint runs no other code.

    Example:
        >>> matching_rules([{"class_path": "ftd_lightning.rules.RobustStart", "init_args": {"kappa": 0.1}}])
        [RobustStart(kappa=0.1, residual='displacement')]
    """
    built = [rule if isinstance(rule, MatchingRule) else _built(MatchingRule, rule, "rules") for rule in rules]
    for hook in EXCLUSIVE:
        only_one(built, hook)
    return built


def inner_optimizer(optimizer: InnerOptimizer | Mapping[str, Any]) -> InnerOptimizer:
    """Build an inner optimizer from the values of :func:`plain`; see :func:`matching_rules`."""
    return optimizer if isinstance(optimizer, InnerOptimizer) else _built(InnerOptimizer, optimizer, "optimizer")


def decoder_of(decoder: Decoder | Mapping[str, Any] | None) -> Decoder | None:
    """Build a decoder from the values of :func:`plain`, or copy one; see :func:`matching_rules`."""
    return None if decoder is None else _built(Decoder, plain(decoder), "decoder")  # type: ignore[type-abstract]


def _built(base: type[Built], spec: Mapping[str, Any], name: str) -> Built:
    """Build an object of a subclass of ``base``, from its class path and arguments."""
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        raise InputError(f"{name}: {spec!r:.90} is no {base.__name__}: give an object, or its class_path and init_args")
    known = {_path(kind): kind for kind in _subclasses(base)}
    path, ours = str(spec["class_path"]), __package__.partition(".")[0] + "."
    short = {found.rpartition(".")[2]: kind for found, kind in known.items() if found.startswith(ours)}
    kind = known.get(path) or (short.get(path.rpartition(".")[2]) if path.startswith(ours) or "." not in path else None)
    if kind is None:
        raise InputError(
            f"{name}: {path!r} is no {base.__name__}: choose from {', '.join(sorted(short))}, or import your module "
            "that defines it"
        )
    try:
        return kind(**spec.get("init_args", {}))
    except TypeError as error:
        raise InputError(f"{name}: {path}: {error}") from error


def _subclasses(kind: type[Built]) -> list[type[Built]]:
    return [below for child in kind.__subclasses__() for below in (child, *_subclasses(child))]


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
