"""Readers of foreign files give a good object or one InputError of one line, whatever the file holds."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fits import record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftd_lightning.commands.parameters import export_parameters, import_parameters
from ftd_lightning.core.arguments import plain
from ftd_lightning.decoders import MultiFormation
from ftd_lightning.errors import InputError
from ftd_lightning.files import SyntheticSet, TrajectoryStore, Whitening, schema
from ftd_lightning.files.safetensors_io import DTYPES, KEY, TensorFile, write_tensors
from ftd_lightning.shipped_configs import with_config_files

thorough = settings(
    max_examples=200 if "FTD_TEST_ALL" in os.environ else 20,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def read_set(path):
    found = SyntheticSet.load(path)
    found.pictures()
    tensors = [found.images, found.labels, found.step_size, found.ema_images, *found.transform.tensors().values()]
    return tensors, [found.class_names, found.transform.describe(), found.metadata]


def read_store(path):
    store = TrajectoryStore(path.parent)
    rest = [store.teacher_metadata(0), store.shape, store.num_parameters, store.epochs]
    return [*store.segment(0, 0, 1), store.trajectory(0)], rest


def read_data(path):
    store = TrajectoryStore(path.parent)
    return [], [store.data.dataset, store.data.class_names, store.shape, store.data.transform.describe()]


def read_whitening(path):
    found = Whitening.load(path)
    return [found.mean, found.inverse, found.matrix], found.describe()


def read_parameters(path):
    out = path.with_name("imported.safetensors")
    out.unlink(missing_ok=True)
    import_parameters(path, out)
    return read_set(out)


READERS = {
    "exported/parameters.safetensors": read_parameters,
    "set.safetensors": read_set,
    "store/teacher_0000.safetensors": read_store,
    "other/data.safetensors": read_data,
    "whitening.safetensors": read_whitening,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file for each reader."""
    folder = tmp_path_factory.mktemp("readers")
    whitening = Whitening.fit(torch.rand(9, 1, 1, 2, generator=torch.Generator().manual_seed(0)))
    whitening.save(folder / "whitening.safetensors")
    images = torch.linspace(-1, 1, 4).view(2, 1, 1, 2)
    metadata = {"method": "ftd", "iterations": 3, "settings": {"ipc": 1}, "scores": {"raw": {"mean": 0.5}}}
    made = SyntheticSet(images, torch.tensor([0, 1]), torch.tensor(0.5), images / 2, ["a", "b"], whitening, metadata)
    made.save(folder / "set.safetensors")
    decoder = {"decoder": plain(MultiFormation(1))}
    decoded = replace(made, metadata={**metadata, **decoder}, codes={"images": images})
    decoded.save(folder / "decoded.safetensors")
    export_parameters(folder / "decoded.safetensors", folder / "exported")
    for name in ("store", "other"):
        record(folder / name, teachers=1, epochs=1).rename(folder / name / "moved")
        for path in (folder / name / "moved").iterdir():
            path.rename(folder / name / path.name)
    return folder


class Reader:
    """A reader and a file for it, of which it reads any other content."""

    def __init__(self, path, read):
        self.path, self.read = path, read
        self.content = path.read_bytes()
        self.original = self.now()
        self.values = 8 + int.from_bytes(self.content[:8], "little")  # where the header ends
        self.header = json.loads(self.content[8 : self.values])
        metadata = json.loads(self.header["__metadata__"][KEY])
        self.kind = metadata["kind"]
        self.metadata = {key: value for key, value in metadata.items() if key not in ("checksum", "checksums")}
        found = TensorFile(path, kind=self.kind)
        self.tensors = {name: found[name].clone() for name in found.names}

    def of(self, content):
        """Read other content; None where that is refused in one line that names the file."""
        self.path.unlink()  # tensors read before are mapped
        self.path.write_bytes(content)
        return self.now()

    def now(self):
        try:
            tensors, rest = self.read(self.path)
            return str([None if tensor is None else tensor.tolist() for tensor in tensors]) + json.dumps(rest)
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert str(self.path) in message
            assert len(message) < len(str(self.path)) + 400
            return None

    def with_metadata(self, text):
        """Lay out the file's own tensors with another text as metadata, and without checksums."""
        written = json.dumps({**self.header, "__metadata__": {KEY: text}}).encode()
        return self.of(len(written).to_bytes(8, "little") + written + self.content[self.values :])


@pytest.fixture(scope="module", params=READERS)
def reader(request, folder):
    return Reader(folder / request.param, READERS[request.param])


@given(data=st.data())
@thorough
def test_a_damaged_file_is_refused_or_reads_the_same(reader, data):
    """Random bytes, a file cut anywhere, a flipped bit."""
    noise = data.draw(st.binary(max_size=300))
    assert reader.of(noise) is None
    assert reader.of(len(noise).to_bytes(8, "little") + noise) is None
    last = len(reader.content) - 1
    place = data.draw(st.integers(0, last) | st.integers(min(reader.values, last), last))
    assert reader.of(reader.content[:place]) is None
    content = bytearray(reader.content)
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    found = reader.of(bytes(content))
    assert found is None or (place < reader.values and found == reader.original)
    assert reader.of(reader.content) == reader.original


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
    *("kind", "format", "label_kind", "parameters", "dataset", "mean", "std"),
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
@thorough
def test_odd_contents_are_refused_or_make_a_good_object(reader, data):
    """Metadata of any types, deep nesting, tensors of any shape; as other programs might write them."""
    reader.with_metadata(json.dumps({"kind": reader.kind, **data.draw(odd(reader.metadata))}))
    depth, key = data.draw(st.integers(1, 100_000)), data.draw(st.sampled_from(["network", "transform", "other"]))
    text = json.dumps({**reader.metadata, "kind": reader.kind, key: "DEEP"})
    reader.with_metadata(text.replace('"DEEP"', "[" * depth + "]" * depth))
    name = data.draw(st.sampled_from([*reader.tensors, "transform.mean", "labels", "step_size", "other"]))
    tensors = {**reader.tensors, name: data.draw(TENSORS)}
    if not data.draw(st.integers(0, 4)):
        del tensors[name]
    reader.path.unlink()
    write_tensors(reader.path, tensors, kind=reader.kind, metadata=reader.metadata)
    reader.now()
    assert reader.of(reader.content) == reader.original


CONFIG = b"model:\n  class_path: FTD\n  init_args: {rho: 0.1, tags: [a, b]}\n"
SNIPPETS = (
    *(": ", "\n", "- ", "&a ", "*a", "[", "]", "{", "}", "!!python/object:os.system ", "? "),
    *("2001-01-01", "2001-99-99", "!!binary ", "!!set ", "~", "\t", "\x00", "é", "'", '"', "| ", "<<", "a" * 300),
)


@given(
    content=st.binary(max_size=100)
    | st.lists(st.sampled_from(SNIPPETS), max_size=8).map(lambda s: "".join(s).encode())
    | st.builds(lambda rest: yaml.safe_dump({"model": rest}, allow_unicode=True).encode(), JSON),
    place=st.integers(0, len(CONFIG) - 1),
    bit=st.integers(0, 7),
)
@thorough
def test_a_config_is_refused_or_passed_on(tmp_path: Path, content, place, bit):
    damaged = bytearray(CONFIG)
    damaged[place] ^= 1 << bit
    path = tmp_path / "config.yaml"
    for text in (content, bytes(damaged), CONFIG[:place]):
        path.write_bytes(text)
        passed, message = None, ""
        try:
            passed, _ = with_config_files(["fit", "--config", str(path)])
        except InputError as error:
            message = str(error)
        assert passed == ["fit", "--config", str(path)] or (str(path) in message and "\n" not in message)
