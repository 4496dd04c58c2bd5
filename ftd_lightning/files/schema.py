"""Checks of what files hold: shapes, dtypes, ranges and metadata, in one place for readers and writers.

Every check raises an InputError that names the file and the field. Metadata that is not named here is the writer's own.
"""

from __future__ import annotations

import math
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
    """Tell whether a value is a finite number in [low, high]; booleans are none."""
    try:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def _is_mapping(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_parameter(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _is_list(value[1], _is_count)


def _is_object(value: Any) -> bool:
    of = {"class_path": str, "init_args": dict}
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in of.items())


def _is_network(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("options", {}), dict)
        and _is_mapping(value.get("shapes", {}), lambda shape: _is_list(shape, _is_count))
        and _is_list(value.get("parameters", []), _is_parameter)
    )


def _is_shape(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"in_channels", "num_classes", "image_size"}:
        return False
    size = value["image_size"]
    lengths = size if isinstance(size, list) and len(size) == 2 else [size]
    return all(_is_count(count) and count > 0 for count in (value["in_channels"], value["num_classes"], *lengths))


Rule = tuple["Callable[[Any], bool]", str]
MAPPING: Rule = (lambda value: isinstance(value, dict), "a mapping")
MAPPING_OR_NONE: Rule = (lambda value: isinstance(value, dict | None), "a mapping or null")
TEXT: Rule = (lambda value: isinstance(value, str), "text")
COUNT: Rule = (_is_count, "a count")
RATE: Rule = (lambda value: is_number(value, 0), "a finite number of at least 0")
NETWORK: Rule = (_is_network, "a mapping with the network's name")
NAMES: Rule = (lambda value: _is_list(value, lambda name: isinstance(name, str)), "a list of names")

SET_METADATA: dict[str, Rule] = {
    "class_names": NAMES,
    "dataset": (lambda value: isinstance(value, dict | str | None), "a mapping or a name"),
    "network": NETWORK,
    "decoder": (_is_object, "a mapping of class_path and init_args"),
    "augmentation": MAPPING_OR_NONE,
    "target_scale": (lambda value: is_number(value, 0) and value > 0, "a finite number above 0"),
    "ema_initial_weight": (lambda value: is_number(value, 0, 1), "a number in [0, 1]"),
    "scores": (lambda value: _is_mapping(value, lambda score: isinstance(score, dict)), "a mapping of measurements"),
    "joined": (lambda value: _is_list(value, lambda part: isinstance(part, dict)), "a list of mappings"),
    **dict.fromkeys(("method", "label_kind", "labels_made"), TEXT),
    **dict.fromkeys(("images_stored", "images_trained_on", "numbers_stored", "bytes_stored"), COUNT),
    **dict.fromkeys(("iterations", "rounds"), COUNT),
    **dict.fromkeys(("skipped_steps", "gated_steps"), COUNT),
    **dict.fromkeys(("transform", "settings", "label_teacher", "kernel", "teachers", "chosen_by"), MAPPING),
    **dict.fromkeys(("imported", "ema", "versions", "backbone"), MAPPING),
}
PARAMETERS_METADATA: dict[str, Rule] = {
    "decoder": SET_METADATA["decoder"],
    "class_names": (lambda value: bool(value) and NAMES[0](value), "a list of at least one name"),
    "shape": (
        lambda value: _is_list(value, lambda size: _is_count(size) and 0 < size <= 1024) and len(value) == 3,
        "a list of C, H and W, each in 1..1024,",
    ),
    "transform": (
        lambda value: isinstance(value, dict) and (value.get("kind") != "zca" or is_number(value.get("eps"), 0)),
        "a description of a transform",
    ),
    "images": TEXT,
}
TEACHER_METADATA: dict[str, Rule] = {
    "network": NETWORK,
    "accuracies": (
        lambda value: _is_list(value, lambda entry: entry is None or is_number(entry, 0, 1)),
        "a list of accuracies in [0, 1] or null",
    ),
    "batch_size": (lambda value: value is None or _is_count(value), "a count or null"),
    **dict.fromkeys(("method", "precision"), TEXT),
    "versions": MAPPING,
    **dict.fromkeys(("epochs", "teacher"), COUNT),
    **dict.fromkeys(("transform", "augmentation"), MAPPING_OR_NONE),
    **dict.fromkeys(("rho", "alpha", "lr", "momentum", "weight_decay"), RATE),
}
STORE_METADATA: dict[str, Rule] = {
    "class_names": NAMES,
    "transform": MAPPING,
    "shape": (_is_shape, "a mapping of in_channels, num_classes and image_size, each above 0,"),
}


def check_metadata(
    metadata: Mapping[str, Any], rules: Mapping[str, Rule], where: object, *, required: Sequence[str] = ()
) -> None:
    """Refuse metadata that lacks a required key, or has a value that its key does not allow."""
    for key in required:
        if key not in metadata:
            refuse(where, key, "is missing from the metadata; make it again")
    for key, (holds, wanted) in rules.items():
        if key in metadata and not holds(metadata[key]):
            refuse(where, key, f"is {metadata[key]!r:.60}, {wanted} is needed; make it again")


def check_tensor(tensor: Tensor, field: str, where: object, shape: Sequence[int | None]) -> None:
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


def check_finite(tensor: Tensor, field: str, where: object) -> None:
    """Refuse NaN and infinities."""
    if not bool(torch.isfinite(tensor).all()):
        refuse(where, field, "has values that are not finite")


def label_kind(labels: Tensor, metadata: Mapping[str, Any]) -> LabelKind:
    """Return the kind of labels: as recorded, or else classes for integers and probabilities for floats."""
    recorded: LabelKind | None = metadata.get("label_kind")
    return recorded or ("class" if labels.ndim == 1 else "probability")


def check_labels(labels: Tensor, count: int, classes: int | None, kind: str, where: object) -> None:
    """Refuse labels that do not label ``count`` images of ``classes`` classes (None: unknown).

    Of kind "class" they are (N,) int64 in [0, K); of "probability" (N, K) float32, non-negative with sum 1; of "target"
    (N, K) float32, any finite values that a method learns.
    """
    if kind not in ("class", "probability", "target"):
        refuse(where, "label_kind", f"is {kind!r:.60}, class, probability or target is needed")
    most = classes or MOST_CLASSES
    if kind != "class":
        check_tensor(labels, "labels", where, (count, classes))
    elif labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
        refuse(where, "labels", f"are {labels.dtype} {tuple(labels.shape)}, classes are int64 ({count},)")
    elif not 0 <= int(labels.min()) <= int(labels.max()) < most:
        refuse(where, "labels", f"run from {labels.min()} to {labels.max()}, classes from 0 to {most - 1}")
    if kind == "probability" and (labels.min() < 0 or (labels.double().sum(1) - 1).abs().max() > SUM_TOLERANCE):
        refuse(where, "labels", "are not probabilities: each row is non-negative and has sum 1")


def check_step_size(step_size: Tensor, where: object) -> None:
    """Refuse anything but one positive step size, (), or one for each step, (n,)."""
    if step_size.ndim > 1 or not step_size.numel() or not step_size.is_floating_point():
        refuse(where, "step_size", f"is {step_size.dtype} {tuple(step_size.shape)}, a number or one per step is needed")
    check_finite(step_size, "step_size", where)
    if not bool((step_size > 0).all()):
        refuse(where, "step_size", f"is {float(step_size.min()):g}, it must be above 0")


def per_cent(value: Mapping[str, Any] | None, *, count: bool = False) -> str:
    """Format accuracies, fractions, as mean ± standard deviation in per cent: 93.7 ± 0.4; ``count`` adds "n"."""
    if not value:
        return "-"
    return f"{100 * value['mean']:.1f} ± {100 * value['std']:.1f}" + (f" ({value['n']})" if count else "")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Format lines of cells as a Markdown table; the first one is its head, and short ones are filled with "-"."""
    width = len(lines[0])
    cells = [[cell.replace("|", "\\|") for cell in line] + ["-"] * (width - len(line)) for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], ["---"] * width, *cells[1:]])
