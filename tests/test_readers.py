"""Readers of foreign files give a good object or one InputError of one line, whatever the file holds."""

import json
import math
import os
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from ftd_lightning.contracts import DataDescription, ImageShape
from ftd_lightning.data.decoding import DecodedImages, fill_cache
from ftd_lightning.data.folder import ImageTree
from ftd_lightning.errors import InputError
from ftd_lightning.files import Standardization, SyntheticSet, TrajectoryStore, Whitening, schema
from ftd_lightning.files.safetensors_io import DTYPES, KEY, TensorFile, write_tensors
from ftd_lightning.files.trajectory_store import write_store_data, write_teacher
from ftd_lightning.shipped_configs import with_config_files

# make test-all tries ten times as many.
EXAMPLES = 10 if "FTD_TEST_ALL" in os.environ else 1
thorough = partial(
    settings,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Whole(NamedTuple):
    """What was read, in a form that compares."""

    tensors: list[Any]
    rest: str


def whole(tensors, rest):
    return Whole([None if tensor is None else tensor.tolist() for tensor in tensors], json.dumps(rest, sort_keys=True))


# Each reader: a file that it reads, as it is written, and what is read from it.


def set_file(folder):
    transform = Whitening.fit(torch.rand(9, 1, 1, 2, generator=torch.Generator().manual_seed(0)))
    images = torch.linspace(-1, 1, 4).view(2, 1, 1, 2)
    metadata = {"method": "ftd", "iterations": 3, "settings": {"ipc": 1}, "scores": {"raw": {"mean": 0.5}}}
    made = SyntheticSet(images, torch.tensor([0, 1]), torch.tensor(0.5), images / 2, ["a", "b"], transform, metadata)
    made.save(folder / "set.safetensors")
    return folder / "set.safetensors"


def read_set(path):
    found = SyntheticSet.load(path)
    found.pictures()
    assert found.learning_rate is None or found.learning_rate > 0
    assert SyntheticSet.read_metadata(path) == found.metadata or found.metadata != found.metadata
    transform = found.transform
    tensors = [found.images, found.labels, found.step_size, found.ema_images, *transform.tensors().values()]
    return whole(tensors, [found.class_names, transform.describe(), found.metadata])


def teacher_file(folder):
    network = {"name": "convnet", "in_channels": 1, "num_classes": 2, "image_size": 2}
    metadata = {"network": network, "rho": 0.1, "accuracies": [0.1, None], "transform": None, "batch_size": 4}
    return write_teacher(folder, 0, [torch.ones(3), torch.zeros(3)], {**metadata, "versions": {}, "method": "ftd"})


def read_store(path):
    store = TrajectoryStore(path.parent)
    ends = store.segment(0, 0, 1)
    assert torch.equal(ends.target, store.trained(0)) or store.epochs > 1
    rest = [store.teacher_metadata(0), store.class_names, store.shape, store.num_parameters, store.epochs]
    return whole([*ends, store.trajectory(0)], rest)


def data_file(folder):
    shape, transform = ImageShape(1, 2, 2), Standardization([0.5], [0.25])
    description = DataDescription(shape, ["a", "b"], transform, {"name": "digits"}, 4)
    metadata = {"network": {"name": "convnet"}, "transform": transform.describe()}
    write_teacher(folder, 0, [torch.ones(3), torch.zeros(3)], metadata)
    write_store_data(folder, description)
    return folder / "data.safetensors"


def read_data(path):
    store = TrajectoryStore(path.parent)
    transform = store.transform.describe()
    return whole([], [store.data.dataset, store.class_names, store.shape, transform])


def whitening_file(folder):
    Whitening.fit(torch.rand(9, 1, 1, 2, generator=torch.Generator().manual_seed(0))).save(folder / "w.safetensors")
    return folder / "w.safetensors"


def read_whitening(path):
    found = Whitening.load(path)
    return whole([found.mean, found.inverse, found.matrix], found.describe())


def cache_file(folder):
    from PIL import Image

    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        Image.new("L", (2, 2), ord(name)).save(folder / "images" / name / "0.png")
    path = folder / "cache.safetensors"
    part = cached_part(path)
    fill_cache(path, part, part, channels=1, size=2, native_size=2)
    return path


def cached_part(path):
    images = path.parent / "images"
    return ImageTree(images).part([images / "a", images / "b"])


def read_cache(path):
    def form():
        raise InputError(f"{path}: would be decoded again")

    sizes = ("in_channels", "image_size", "native_size")
    decoded = DecodedImages(path, cached_part(path), cached_part(path), form, sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, test = decoded.load()
        return whole([*train, *test], decoded.metadata())


@dataclass
class Reader:
    """A reader and a file for it, of which it reads any other content."""

    path: Path
    read: Any

    def __post_init__(self):
        self.content = self.path.read_bytes()
        self.original = self.read(self.path)
        self.values = 8 + int.from_bytes(self.content[:8], "little")  # where the header ends
        with self.path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(self.values - 8))
        self.header = json.loads(header["__metadata__"][KEY])
        self.kind = self.header["kind"]
        self.metadata = {key: value for key, value in self.header.items() if key not in ("checksum", "checksums")}
        found = TensorFile(self.path, kind=self.kind)
        self.tensors = {name: found[name].clone() for name in found.names}

    def of(self, content):
        """Read other content; None where that is refused in one line that names the file."""
        self.path.unlink()  # tensors read before are mapped
        self.path.write_bytes(content)
        return self.now()

    def now(self):
        try:
            return self.read(self.path)
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert str(self.path) in message
            assert len(message) < len(str(self.path)) + 400
            return None


READERS = {
    "set": (set_file, read_set),
    "teacher": (teacher_file, read_store),
    "data of a store": (data_file, read_data),
    "whitening": (whitening_file, read_whitening),
    "image cache": (cache_file, read_cache),
}


@pytest.fixture(scope="module", params=READERS)
def reader(request, tmp_path_factory):
    make, read = READERS[request.param]
    return Reader(make(tmp_path_factory.mktemp("readers")), read)


# Damage


@given(content=st.binary(max_size=300))
@thorough(max_examples=10 * EXAMPLES)
def test_random_bytes_are_refused(reader, content):
    assert reader.of(content) is None
    assert reader.of(len(content).to_bytes(8, "little") + content) is None


@given(data=st.data())
@thorough(max_examples=10 * EXAMPLES)
def test_a_file_cut_anywhere_is_refused(reader, data):
    length = data.draw(st.integers(0, len(reader.content) - 1))
    assert reader.of(reader.content[:length]) is None


@given(data=st.data())
@thorough(max_examples=20 * EXAMPLES)
def test_a_flipped_bit_is_refused_or_changes_nothing(reader, data):
    place = data.draw(
        st.integers(0, len(reader.content) - 1)
        | st.integers(min(reader.values, len(reader.content) - 1), len(reader.content) - 1)
    )
    content = bytearray(reader.content)
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    found = reader.of(bytes(content))
    assert found is None or (place < reader.values and found == reader.original)


# Odd contents in whole files

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([10**400, -1, 0, 1, 2, 3, "zca", "standardization", "class", "target", "convnet"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = [
    *{**schema.SET_METADATA, **schema.TEACHER_METADATA, **schema.STORE_METADATA},
    *("kind", "format", "label_kind", "parameters", "dataset", "fingerprint"),
    *("in_channels", "image_size", "native_size", "mean", "std"),
]
TENSORS = st.builds(
    lambda dtype, shape, value: torch.full(shape, value).to(dtype),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, 1e30]),
)


@st.composite
def odd(draw, metadata):
    """Change values of a mapping, or of mappings in it, to anything; or take them away."""
    changed = json.loads(json.dumps(metadata))
    for _ in range(draw(st.integers(1, 2))):
        place, keys = changed, KEYS
        inner = [key for key, value in changed.items() if isinstance(value, dict) and value]
        if inner and draw(st.booleans()):
            place = changed[draw(st.sampled_from(inner))]
            keys = list(place) or KEYS
        key = draw(st.sampled_from([*place, *keys]))
        if draw(st.integers(0, 4)):
            place[key] = draw(JSON)
        else:
            place.pop(key, None)
    return changed


@given(data=st.data())
@thorough(max_examples=20 * EXAMPLES)
def test_odd_metadata_is_refused_or_makes_a_good_object(reader, data):
    metadata = data.draw(odd(reader.metadata))
    kind = metadata.get("kind", reader.kind)
    # Written as other programs might: what write_tensors itself would never write has no checksum.
    found = reader.of(without_checksums(reader, json.dumps({**metadata, "kind": kind})))
    event("refused" if found is None else "read")


@given(data=st.data())
@thorough(max_examples=15 * EXAMPLES)
def test_odd_tensors_are_refused_or_make_a_good_object(reader, data):
    name = data.draw(st.sampled_from([*reader.tensors, "transform.mean", "labels", "step_size", "other"]))
    tensors = {**reader.tensors, name: data.draw(TENSORS)}
    if not data.draw(st.integers(0, 4)):
        del tensors[name]
    reader.path.unlink()
    write_tensors(reader.path, tensors, kind=reader.kind, metadata=reader.metadata)
    event("refused" if reader.now() is None else "read")


@given(
    depth=st.integers(1, 100_000),
    key=st.sampled_from(["network", "transform", "other"]),
    ends=st.sampled_from(["[]", ['{"a":', "}"]]),
)
@thorough(max_examples=10 * EXAMPLES)
def test_deep_nesting_is_refused_or_makes_a_good_object(reader, depth, key, ends):
    text = json.dumps({**reader.metadata, key: "DEEP"})
    deep = ends[0] * depth + "0" * (ends[0] != "[") + ends[1] * depth
    reader.of(without_checksums(reader, text.replace('"DEEP"', deep)))


def without_checksums(reader, text):
    """Lay out the file's own tensors with another text as metadata."""
    header = json.loads(reader.content[8 : reader.values])
    header["__metadata__"] = {KEY: text}
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + reader.content[reader.values :]


# Configs


class Config:
    """A config."""

    def __init__(self, folder):
        self.path = folder / "config.yaml"
        self.content = b"model:\n  class_path: FTD\n  init_args: {rho: 0.1, tags: [a, b]}\n"

    def of(self, content):
        self.path.write_bytes(content)
        arguments, message = None, None
        try:
            arguments, _ = with_config_files(["fit", "--config", str(self.path)])
        except InputError as error:
            message = str(error)
        if arguments is None:
            assert "\n" not in message
            assert str(self.path) in message
            return None
        assert arguments == ["fit", "--config", str(self.path)]
        return arguments


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(tmp_path_factory.mktemp("configs"))


SNIPPETS = (
    *("base:", "base.yaml", ": ", "\n", "- ", "&a ", "*a", "[", "]", "{", "}", "!!python/object:os.system ", "? "),
    *("2001-01-01", "2001-99-99", "!!binary ", "!!set ", "~", "\t", "\x00", "é", "'", '"', "| ", "<<", "a" * 300),
)


@given(
    content=st.binary(max_size=100) | st.lists(st.sampled_from(SNIPPETS), max_size=8).map(lambda s: "".join(s).encode())
)
@thorough(max_examples=20 * EXAMPLES)
def test_anything_instead_of_a_config_is_refused_or_passed_on(config, content):
    config.of(content)


@given(data=st.data())
@thorough(max_examples=15 * EXAMPLES)
def test_a_damaged_config_is_refused_or_passed_on(config, data):
    place = data.draw(st.integers(0, len(config.content) - 1))
    content = bytearray(config.content)
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    config.of(bytes(content))
    config.of(config.content[:place])


@given(key=st.sampled_from(("base", "model", "data")), value=JSON | st.sampled_from(SNIPPETS), rest=JSON)
@thorough(max_examples=15 * EXAMPLES)
def test_odd_settings_are_refused_or_passed_on(config, key, value, rest):
    passed = config.of(yaml.safe_dump({key: value, "trainer": rest}, allow_unicode=True).encode())
    assert (passed is None) == (key == "base")


def test_the_whole_files_are_read(reader, config):
    assert reader.of(reader.content) == reader.original
    assert len(config.of(config.content)) == 3
