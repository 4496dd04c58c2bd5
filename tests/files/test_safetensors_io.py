import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ftd_lightning.files.safetensors_io import KEY, TensorFile, fingerprint, replacing, write_tensors

METADATA = {"network": {"name": "convnet", "width": 8}, "epochs": 3, "accuracies": [0.1, 0.25], "note": "naïve"}
TENSORS = {
    "double": torch.arange(3.0).double(),
    "float": torch.ones(2, 0, 3),
    "half": torch.arange(5.0).half(),
    "bfloat": torch.arange(5.0).bfloat16().view(5, 1),
    "long": torch.tensor(7),
    "int": torch.arange(6).int().view(2, 3).t(),
    "byte": torch.arange(7).byte(),
    "bool": torch.tensor([True, False]),
    "naïve": torch.zeros(3, requires_grad=True),
}


def test_tensors_and_metadata_come_back_as_written(tmp_path):
    path = tmp_path / "deep" / "er" / "thing.safetensors"
    write_tensors(path, TENSORS, kind="thing", metadata={**METADATA, "kind": "zca", "format": 99})
    file = TensorFile(path, kind="thing")
    assert file.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)
        assert file.layout(name)[1] == tuple(tensor.shape)
    assert file.metadata == {**METADATA, "kind": "thing", "format": 1}  # metadata cannot change the kind
    assert TensorFile(path).kind == "thing"
    assert os.listdir(path.parent) == [path.name]
    with safe_open(path, framework="pt") as plain:  # without this library
        assert json.loads(plain.metadata()[KEY])["accuracies"] == [0.1, 0.25]


def test_equal_contents_are_equal_bytes_whatever_the_order(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, kind="thing", metadata=METADATA)
    backwards = [dict(reversed(mapping.items())) for mapping in (TENSORS, METADATA)]
    write_tensors(tmp_path / "b", backwards[0], kind="thing", metadata=backwards[1])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_tensor_may_have_two_names_and_some_are_read_by_a_prefix(tmp_path):
    mean = torch.rand(3)
    write_tensors(tmp_path / "f", {"t.mean": mean, "t.inverse": mean, "images": mean}, kind="thing", metadata={})
    found = TensorFile(tmp_path / "f").with_prefix("t.")
    assert {name: tensor.tolist() for name, tensor in found.items()} == dict.fromkeys(
        ("mean", "inverse"), mean.tolist()
    )


def test_file_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    # Teachers are recorded once and shared; safetensors lets only the owner read its files.
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "f", TENSORS, kind="thing", metadata={})
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_missing_and_foreign_files_are_refused(tmp_path, refused):
    path = tmp_path / "f"
    with refused(path, "no such file"):
        TensorFile(path)
    with refused(tmp_path):
        TensorFile(tmp_path)
    write_tensors(path, TENSORS, kind="teacher_trajectory", metadata={})
    with refused(path, "synthetic set", "teacher trajectory"):
        TensorFile(path, kind="synthetic_set")
    with refused(path, "'pictures'"):
        TensorFile(path)["pictures"]
    with refused(path, "'pictures'"):
        TensorFile(path).layout("pictures")
    save_file({"a": torch.zeros(2)}, path, metadata={"format": "pt"})
    assert TensorFile(path).kind is None
    with refused(path, "another program"):
        TensorFile(path, kind="thing")


def test_truncated_and_damaged_files_are_refused(tmp_path, refused):
    path, tensors = tmp_path / "f", {"a": torch.zeros(8), "b": torch.ones(8)}
    write_tensors(path, tensors, kind="thing", metadata={"method": "mtt"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with refused(path, "truncated"):
        TensorFile(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    assert torch.equal(TensorFile(path)["a"], torch.zeros(8))
    assert TensorFile(path).read("b", verify=False).shape == (8,)
    with refused("f: is damaged, b has another checksum"):
        TensorFile(path)["b"]
    path.write_bytes(whole.replace(b"mtt", b"mtu"))
    with refused("f: is damaged, its metadata has another checksum"):
        TensorFile(path)


def test_other_formats_are_refused_and_checksums_may_be_missing(tmp_path, refused):
    for number, words in [(2, "newer"), ("1", "'1'"), (0, "0"), (None, "None"), (True, "True")]:
        save_file({"a": torch.ones(2)}, tmp_path / "f", metadata={KEY: json.dumps({"kind": "x", "format": number})})
        with refused("f: ", "format", words):
            TensorFile(tmp_path / "f", kind="x")
    save_file({"a": torch.ones(2)}, tmp_path / "f", metadata={KEY: json.dumps({"kind": "x", "note": [2]})})  # as of 0.1
    assert torch.equal(TensorFile(tmp_path / "f", kind="x")["a"], torch.ones(2))
    assert TensorFile(tmp_path / "f").metadata["note"] == [2]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def break_off():
        with replacing(path) as part:
            assert part.parent == path.parent  # a rename across file systems would not be atomic
            part.write_text("half of the n")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    with pytest.raises(TypeError):
        write_tensors(path, TENSORS, kind="thing", metadata={"network": object()})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OSError, match=str(tmp_path / "folder'")):  # the file is named, not its part
        write_tensors(tmp_path / "folder", TENSORS, kind="thing", metadata={})


def write_numbers(path, writer, count):
    for number in range(count):
        values = torch.full((50_000 + 10_000 * writer,), float(number))
        write_tensors(path, {"values": values}, kind="thing", metadata={"writer": writer, "number": number})


def test_threads_that_write_one_file_at_the_same_time_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "f"
    with ThreadPoolExecutor(max_workers=2) as pool:
        writers = [pool.submit(write_numbers, path, writer, 20) for writer in range(2)]
        for writer in writers:
            writer.result()
    file = TensorFile(path, kind="thing")
    assert file.metadata["number"] == 19  # the last to finish wins
    assert file["values"].tolist() == [19.0] * (50_000 + 10_000 * file.metadata["writer"])
    assert os.listdir(tmp_path) == ["f"]


def test_fingerprint_tells_values_shapes_and_types_apart():
    zeros = torch.zeros(6)
    different = [zeros, zeros.view(2, 3), zeros.int(), torch.eye(6)[0], torch.zeros(5), torch.zeros(())]
    assert len({fingerprint(tensor) for tensor in different} | {fingerprint(zeros, zeros)}) == 7
    assert fingerprint(torch.arange(6).view(2, 3).t()) == fingerprint(torch.tensor([[0, 3], [1, 4], [2, 5]]))
