"""Two nodes that share no disk, as two torchrun agents on loopback, each with a working folder of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Callback

pytestmark = pytest.mark.slow  # processes

RUN = """
import json, sys
sys.path.insert(0, {tests!r})
from ftd_lightning.cli import main
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""
SMALL = ["--model.network_options", "{width: 4, depth: 1}", "--data.max_per_class", "14"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
TEACHERS = ["fit", "--config", "digits/teacher_ftd", *SMALL, *QUIET, "--model.teachers", "4", "--model.epochs", "3"]
DISTIL = ["fit", "--config", "digits/distill_ftd_ipc1", *SMALL, *QUIET, "--trainer.max_steps", "6"]
DISTIL += ["--model.iterations_per_epoch", "3", "--model.syn_steps", "3", "--model.max_start_epoch", "1"]
DISTIL += ["--model.expert_epochs", "1"]
EVALUATE = ["fit", "--config", "digits/evaluate", *SMALL, *QUIET, "--trainer.max_epochs", "4", "--model.networks", "3"]
TWO = ["--trainer.strategy", "ddp", "--trainer.num_nodes", "2", "--trainer.devices", "1"]
STORE = Path("runs/digits/teacher_ftd/trajectories")
CHECKPOINTS = Path("runs/digits/teacher_ftd/checkpoints")
SETS = Path("runs/digits/distill_ftd_ipc1")
RESULTS = Path("runs/digits/evaluate/evaluation.json")


class Killed(Callback):
    """Ends the second process in the second epoch of its second teacher, without a last word."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == (4, 1, 1):
            os.kill(os.getpid(), signal.SIGKILL)


def start(folder: Path, fits: list[list[str]], *torchrun: str) -> subprocess.Popen[str]:
    """Start processes in a folder: one, or those of a torchrun agent."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    # gloo must not look for an interface that a sandboxed machine lacks.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, str(script), json.dumps(fits)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def ended(processes: list[subprocess.Popen[str]], timeout: float = 560) -> list[tuple[int, str]]:
    """Wait for processes; one that hangs fails the test."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # the agent ends its workers
                process.communicate()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def on_nodes(folders: list[Path], *fits: list[str], timeout: float = 560) -> list[tuple[int, str]]:
    """Run fits on two nodes; gives exit code and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    agents = []
    for rank, folder in enumerate(folders):
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(rank)]
        where += ["--master-addr", "127.0.0.1", "--master-port", port]
        agents.append(start(folder, [[*fit, *TWO] for fit in fits], *where))
    return ended(agents, timeout)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of one process."""
    folder = tmp_path_factory.mktemp("one")
    ((code, output),) = ended([start(folder, [TEACHERS])])
    assert code == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All three phases on two nodes."""
    folders = [tmp_path_factory.mktemp(f"node{rank}") for rank in range(2)]
    for code, output in on_nodes(folders, TEACHERS, DISTIL, EVALUATE):
        assert code == 0, output[-3000:]
    return folders


def test_every_node_has_the_teachers_of_one_process(one: Path, nodes: list[Path]) -> None:
    expected = files(one / STORE)
    assert sorted(expected) == ["data.safetensors", *(f"teacher_000{k}.safetensors" for k in range(4))]
    assert [files(node / STORE) for node in nodes] == [expected] * 2


def test_sets_and_results_are_those_of_two_processes_on_one_node(nodes: list[Path], tmp_path: Path) -> None:
    """The sets lie on both nodes, which evaluation needs; results on the first."""
    devices = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    fits = [[*fit, *devices] for fit in (TEACHERS, DISTIL, EVALUATE)]
    ((code, output),) = ended([start(tmp_path, fits, "--standalone", "--nproc-per-node", "2")])
    assert code == 0, output[-3000:]
    for name in ("set.safetensors", "best.safetensors"):
        expected = (tmp_path / SETS / name).read_bytes()
        assert [(node / SETS / name).read_bytes() for node in nodes] == [expected] * 2
    expected, found = (json.loads((folder / RESULTS).read_text()) for folder in (tmp_path, nodes[0]))
    assert found == expected
    assert len(found["each"]) == 3
    assert not (nodes[1] / RESULTS).exists()


def test_a_killed_run_resumes_on_nodes_in_another_order(one: Path, tmp_path: Path) -> None:
    """The second node has no checkpoint, and each node has the unfinished teacher that the other one goes on with."""
    first, second = tmp_path / "first", tmp_path / "second"
    for code, _ in on_nodes([first, second], [*TEACHERS, "--trainer.callbacks+", "test_nodes.Killed"]):
        assert code != 0
    unfinished = {node.name: {file[:12] for file in files(node / STORE / ".unfinished")} for node in (first, second)}
    assert unfinished == {"first": {"teacher_0002"}, "second": {"teacher_0003"}}
    assert (first / CHECKPOINTS / "last.ckpt").is_file()
    assert not (second / CHECKPOINTS).exists()

    (second / CHECKPOINTS).parent.mkdir(exist_ok=True)
    (first / CHECKPOINTS).rename(second / CHECKPOINTS)
    for code, output in on_nodes([second, first], [*TEACHERS, "--ckpt_path", "last"]):
        assert code == 0, output[-3000:]
    assert [files(node / STORE) for node in (first, second)] == [files(one / STORE)] * 2


@pytest.mark.parametrize("where", ["before_the_processes_meet", "in_the_fit"])
def test_a_mistake_on_one_node_is_one_line_on_both(one: Path, tmp_path: Path, where: str) -> None:
    """Neither node waits for the other: one that does would outlast the timeout, a third of a process group's."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    if where == "in_the_fit":
        (folders[0] / STORE).parent.mkdir(parents=True)
        (folders[0] / STORE).symlink_to(one / STORE)
        fit, message = DISTIL, f"{STORE}: no teachers here"
    else:
        (folders[0] / "mine.ckpt").write_bytes((one / CHECKPOINTS / "last.ckpt").read_bytes())
        fit, message = [*TEACHERS, "--ckpt_path", "mine.ckpt"], "mine.ckpt: no such checkpoint"
    for rank, (code, output) in enumerate(on_nodes(folders, fit, timeout=560)):
        assert code != 0
        lines = re.findall(r"^ftd: error: .*$", output, re.MULTILINE)
        assert len(lines) == 1, output[-3000:]
        assert lines[0].startswith(f"ftd: error: {'' if rank else 'process 1: '}{message}")
        # The agent's report has a traceback of its own.
        assert f'{folders[rank] / "run.py"}", line' not in output
