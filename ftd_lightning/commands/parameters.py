"""The parameters alone of a set, pixels or a decoder's: a small file that the set comes back from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ftd_lightning.core.arguments import decoder_of
from ftd_lightning.data import DistillationDataModule
from ftd_lightning.data.datasets import DATASETS
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet
from ftd_lightning.files.safetensors_io import TensorFile, fingerprint, new_folder, write_tensors
from ftd_lightning.files.schema import PARAMETERS_METADATA, check_metadata
from ftd_lightning.files.synthetic_set import CODES, PARAMETERS, PREFIX
from ftd_lightning.files.transforms import load_transform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ftd_lightning.contracts import ImageTransform

NAME = "parameters.safetensors"
HERE_ALONE = ("folder", "images")  # data sets that another machine does not have
OPTIONS = ("image_size", "classes", "val_fraction", "max_per_class", "seed")  # which images a whitening was fitted on
OF_FILE = ("kind", "format", "class_names", "transform", "shape", "images", "ema", "ema_initial_weight")


def _dataset(metadata: Mapping[str, Any]) -> dict[str, Any]:
    recorded = metadata.get("dataset")
    return recorded if isinstance(recorded, dict) else {"name": recorded}


def _found_again(dataset: Mapping[str, Any]) -> bool:
    """Tell whether any machine can read a data set by its name."""
    return (name := str(dataset.get("name"))) in DATASETS and name not in HERE_ALONE


def export_parameters(path: Path, folder: Path, *, ema: bool = False) -> int:
    """Write the parameters of a set as ``parameters.safetensors``; arguments and result are those of ``export``.

    Parameters are the decoder's; without a decoder, the images. Beside them are labels, step size and the metadata of
    the set. A whitening, which takes ``4 (C H W)^2`` bytes, is left out where the import can fit it again, on a data
    set that has a name.
    """
    synthetic = SyntheticSet.load(path)
    if ema:
        raise InputError(f"{path}: holds the last parameters, not averaged ones; leave --ema out")
    given = {"labels": synthetic.labels, "step_size": synthetic.step_size}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    tensors |= {f"{CODES}{name}": tensor for name, tensor in synthetic.codes.items()} or {"images": synthetic.images}
    if not _found_again(_dataset(synthetic.metadata)):
        tensors |= {f"{PREFIX}{key}": tensor for key, tensor in synthetic.transform.tensors().items()}
    metadata = {
        **synthetic.metadata,
        "class_names": synthetic.class_names,
        "transform": synthetic.transform.describe(),
        "shape": list(synthetic.images.shape[1:]),
        "images": fingerprint(synthetic.images),
    }
    with new_folder(folder) as part:
        write_tensors(part / NAME, tensors, kind=PARAMETERS, metadata=metadata)
    return len(synthetic.images)


def needs_images(file: TensorFile) -> bool:
    """Tell whether the whitening was left out, which an import fits on the data set's images again."""
    whitened = file.metadata["transform"].get("kind") == "zca"
    there = any(name.startswith(PREFIX) for name in file.names)
    return whitened and not there and _found_again(_dataset(file.metadata))


def _transform(file: TensorFile, root: Path) -> ImageTransform:
    """Read the transform, or fit a whitening that was left out on the training images again."""
    described, dataset = file.metadata["transform"], _dataset(file.metadata)
    if not needs_images(file):
        return load_transform(described, file.with_prefix(PREFIX), where=file.path)
    options = {key: dataset[key] for key in OPTIONS if key in dataset}
    try:
        data = DistillationDataModule(dataset["name"], str(root), zca=True, zca_eps=described.get("eps"), **options)
        data.setup()
    except (TypeError, ValueError) as error:  # odd options, or images that are not in root
        raise InputError(f"{file.path}: its whitening cannot be fitted again: {error}") from error
    if data.transform.describe() != described:
        raise InputError(f"{file.path}: was whitened by other images than those in {root}")
    return data.transform


def _scores(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracies without those of averaged images, which the file does not have."""
    scores = metadata.get("scores")
    if not isinstance(scores, dict):
        return {}
    return {"scores": {name: score for name, score in scores.items() if not name.startswith("ema ")}}


def read_parameters(path: Path) -> tuple[SyntheticSet, TensorFile]:
    """Read a set of the file that ``ftd export --format parameters`` wrote, but for its transform; decode its images.

    The decoder is one of this library's, by its name; no code in the file is run.
    """
    file = TensorFile(path, kind=PARAMETERS)
    metadata: Mapping[str, Any] = file.metadata
    required = [name for name in PARAMETERS_METADATA if name != "decoder"]
    check_metadata(metadata, PARAMETERS_METADATA, path, required=required)
    labels, codes, names = file["labels"], file.with_prefix(CODES), metadata["class_names"]
    synthetic = SyntheticSet(
        _decoded(path, metadata, labels, codes) if "decoder" in metadata else file["images"],
        labels,
        step_size=file["step_size"] if "step_size" in file.names else None,
        class_names=names,
        metadata={key: value for key, value in metadata.items() if key not in OF_FILE} | _scores(metadata),
        codes=codes,
    )
    synthetic.check(path)
    return synthetic, file


def _decoded(path: Path, metadata: Mapping[str, Any], labels: Tensor, codes: dict[str, Tensor]) -> Tensor:
    names = metadata["class_names"]
    count = max(1, len(labels) // len(names)) if labels.ndim else 1
    try:
        decoder = decoder_of(metadata["decoder"])
        assert decoder is not None, "checked before"
        decoder.restore(tuple(metadata["shape"]), torch.arange(len(names)).repeat_interleave(count), codes)
        with torch.no_grad():
            return decoder.decode(codes)
    except Exception as error:  # odd parameters can make a decoder raise anything
        said = " ".join(str(error).split())
        raise InputError(f"{path}: does not decode to images: {said:.300}") from error


def import_parameters(parameters: Path, out: Path, *, root: Path = Path("data")) -> tuple[SyntheticSet, bool]:
    """Make a set of the parameters that ``ftd export --format parameters`` wrote; its images are decoded again.

    Args:
        parameters: parameters.safetensors.
        out: the set to write, e.g. set.safetensors.
        root: folder of the data set, on which a whitening is fitted again.

    Returns:
        The set, and whether its images are bit for bit those that were exported.
    """
    if out.exists():
        raise InputError(f"{out}: is there already; name another file")
    synthetic, file = read_parameters(parameters)
    synthetic.transform = _transform(file, root)
    synthetic.check(parameters)
    synthetic.save(out)
    return synthetic, fingerprint(synthetic.images) == file.metadata["images"]
