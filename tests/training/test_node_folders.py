"""Files that go from one node's folder to another's: two processes, with a folder of their own each or a common one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ftd_lightning.core import nodes
from ftd_lightning.errors import InputError

pytestmark = pytest.mark.slow  # processes

CHUNK = 1000  # bytes, instead of 16 MiB
LONG, OTHER = bytes(range(256)) * 10, bytes(range(255, -1, -1)) * 10  # three chunks each


def fake_trainer(rank: int) -> SimpleNamespace:
    """What a ``NodeFolders`` asks of a trainer."""

    def broadcast(value):
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=broadcast)
    return SimpleNamespace(global_rank=rank, world_size=2, num_nodes=2, strategy=strategy)


def attempt(what, *arguments) -> str:
    try:
        what(*arguments)
    except (InputError, OSError) as error:
        return str(error)
    return "done"


def main(rank: int, root: Path) -> None:
    """Everything that the two processes do, one after the other."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=2)
    nodes.CHUNK = CHUNK
    os.chdir(root / str(rank))
    trainer, told = fake_trainer(rank), {}
    common, own = nodes.NodeFolders(trainer, root / "common"), nodes.NodeFolders(trainer, Path("store"))
    told["leaders"] = [common.leaders, own.leaders]
    names = [f"from_{rank}.bin", "empty.bin", "on_no_node.bin", "deep/inside.bin"]
    told["complete"] = attempt(own.complete, names if rank else [*names, "from_1.bin"])
    told["first"] = attempt(own.follow_first, "changed.bin")
    told["absent"] = attempt(own.follow_first, "only_on_second.bin")
    told["conflict"] = attempt(own.complete, ["conflict.bin"])
    told["unwritable"] = attempt(own.complete, ["folder_on_second.bin"])
    told["afterwards"] = attempt(own.complete, ["last.bin"])
    Path("told.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_folders_are_completed_and_mistakes_are_told_on_both(tmp_path: Path) -> None:
    files = [
        {"from_0.bin": LONG, "empty.bin": b"", "changed.bin": LONG, "conflict.bin": LONG, "last.bin": LONG},
        {"from_1.bin": OTHER, "deep/inside.bin": LONG, "changed.bin": OTHER, "conflict.bin": OTHER},
    ]
    files[0]["folder_on_second.bin"], files[1]["only_on_second.bin"] = LONG, OTHER
    for rank, named in enumerate(files):
        for name, value in named.items():
            path = tmp_path / str(rank) / "store" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
    (tmp_path / "1" / "store" / "folder_on_second.bin").mkdir()

    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    running = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=240) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()

    first, second = (content(tmp_path / str(rank) / "store") for rank in range(2))
    # The first node asked for no more than it lacked and wanted.
    assert first == {**files[0], "from_1.bin": OTHER, "deep/inside.bin": LONG}
    expected = {**files[1], "empty.bin": b"", "changed.bin": LONG, "last.bin": LONG}
    assert second == expected, "from_0.bin was not asked for there, and no part of a file stays"
    assert not content(tmp_path / "common")

    told = [json.loads((tmp_path / str(rank) / "told.json").read_text()) for rank in range(2)]
    for rank in range(2):
        assert told[rank]["leaders"] == [[0, 0], [0, 1]]
        assert [told[rank][key] for key in ("complete", "first", "absent", "afterwards")] == ["done"] * 4
        assert told[rank]["conflict"].startswith("store/conflict.bin: differs between the nodes of processes 0 and 1")
    assert "is a folder" in told[1]["unwritable"]
    assert told[0]["unwritable"] == f"process 1: {told[1]['unwritable']}"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
