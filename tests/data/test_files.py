import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ftd_lightning.files.safetensors_io import (
    KEY,
    TensorFile,
    fingerprint,
    replacing,
    versions,
    write_in_turn,
    write_tensors,
)

METADATA = {"network": {"name": "convnet", "width": 8}, "epochs": 3, "accuracies": [0.1, 0.25], "note": "naïve"}


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.rand(3, 2, 4, 4, generator=generator),
        "labels": torch.arange(3),
        "step_size": torch.tensor(0.02),
        "whole": torch.rand(7, generator=generator).double(),
    }


def backwards(mapping):
    return dict(reversed(mapping.items()))


def test_tensors_and_metadata_come_back_as_written(tmp_path):
    path, tensors = tmp_path / "deep" / "er" / "thing.safetensors", some_tensors()
    write_tensors(path, tensors, kind="thing", metadata=METADATA)
    file = TensorFile(path, kind="thing")
    assert file.names == set(tensors)
    for name, tensor in tensors.items():
        assert file[name].dtype == tensor.dtype
        assert torch.equal(file[name], tensor)
        assert file.numel(name) == tensor.numel()
    assert {key: file.metadata[key] for key in METADATA} == METADATA
    assert file.metadata["kind"] == "thing"
    assert os.listdir(path.parent) == [path.name]


def test_tensors_that_need_a_gradient_or_are_not_contiguous_are_written(tmp_path):
    weight = torch.arange(6.0).view(2, 3).requires_grad_()
    write_tensors(tmp_path / "f", {"weight": weight.t()}, kind="thing", metadata={})
    assert torch.equal(TensorFile(tmp_path / "f", kind="thing")["weight"], weight.detach().t())


def test_metadata_cannot_change_the_kind_of_a_file(tmp_path):
    # Whatever the metadata holds, a file has to be readable as what it was written as.
    write_tensors(tmp_path / "f", some_tensors(), kind="thing", metadata={"kind": "zca", "format": 99})
    assert TensorFile(tmp_path / "f", kind="thing").metadata["format"] == 1


@pytest.mark.slow
def test_equal_contents_are_equal_bytes_whatever_the_order_of_keys_or_the_process(tmp_path):
    paths = [tmp_path / name for name in "abc"]
    write_tensors(paths[0], some_tensors(), kind="thing", metadata=METADATA)
    write_tensors(paths[1], backwards(some_tensors()), kind="thing", metadata=backwards(METADATA))
    save_file(some_tensors(), tmp_path / "plain")
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import load_file\n"
        "from ftd_lightning.files.safetensors_io import write_tensors\n"
        "plain, path, metadata = sys.argv[1:]\n"
        "write_tensors(Path(path), load_file(plain), kind='thing', metadata=json.loads(metadata))\n"
    )
    # Another hash seed: whatever goes through a set or a hash map comes in another order.
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", program, tmp_path / "plain", paths[2], json.dumps(METADATA)]
    subprocess.run(command, check=True, env=environment)
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such permissions on Windows")
def test_file_has_the_permissions_of_an_ordinary_new_file(tmp_path):
    # Teachers are recorded once and shared; a file that only its owner can read is of no use to others.
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "f", some_tensors(), kind="thing", metadata={})
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_no_pickle_is_needed_to_read_a_file(tmp_path):
    write_tensors(tmp_path / "f", some_tensors(), kind="thing", metadata=METADATA)
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert json.loads(file.metadata()[KEY])["accuracies"] == [0.1, 0.25]
        assert torch.equal(file.get_tensor("images"), some_tensors()["images"])


ALL_DTYPES = {
    "double": torch.arange(3.0).double(),
    "float": torch.ones(2, 0, 3),
    "half": torch.arange(5.0).half(),
    "bfloat": torch.arange(5.0).bfloat16().view(5, 1),
    "long": torch.tensor(7),
    "int": torch.arange(6).int().view(2, 3),
    "short": torch.arange(3).short(),
    "char": torch.arange(3).to(torch.int8),
    "byte": torch.arange(7).byte(),
    "bool": torch.tensor([True, False]),
    "naïve": torch.zeros(1),
}


@pytest.mark.parametrize("tensors", [ALL_DTYPES, {}, some_tensors()], ids=["all dtypes", "none", "some"])
def test_files_are_those_that_safetensors_writes(tmp_path, tensors):
    write_tensors(tmp_path / "f", tensors, kind="thing", metadata=METADATA)
    with safe_open(tmp_path / "f", framework="pt") as file:
        header = file.metadata()[KEY]
    assert json.loads(header).items() >= {**METADATA, "kind": "thing", "format": 1}.items()
    save_file(tensors, tmp_path / "theirs", metadata={KEY: header})
    assert (tmp_path / "f").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("second", [torch.zeros(4), torch.zeros(3).double()], ids=["shape", "dtype"])
def test_tensor_that_is_not_as_announced_leaves_the_old_file(tmp_path, second):
    (tmp_path / "f").write_text("old")
    layout = [(name, torch.float32, torch.Size([3])) for name in "ab"]
    with pytest.raises(ValueError, match="b is "):
        write_in_turn(tmp_path / "f", layout, [torch.zeros(3), second], kind="thing", metadata={})
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_tensors_with_a_prefix_are_read_together(tmp_path):
    tensors = {"transform.mean": torch.zeros(1), "transform.inverse": torch.ones(2), "images": torch.ones(3)}
    write_tensors(tmp_path / "f", tensors, kind="thing", metadata={})
    found = TensorFile(tmp_path / "f", kind="thing").with_prefix("transform.")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"mean": [0], "inverse": [1, 1]}


def test_missing_file_is_refused(tmp_path, refused):
    with refused(tmp_path / "f"):
        TensorFile(tmp_path / "f", kind="thing")


def test_folder_in_the_place_of_a_file_is_refused(tmp_path, refused):
    with refused(tmp_path):
        TensorFile(tmp_path, kind="thing")


def test_other_kind_is_refused_and_both_are_named(tmp_path, refused):
    write_tensors(tmp_path / "f", some_tensors(), kind="teacher_trajectory", metadata={})
    with refused(tmp_path / "f", "synthetic set", "teacher trajectory"):
        TensorFile(tmp_path / "f", kind="synthetic_set")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["bare", "with metadata"])
def test_safetensors_file_of_another_program_is_refused(tmp_path, refused, metadata):
    save_file(some_tensors(), tmp_path / "f", metadata=metadata)
    with refused(tmp_path / "f", "another program"):
        TensorFile(tmp_path / "f", kind="thing")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(5000), b"\x80\x02}q\x00." * 100])
def test_file_that_is_not_safetensors_is_refused(tmp_path, refused, content):
    (tmp_path / "f").write_bytes(content)
    with refused(tmp_path / "f"):
        TensorFile(tmp_path / "f", kind="thing")


def test_truncated_file_is_refused_wherever_it_was_cut(tmp_path, refused):
    path = tmp_path / "f"
    write_tensors(path, some_tensors(), kind="thing", metadata=METADATA)
    whole = path.read_bytes()
    for length in (1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused(path):
            TensorFile(path, kind="thing")


def test_tensor_that_is_not_there_is_refused(tmp_path, refused):
    write_tensors(tmp_path / "f", some_tensors(), kind="thing", metadata={})
    file = TensorFile(tmp_path / "f", kind="thing")
    with refused(tmp_path / "f", "'pictures'"):
        file["pictures"]
    with refused(tmp_path / "f", "'pictures'"):
        file.numel("pictures")


def test_exception_while_replacing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def break_off():
        with replacing(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    write_tensors(path, some_tensors(), kind="thing", metadata=METADATA)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_tensors(path, some_tensors(), kind="thing", metadata={"network": object()})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f"]


def test_old_file_stands_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")
    with replacing(path) as part:
        assert part.parent == path.parent  # a rename across file systems would not be atomic
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["f"]


def write_numbers(path, writer, count):
    for number in range(count):
        values = torch.full((50_000 + 10_000 * writer,), float(number))
        write_tensors(path, {"values": values}, kind="thing", metadata={"writer": writer, "number": number})


def check_while(path, at_work):
    """Read a file again and again: it has to be whole at any moment."""
    readings = 0
    while at_work():
        if path.exists():
            file = TensorFile(path, kind="thing")
            writer, number = file.metadata["writer"], file.metadata["number"]
            assert file["values"].numel() == 50_000 + 10_000 * writer
            assert bool((file["values"] == number).all())
            readings += 1
    return readings


def test_threads_that_write_one_file_at_the_same_time_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "f"
    with ThreadPoolExecutor(max_workers=2) as pool:
        writers = [pool.submit(write_numbers, path, writer, 60) for writer in range(2)]
        assert check_while(path, lambda: not all(writer.done() for writer in writers)) > 5
        for writer in writers:
            writer.result()
    assert TensorFile(path, kind="thing").metadata["number"] == 59  # the last to finish wins
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
def test_processes_that_write_one_file_at_the_same_time_do_not_disturb_each_other(tmp_path):
    path, context = tmp_path / "f", multiprocessing.get_context("spawn")
    writers = [context.Process(target=write_numbers, args=(path, writer, 60)) for writer in range(2)]
    for writer in writers:
        writer.start()
    assert check_while(path, lambda: any(writer.is_alive() for writer in writers)) > 5
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert TensorFile(path, kind="thing").metadata["number"] == 59
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be asked for there without ending it")
def test_only_what_dead_writers_of_this_machine_left_of_the_same_file_is_cleared(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "f[1]"  # no pattern
    with replacing(path) as part:
        part.write_text("mine")
        prefix, _, random = part.name.partition(f"-{os.getpid()}-")
        kept = [f"{prefix}-{os.getppid()}-{random}", f".f[1].01234567-{dead.pid}-{random}", ".f[1].part"]
        kept += [f"{prefix}2-{dead.pid}-{random}".replace("f[1]", "f1")]
        for name in [*kept, f"{prefix}-{dead.pid}-{random}", f"{prefix}-{dead.pid}-01234567.part"]:
            (tmp_path / name).write_text("")
        with replacing(path) as other:  # this process is at work
            other.write_text("other")
    assert path.read_text() == "mine"
    assert set(os.listdir(tmp_path)) == {path.name, *kept}


# Imports once and forks a writer for each kill: importing torch anew each time would take most of the test.
KILLED_WRITERS = """
import os, random, signal, struct, sys, time
from pathlib import Path
import torch
from ftd_lightning.files.safetensors_io import write_tensors
from ftd_lightning.files.safetensors_io import TensorFile

torch.set_num_threads(1)
os.fsync = lambda handle: None  # guards against power cuts, not kills; without it most of the time goes into writing
path, wanted = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
size = lambda number: 2_000_000 + 1_000 * number

def write(number):
    values = torch.full((size(number),), float(number))
    write_tensors(path, {"values": values}, kind="thing", metadata={"number": number})

def write_for_ever(number, pipe):
    while True:
        write(number)
        os.write(pipe, struct.pack("q", number))
        number += 1

number = 0
write(number)
interrupted = 0
for attempt in range(40 * wanted):  # a loaded machine lets many a kill come between two writes
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(number + 1, writing)
    os.close(writing)
    first = os.read(reading, 8)  # the writer is at work
    # Kill it soon after it began another file, or at any moment if none is seen.
    until = time.monotonic() + rng.uniform(0, 0.2)
    while len(os.listdir(path.parent)) == 1 and time.monotonic() < until:
        pass
    time.sleep(rng.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with os.fdopen(reading, "rb") as pipe:
        reported = first + pipe.read()
    complete = struct.unpack(f"{len(reported) // 8}q", reported)[-1]
    file = TensorFile(path, kind="thing")
    number, values = file.metadata["number"], file["values"]
    # The last write that was reported, or the one after it if the kill came between rename and report.
    assert number in (complete, complete + 1), (number, complete)
    assert values.numel() == size(number) and bool((values == number).all()), number
    interrupted += len(os.listdir(path.parent)) > 1
    number += 1
    write(number)
    assert os.listdir(path.parent) == [path.name], "what killed writers leave piles up"
    if interrupted >= wanted:
        break
else:
    raise AssertionError(f"only {interrupted} kills came in the middle of a write")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and fork are there on Unix only")
@pytest.mark.slow
def test_kill_in_the_middle_of_a_write_leaves_a_whole_file_and_nothing_that_piles_up(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITERS, tmp_path / "weights.safetensors", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_fingerprint_tells_values_shapes_and_types_apart():
    zeros = torch.zeros(6)
    different = [zeros, zeros.view(2, 3), zeros.int(), torch.eye(6)[0], torch.zeros(5), torch.zeros(())]
    for a, b in itertools.combinations(different, 2):
        assert fingerprint(a) != fingerprint(b)
    assert fingerprint(torch.arange(6).view(2, 3).t()) == fingerprint(torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert fingerprint(zeros, zeros) != fingerprint(zeros)


def test_versions_name_what_a_result_depends_on():
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"ftd_lightning", "python", "torch", "lightning", "float32_matmul_precision"}
    assert json.loads(json.dumps(versions())) == versions()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert versions()["float32_matmul_precision"] == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def flipped(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(bytes(content))


def test_flipped_bit_of_a_tensor_is_found_and_the_others_can_be_read(tmp_path, refused):
    write_tensors(tmp_path / "f", {"a": torch.zeros(8), "b": torch.ones(8)}, kind="thing", metadata={})
    flipped(tmp_path / "f", -1)
    file = TensorFile(tmp_path / "f", kind="thing")
    assert torch.equal(file["a"], torch.zeros(8))
    with refused("f: is damaged, b has another checksum"):
        file["b"]


def test_flipped_bit_of_the_metadata_is_found(tmp_path, refused):
    write_tensors(tmp_path / "f", {"a": torch.zeros(8)}, kind="thing", metadata={"method": "mtt"})
    flipped(tmp_path / "f", (tmp_path / "f").read_bytes().index(b"mtt"))
    with refused("f: is damaged, its metadata has another checksum"):
        TensorFile(tmp_path / "f", kind="thing")


@pytest.mark.parametrize(
    ("number", "words"), [(2, "newer version"), ("1", "'1'"), (0, "0"), (None, "None"), (True, "True")]
)
def test_other_formats_are_refused_as_such(tmp_path, refused, number, words):
    text = json.dumps({"kind": "thing", "format": number})
    save_file({"a": torch.zeros(2)}, tmp_path / "f", metadata={KEY: text})
    with refused("f: ", "format", words):
        TensorFile(tmp_path / "f", kind="thing")


def test_files_of_0_1_have_no_checksums_and_are_read(tmp_path):
    save_file(
        {"a": torch.ones(2)}, tmp_path / "f", metadata={KEY: json.dumps({"kind": "thing", "format": 1, "x": [2]})}
    )
    file = TensorFile(tmp_path / "f", kind="thing")
    assert torch.equal(file["a"], torch.ones(2))
    assert file.metadata["x"] == [2]
