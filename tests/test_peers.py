"""What processes on several nodes hear of each other's failures; tests/test_nodes.py has the nodes."""

import threading

import pytest
from torch.distributed import TCPStore

from ftd_lightning.peers import Peers


@pytest.fixture
def three() -> list[Peers]:
    """Three processes, each with a connection of its own to the store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [store, *(TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(2))]
    return [Peers(client, attempt=0, rank=rank, world_size=3) for rank, client in enumerate(clients)]


def test_the_first_failure_is_the_one_that_all_hear_of(three: list[Peers]) -> None:
    first, second, third = three
    assert third.failure() is None
    telling = threading.Thread(target=second.tell, args=("set.safetensors:\n  no such file",))
    telling.start()
    assert third.failure(wait=5.0) == "process 1: set.safetensors: no such file"
    first.tell("the connection was closed")  # a consequence
    telling.join()
    assert third.failure() == "process 1: set.safetensors: no such file"
    assert second.failure() is None, "its own failure is not another one's"


def test_a_restarted_run_does_not_hear_of_the_failure_before(three: list[Peers]) -> None:
    first, second, _ = three
    second.tell("out of memory")
    assert first.failure() is not None
    restarted = Peers(first._store, attempt=1, rank=0, world_size=3)
    assert restarted.failure() is None


def test_nobody_watches_any_more_when_the_interpreter_ends(three: list[Peers]) -> None:
    """A thread that is within the store then aborts the process."""
    three[0].start()
    assert "ftd-peers" in {thread.name for thread in threading.enumerate()}
    three[0].leave()
    assert "ftd-peers" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"},  # started by something else than torchrun
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"},  # one node
    ],
)
def test_only_several_nodes_of_torchrun_are_watched(environment: dict[str, str]) -> None:
    assert Peers.join(environment) is None
