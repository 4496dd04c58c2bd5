"""``ftd info``: describe a file of this library in about ten lines, or as JSON."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ftd_lightning.command_line import parse_command
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore, synthetic_set, trajectory_store
from ftd_lightning.files.safetensors_io import TensorFile, without_nan
from ftd_lightning.files.schema import label_kind, per_cent
from ftd_lightning.files.trajectory_store import check_teacher, epoch_name
from ftd_lightning.files.transforms import Whitening

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


BATCH = 256  # of evaluations, published ones too


class Description(NamedTuple):
    """What a file or a folder holds: its kind, (name, text) pairs for people, and facts as JSON holds them."""

    kind: str
    rows: list[tuple[str, str]]
    facts: dict[str, Any]


def phrase(value: Any) -> str:
    """Format a JSON value for people: rho 0.01, adaptive no, alpha none."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {phrase(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(phrase(item) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


def _named(value: Any) -> str:
    """Format a data set or a network: its name, and what else is known in brackets."""
    if not isinstance(value, dict):
        return phrase(value)
    hidden = ("name", "shapes", "parameters", "options")
    if value.get("unnamed"):
        return "not described"
    if parameters := value.get("parameters"):
        value = {**value, "of": f"{len(parameters)} parameters, {parameters[0][0]} to {parameters[-1][0]}"}
    rest = {key: item for key, item in value.items() if key not in hidden and item not in (None, {}, "")}
    rest = {**value.get("options", {}), **rest}
    return phrase(value.get("name")) + (f" ({phrase(rest)})" if rest else "")


def _decoder(value: Mapping[str, Any]) -> str:
    return _named({"name": value["class_path"].rpartition(".")[2], **value["init_args"]})


def format_transform(description: Mapping[str, Any] | None) -> str:
    """Format the description of a transform."""
    if description is None:
        return "unknown: the images came from a datamodule that does not describe it"
    if description.get("kind") == "zca":
        return f"ZCA whitening, eps {phrase(description['eps'])}"
    if description.get("kind") == "standardization":
        return f"standardised, mean {phrase(description['mean'])}, std {phrase(description['std'])}"
    return phrase(dict(description))


def _scores(scores: Any) -> str:
    """Format scores; accuracies in per cent."""
    if not isinstance(scores, dict):
        return phrase(scores)
    return "; ".join(
        f"{name} {per_cent(score)} % ({score['n']} networks)"
        if isinstance(score, dict) and {"mean", "std", "n"} <= set(score)
        else f"{name} {phrase(score)}"
        for name, score in scores.items()
    )


FORMATS: dict[str, Callable[[Any], str]] = {
    "decoder": _decoder,
    "network": _named,
    "dataset": _named,
    "transform": format_transform,
    "scores": _scores,
    "chosen_on": _scores,
}


def _recorded(metadata: Mapping[str, Any], *keys: str) -> list[tuple[str, str]]:
    """Return a row for each key that is recorded."""
    titles = {key: "data set" if key == "dataset" else key.replace("_", " ") for key in keys if key in metadata}
    return [(title, FORMATS.get(key, phrase)(metadata[key])) for key, title in titles.items()]


def describe_set(path: Path) -> Description:
    """Describe a synthetic set, without building its whitening."""
    synthetic = SyntheticSet.load(path)
    return Description("synthetic set", *_of_set(synthetic, synthetic.transform.describe()))


def describe_parameters(path: Path) -> Description:
    """Describe the set that a file of parameters gives."""
    from ftd_lightning.commands.parameters import needs_images, read_parameters  # with Lightning, which takes a second

    synthetic, file = read_parameters(path)
    transform = file.metadata["transform"]
    rows, facts = _of_set(synthetic, transform)
    if needs_images(file):
        said = f"{format_transform(transform)}; not in this file: ftd import fits it on the data set's images again"
        rows = [(name, said if name == "transform" else text) for name, text in rows]
    return Description("parameters of a synthetic set", rows, facts)


def _of_set(synthetic: SyntheticSet, transform: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    images, labels, names = synthetic.images, synthetic.labels, synthetic.class_names
    metadata = {**synthetic.metadata, "class_names": names, "transform": transform}
    counts = (labels.argmax(1) if labels.ndim == 2 else labels).bincount(minlength=len(names)).tolist()
    budget, steps = synthetic.budget(), -(-len(images) // BATCH)
    stored, trained_on = synthetic.image_counts
    low, high = (float(value) for value in torch.aminmax(images))
    facts = {
        "images": list(images.shape),
        "labels": synthetic.label_description,
        **budget,
        "steps_per_epoch": steps,
        "per_class": counts,
        "step_size": synthetic.learning_rate,
        "ema": synthetic.ema_images is not None,
        "values": {"min": low, "max": high, "mean": float(images.mean()), "std": float(images.std(correction=0))},
        "metadata": metadata,
    }
    method = phrase(metadata.get("method", "unknown"))
    if "iterations" in metadata:
        skipped = f", {metadata['skipped_steps']} skipped" if metadata.get("skipped_steps") else ""
        method += f", {metadata['iterations']} iterations{skipped}"
    per_class = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    count = f"{len(images)} of {' x '.join(map(str, images.shape[1:]))}, {per_class} per class"
    count += "" if stored == trained_on else f", decoded from the storage of {stored}"
    count += f"; {'no' if synthetic.ema_images is None else 'with'} EMA images"
    if synthetic.ema_images is not None and "ema_initial_weight" in metadata:
        count += f", which hold {100 * metadata['ema_initial_weight']:.0f} % of the initial ones"
    made, kind = synthetic.label_description, label_kind(labels, metadata)
    made += {"class": "", "probability": ", probabilities", "target": ", targets"}[kind]
    if "label_teacher" in metadata:
        by = metadata["label_teacher"]
        made += f": teacher {by.get('teacher')} after epoch {by.get('epoch')}"
    said = f"{budget['numbers_stored']:,} numbers, {budget['bytes_stored']:,} bytes; "
    said += f"an epoch of an evaluation has {steps:,} step{'s' if steps > 1 else ''} of at most {BATCH} images"
    rows = [
        ("method", method),
        ("data set", _named(metadata.get("dataset", "unknown"))),
        ("images", count),
        *_recorded(metadata, "decoder"),
        *([("stored", said)] if budget["decoder"] else []),
        ("values", f"{low:.4g} to {high:.4g}, as networks see them"),
        ("classes", f"{len(counts)}: {phrase(', '.join(map(str, names[:10])))}{', ...' if len(names) > 10 else ''}"),
        ("labels", made),
        ("step size", phrase(synthetic.learning_rate or "none: evaluation needs a learning rate")),
        *_recorded(
            metadata, "transform", "network", "backbone", "augmentation", "teachers", "imported", "scores", "chosen_on"
        ),
        *_recorded(metadata, "versions"),
    ]
    return rows, facts


def _training(metadata: Mapping[str, Any], accuracies: Sequence[float]) -> list[tuple[str, str]]:
    """Describe how teachers were trained, and the accuracies of those that were measured after the last epoch."""
    settings = {key: metadata[key] for key in ("lr", "momentum", "weight_decay", "batch_size") if key in metadata}
    flatness = {key: metadata[key] for key in ("rho", "alpha", "adaptive") if key in metadata}
    rows = [("optimizer", f"{phrase(metadata.get('optimizer', 'unknown'))}, {phrase(settings)}".rstrip(", "))]
    rows += [("flatness", phrase(flatness))] if flatness else []
    rows += _recorded({"transform": None, **metadata}, "dataset", "transform", "network", "augmentation", "precision")
    if accuracies:
        mean, span = sum(accuracies) / len(accuracies), f"{100 * min(accuracies):.1f} to {100 * max(accuracies):.1f}"
        several = f" ({span})" if len(accuracies) > 1 else ""
        rows.append(("accuracy", f"{100 * mean:.1f} %{several} after the last epoch"))
    return rows


def _last(metadata: Mapping[str, Any]) -> list[float]:
    """Return the accuracy after the last epoch; an empty list where none was measured."""
    return [value for value in metadata.get("accuracies", [])[-1:] if value is not None]


def describe_store(path: Path) -> Description:
    """Describe a trajectory store."""
    store = TrajectoryStore(path)
    each = [store.teacher_metadata(index) for index in range(len(store))]
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    lengths = f"{store.epochs} to {max(store.lengths)}" if max(store.lengths) > store.epochs else str(store.epochs)
    kinds = {dumps(one.get("versions"), sort_keys=True) for one in each}
    facts = {
        "teachers": len(store),
        "epochs": store.epochs,
        "parameters": store.num_parameters,
        "bytes": size,
        "each": [{key: one.get(key) for key in ("teacher", "seed", "accuracies", "versions")} for one in each],
        "metadata": store.metadata,
    }
    rows = [
        ("teachers", f"{len(store)} of {lengths} epochs, {store.num_parameters:,} weights each"),
        *_training(store.metadata, [value for one in each for value in _last(one)]),
        ("on disk", f"{size / 2**20:,.1f} MiB"),
        *_recorded({"versions": f"{len(kinds)} different ones"} if len(kinds) > 1 else each[0], "versions"),
    ]
    return Description("trajectory store", rows, facts)


def describe_teacher(path: Path) -> Description:
    """Describe one teacher's file."""
    file = TensorFile(path, kind=trajectory_store.KIND)
    epochs, metadata, weights = check_teacher(file), file.metadata, file.layout(epoch_name(0))[1][0]
    rows = [
        ("teacher", f"number {metadata.get('teacher')}, seed {metadata.get('seed')}"),
        ("epochs", f"{epochs}, {weights:,} weights"),
        *_training(metadata, _last(metadata)),
        *_recorded(metadata, "versions"),
    ]
    return Description("teacher", rows, {"parameters": weights, "metadata": metadata})


def describe_whitening(path: Path) -> Description:
    """Describe a cached whitening."""
    whitening = Whitening.load(path)
    values, described = whitening.mean.numel(), whitening.describe()
    rows = [("transform", f"{format_transform(described)}, {values} values per image")]
    rows += [("fitted on", f"images of fingerprint {whitening.fitted_on}")]
    return Description("whitening", rows, {"values": values, "metadata": {"transform": described}})


KINDS = {
    synthetic_set.KIND: describe_set,
    synthetic_set.PARAMETERS: describe_parameters,
    trajectory_store.KIND: describe_teacher,
    "whitening": describe_whitening,
}


def describe(path: Path) -> Description:
    """Describe a synthetic set or its parameters, a trajectory store, a teacher or a whitening; refuse all else."""
    if path.is_dir():
        return describe_store(path)
    kind = TensorFile(path).kind
    if kind is None:
        raise InputError(f"{path}: a safetensors file of another program; ftd import may be able to read it")
    if kind not in KINDS:
        raise InputError(f"{path}: is a {kind.replace('_', ' ')}; info knows sets, stores, teachers and whitenings")
    return KINDS[kind](path)


def info(path: Path, *, json: bool = False) -> None:
    """Describe a synthetic set or its parameters, a trajectory store, a teacher or a whitening.

    Args:
        path: its file, or the folder of a store.
        json: print everything that is known, as JSON.
    """
    kind, rows, facts = describe(path)
    if json:
        everything = {"path": str(path), "kind": kind.replace(" ", "_"), **facts}
        print(dumps(without_nan(everything), indent=2, ensure_ascii=False))
        return
    print(f"{path}: {kind}")
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"  {name:<{width}}  {text}")


def main(arguments: Sequence[str]) -> None:
    """Run ``ftd info``."""
    info(**parse_command(info, "info", arguments))
