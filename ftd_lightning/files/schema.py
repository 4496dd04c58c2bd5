"""What files must hold to be what they say: shapes, dtypes, ranges and metadata, in one place for readers and writers.

Every check raises an InputError that names the file and the field. Metadata that is not named here is the writer's own.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor


LabelKind = Literal["class", "probability", "target"]
MOST_CLASSES = 1_000_000
SUM_TOLERANCE = 1e-3  # of probabilities, as float32 rounds them


def refuse(where: object, field: str, problem: str) -> NoReturn:
    """Raise the error of one field of a file."""
    raise InputError(f"{where}: {field} {problem}")


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Tell whether a value is a finite number in [low, high]; booleans are none.

    Example:
        >>> is_number(1, 0), is_number(True), is_number(float("nan")), is_number(2.0, 0, 1)
        (True, False, False, False)
    """
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count_or_none(value: Any) -> bool:
    return value is None or _is_count(value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_mapping_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_parameter(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _are_counts(value[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(size) for size in value)


def _is_network(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("options", {}), dict)
        and isinstance(value.get("shapes", {}), dict)
        and all(map(_are_counts, value.get("shapes", {}).values()))
        and isinstance(value.get("parameters", []), list)
        and all(map(_is_parameter, value.get("parameters", [])))
    )


def _are_accuracies(value: Any) -> bool:
    return isinstance(value, list) and all(entry is None or is_number(entry, 0, 1) for entry in value)


def _is_scale(value: Any) -> bool:
    return is_number(value, 0) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_count(size) and size > 0 for size in value.values())


def _are_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(score, dict) for score in value.values())


Rule = tuple["Callable[[Any], bool]", str]
MAPPING: Rule = (_is_mapping, "a mapping")
MAPPING_OR_NONE: Rule = (_is_mapping_or_none, "a mapping or null")
TEXT: Rule = (_is_text, "text")
COUNT: Rule = (_is_count, "a count")
RATE: Rule = (partial(is_number, low=0), "a finite number of at least 0")
NETWORK: Rule = (_is_network, "a mapping with the network's name")
NAMES: Rule = (_are_names, "a list of names")

SET_METADATA: dict[str, Rule] = {
    "class_names": NAMES,
    "transform": MAPPING,
    "dataset": (lambda value: value is None or isinstance(value, (str, dict)), "a mapping or a name"),
    "method": TEXT,
    "label_kind": TEXT,
    "labels_made": TEXT,
    "label_teacher": MAPPING,
    "kernel": MAPPING,
    "target_scale": (_is_scale, "a finite number above 0"),
    "images_stored": COUNT,
    "images_trained_on": COUNT,
    "settings": MAPPING,
    "network": NETWORK,
    "teachers": MAPPING,
    "chosen_by": MAPPING,
    "imported": MAPPING,
    "augmentation": MAPPING_OR_NONE,
    "ema": MAPPING,
    "ema_initial_weight": (partial(is_number, low=0, high=1), "a number in [0, 1]"),
    "iterations": COUNT,
    "skipped_steps": COUNT,
    "gated_steps": COUNT,
    "rounds": COUNT,
    "scores": (_are_scores, "a mapping of measurements"),
    "versions": MAPPING,
}
TEACHER_METADATA: dict[str, Rule] = {
    "network": NETWORK,
    "epochs": COUNT,
    "teacher": COUNT,
    "accuracies": (_are_accuracies, "a list of accuracies in [0, 1] or null"),
    "method": TEXT,
    **dict.fromkeys(("rho", "alpha", "lr", "momentum", "weight_decay"), RATE),
    "transform": MAPPING_OR_NONE,
    "augmentation": MAPPING_OR_NONE,
    "batch_size": (_is_count_or_none, "a count or null"),
    "versions": MAPPING,
}
STORE_METADATA: dict[str, Rule] = {
    "class_names": NAMES,
    "transform": MAPPING,
    "shape": (_are_sizes, "a mapping of sizes"),
}


def check_metadata(
    metadata: Mapping[str, Any], rules: Mapping[str, Rule], where: object, *, required: Sequence[str] = ()
) -> None:
    """Refuse metadata that lacks a required key, or holds something else than its key stands for.

    Example:
        >>> check_metadata({"method": 3}, SET_METADATA, "set.safetensors")
        Traceback (most recent call last):
        ftd_lightning.errors.InputError: set.safetensors: method is 3, text is needed; make it again
    """
    for key in required:
        if key not in metadata:
            refuse(where, key, "is missing from the metadata; make it again")
    for key, (holds, wanted) in rules.items():
        if key in metadata and not holds(metadata[key]):
            shown = repr(metadata[key])
            shown = shown if len(shown) < 60 else f"{shown[:56]} ..."
            refuse(where, key, f"is {shown}, {wanted} is needed; make it again")


def check_finite(tensor: Tensor, field: str, where: object) -> None:
    """Refuse NaN and infinities."""
    if not bool(torch.isfinite(tensor).all()):
        refuse(where, field, "has values that are not finite")


def _check_tensor(tensor: Tensor, field: str, where: object, shape: tuple[int | None, ...]) -> None:
    """Refuse another dtype than float32, other sizes (None is any of at least 1), and values that are not finite."""
    fits = tensor.ndim == len(shape) and all(
        size > 0 and wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=False)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        refuse(where, field, f"has shape {tuple(tensor.shape)}, ({wanted}) is needed")
    if tensor.dtype != torch.float32:
        refuse(where, field, f"is {tensor.dtype}, float32 is needed")
    check_finite(tensor, field, where)


def check_images(images: Tensor, field: str, where: object, *, like: Tensor | None = None) -> None:
    """Refuse what is not (N, C, H, W) finite float32, or not of the shape of other images."""
    _check_tensor(images, field, where, (None, None, None, None) if like is None else tuple(like.shape))


def label_kind(labels: Tensor, metadata: Mapping[str, Any]) -> LabelKind:
    """Return what labels are: as recorded, or else classes for integers and probabilities for floats."""
    recorded: LabelKind | None = metadata.get("label_kind")
    return recorded or ("class" if labels.ndim == 1 else "probability")


def check_labels(labels: Tensor, count: int, classes: int | None, kind: str, where: object) -> None:
    """Refuse labels that do not label so many images, each kind in its own range.

    Args:
        labels: (N,) int64 for kind "class", in [0, K); (N, K) float32 for "probability", non-negative with sum 1, and
            for "target", any finite values that a method learns.
        count: N.
        classes: K; None where it is not known.
        kind: one of the three.
        where: names the file.
    """
    if kind not in ("class", "probability", "target"):
        refuse(where, "label_kind", f"is {kind!r:.60}, class, probability or target is needed")
    if kind == "class":
        if labels.ndim != 1 or labels.dtype != torch.int64:
            refuse(where, "labels", f"are {labels.dtype} {tuple(labels.shape)}, classes are int64 ({count},)")
    elif labels.ndim != 2 or labels.dtype != torch.float32:
        refuse(where, "labels", f"are {labels.dtype} {tuple(labels.shape)}, a {kind} is float32 ({count}, classes)")
    if len(labels) != count:
        refuse(where, "labels", f"are {len(labels)}, but there are {count} images")
    if kind == "class":
        low, high = (int(value) for value in torch.aminmax(labels))
        most = (classes or MOST_CLASSES) - 1
        if low < 0 or high > most:
            refuse(where, "labels", f"run from {low} to {high}, classes from 0 to {most}")
        return
    check_finite(labels, "labels", where)
    if classes is not None and labels.shape[1] != classes:
        refuse(where, "labels", f"have {labels.shape[1]} columns, there are {classes} classes")
    if kind == "probability":
        off = float((labels.double().sum(1) - 1).abs().max())
        if float(labels.min()) < 0 or off > SUM_TOLERANCE:
            refuse(where, "labels", "are no probabilities: each row is non-negative and has sum 1")


def check_step_size(step_size: Tensor, where: object) -> None:
    """Refuse what is neither one positive step size nor one per step, (n,)."""
    if step_size.ndim > 1 or not step_size.numel() or not step_size.is_floating_point():
        refuse(where, "step_size", f"is {step_size.dtype} {tuple(step_size.shape)}, a number or one per step is needed")
    check_finite(step_size, "step_size", where)
    if not bool((step_size > 0).all()):
        refuse(where, "step_size", f"is {float(step_size.min()):g}, it must be above 0")


def check_transform(description: Any, tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse the description of a transform that cannot be built; unknown kinds are left to the builder."""
    if not isinstance(description, dict):
        refuse(where, "transform", f"is {description!r:.60}, a mapping is needed; make it again")
    kind = description.get("kind")
    if kind == "standardization":
        for key, low in (("mean", -math.inf), ("std", 0.0)):
            values = description.get(key)
            if not isinstance(values, list) or not values or not all(is_number(value, low) for value in values):
                refuse(where, f"transform.{key}", f"is {values!r:.60}, finite numbers, one per channel, are needed")
        if len(description["mean"]) != len(description["std"]):
            refuse(where, "transform", "has another number of means than of standard deviations")
        if 0 in description["std"]:
            refuse(where, "transform.std", "has a 0, standard deviations are above 0")
    elif kind == "zca":
        if not is_number(description.get("eps"), 0):
            refuse(
                where, "transform.eps", f"is {description.get('eps')!r:.60}, a finite number of at least 0 is needed"
            )
        if not isinstance(description.get("fitted_on"), str):
            refuse(where, "transform.fitted_on", "is missing; make it again")
        for name in ("mean", "inverse"):
            if name not in tensors:
                refuse(where, f"transform.{name}", "is missing; make it again")
        values = tensors["mean"].shape[-1] if tensors["mean"].ndim else 0
        _check_tensor(tensors["mean"], "transform.mean", where, (1, None))
        for name in ("inverse", "matrix"):
            if name in tensors:
                _check_tensor(tensors[name], f"transform.{name}", where, (values, values))


def check_channels(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], images: Tensor, where: object
) -> None:
    """Refuse a transform of other images than these."""
    channels, values = images.shape[1], images[0].numel()
    if description.get("kind") == "standardization" and len(description["mean"]) not in (1, channels):
        refuse(where, "transform", f"has {len(description['mean'])} channels, the images have {channels}")
    if description.get("kind") == "zca" and tensors["mean"].numel() != values:
        refuse(where, "transform", f"is of {tensors['mean'].numel()} values per image, the images have {values}")


def per_cent(value: Mapping[str, Any] | None, *, count: bool = False) -> str:
    """Format recorded accuracies: mean ± standard deviation, in per cent.

    Args:
        value: {"mean", "std", "n"}, fractions; None gives "-".
        count: add the number of networks.

    Example:
        >>> per_cent({"mean": 0.937, "std": 0.004, "n": 5}), per_cent({"mean": 0.5, "std": 0.0, "n": 2}, count=True)
        ('93.7 ± 0.4', '50.0 ± 0.0 (2)')
    """
    if not value:
        return "-"
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}" + (f" ({value['n']})" if count else "")
