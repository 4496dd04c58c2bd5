"""Files on several nodes without a common disk: what one has and another lacks goes through the process group."""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ftd_lightning.core.module import run_folder
from ftd_lightning.core.ranks import all_ranks
from ftd_lightning.errors import InputError
from ftd_lightning.files.safetensors_io import raw, replacing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from lightning.pytorch import Trainer

    from ftd_lightning.files.trajectory_store import TrajectoryStore


CHUNK = 2**24  # bytes per broadcast


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block on every rank; where it fails on one, it fails on all, and none waits for another.

    Raises:
        InputError: on the other ranks, with the first failing one's message. That one raises its own error.
    """
    failure: Exception | None = None
    try:
        yield
    except (InputError, OSError) as error:
        failure = error
    failures = all_ranks(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise InputError(f"process {rank}: {message}")


class NodeFolders:
    """A folder as the ranks of a run see it: one that they share, or one on each node.

    Which of the two is found out by files that each rank makes there and looks for. Every method has to be called by
    all ranks.

    Args:
        trainer: whose process group is set up.
        folder: its name on every rank; it is made where it is missing.

    Attributes:
        leaders: for each rank, the first one that sees the same folder.

    Raises:
        InputError: on all ranks, if one of them cannot write there.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.folder = folder
        self._rank, self._device = trainer.global_rank, trainer.strategy.root_device
        self.leaders = [0] * trainer.world_size
        if trainer.num_nodes > 1:
            self.leaders = all_ranks(self._leader(trainer.strategy.broadcast(secrets.token_hex(4))))

    def _leader(self, run: str) -> int:
        own = self.folder / f".{run}-{self._rank}.rank"
        try:
            with agreed():
                self.folder.mkdir(parents=True, exist_ok=True)
                own.touch()
            # A network file system may show another machine's file late. The folder then counts as two, and files
            # that are there already are written once more.
            seen = [int(file.stem.rpartition("-")[2]) for file in self.folder.glob(f".{run}-*.rank")]
            all_ranks(None)  # before the first file goes
        finally:
            own.unlink(missing_ok=True)
        return min(seen)

    @property
    def shared(self) -> bool:
        """Whether all ranks see the same folder."""
        return set(self.leaders) == {0}

    @property
    def leads(self) -> bool:
        """Whether this rank is the first one that sees its folder."""
        return self.leaders[self._rank] == self._rank

    def complete(self, wanted: Iterable[str]) -> None:
        """Copy files into the folders that lack them, atomically; those that no folder has stay missing.

        Args:
            wanted: names that this rank wants to see in its folder; every rank may want others.

        Raises:
            InputError: on all ranks, for a file that differs between folders, or one that cannot be read or written.
        """
        if self.shared:
            return
        wishes = all_ranks(sorted(set(wanted)))
        names = sorted(set().union(*wishes))
        have = all_ranks(self._contents(names))
        for name in names:
            holders = [rank for rank, files in enumerate(have) if name in files]
            if len({have[rank][name] for rank in holders}) > 1:
                raise InputError(
                    f"{self.folder / name}: differs between the nodes of processes {holders[0]} and {holders[-1]}; "
                    "delete it where it is not wanted"
                )
            takers = {self.leaders[rank] for rank, wish in enumerate(wishes) if name in wish} - set(holders)
            if holders and takers:
                self._send(name, have[holders[0]][name][0], holders[0], takers)

    def follow_first(self, name: str) -> None:
        """Make a file of all folders equal to the first rank's, atomically; leave them alone where it has none.

        Raises:
            InputError: on all ranks, if the file cannot be read or written.
        """
        if self.shared:
            return
        have = all_ranks(self._contents([name]))
        if name in have[0]:
            takers = {leader for leader in self.leaders if have[leader].get(name) != have[0][name]}
            if takers:
                self._send(name, have[0][name][0], 0, takers)

    def _contents(self, names: Collection[str]) -> dict[str, tuple[int, str]]:
        """Return size and hash of those files that lie in this rank's folder, if it leads there."""
        contents = {}
        with agreed():
            for path in (self.folder / name for name in names) if self.leads else ():
                if path.is_file():
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "blake2b").hexdigest()
                    contents[path.relative_to(self.folder).as_posix()] = (path.stat().st_size, digest)
        return contents

    def _send(self, name: str, size: int, sender: int, takers: Collection[int]) -> None:
        path, chunks = self.folder / name, self._chunks(self.folder / name, size, sender)
        with agreed():
            try:
                if self._rank in takers:
                    with replacing(path) as part, part.open("wb") as file:
                        file.writelines(chunks)
            finally:
                deque(chunks, maxlen=0)  # whoever cannot write takes part in every broadcast all the same

    def _chunks(self, path: Path, size: int, sender: int) -> Iterator[memoryview]:
        """Yield the sender's file on every rank; raise on all of them, at the end, if it could not be read."""
        content = self._read(path, size) if self._rank == sender else None
        failure: Exception | None = None
        for begin in range(0, size, CHUNK):
            chunk = torch.zeros(min(CHUNK, size - begin), dtype=torch.uint8)
            if content is not None and failure is None:
                try:
                    chunk = next(content)
                except (InputError, OSError) as error:
                    failure = error
            chunk = chunk.to(self._device)
            torch.distributed.broadcast(chunk, sender)
            yield raw(chunk.cpu())
        with agreed():
            if failure is not None:
                raise failure

    @staticmethod
    def _read(path: Path, size: int) -> Iterator[torch.Tensor]:
        with path.open("rb") as file:
            for begin in range(0, size, CHUNK):
                chunk = torch.empty(min(CHUNK, size - begin), dtype=torch.uint8)
                if file.readinto(raw(chunk)) != len(chunk):
                    raise InputError(f"{path}: became shorter while it was read")
                yield chunk


def follow_first_rank(trainer: Trainer, path: Path) -> None:
    """Give every node the first rank's file, where it has one and they share no disk. All ranks have to call this.

    Args:
        trainer: whose process group is set up; with one node nothing is done.
        path: of the file; the first rank's holds for all.
    """
    if trainer.num_nodes > 1:
        path = Path(trainer.strategy.broadcast(str(path)))
        NodeFolders(trainer, path.parent).follow_first(path.name)


def last_checkpoint(trainer: Trainer) -> str | None:
    """Find the first rank's last checkpoint before a fit on several nodes, and give it to those that lack it.

    Lightning saves checkpoints on the first rank and lets every rank look for the last one: a node without a common
    disk finds none, or an older one.

    Args:
        trainer: of several nodes, whose fit has not begun.

    Returns:
        The file; None where there is none; "last", for Lightning to resolve, where the trainer starts processes itself
        and the others do not exist yet.
    """
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    if environment is None or not environment.creates_processes_externally:
        return "last"
    strategy.setup_environment()  # the fit finds it done
    found: list[Path] = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folder = Path(callback.dirpath or run_folder(trainer) / "checkpoints")
            found += folder.glob(f"{callback.CHECKPOINT_NAME_LAST}*{callback.FILE_EXTENSION}")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    path: str | None = strategy.broadcast(None if newest is None else str(newest))
    if path is None:
        rank_zero_warn("--ckpt_path last: the first node has no checkpoint; the fit begins anew")
        return None
    follow_first_rank(trainer, Path(path))
    return path


def refuse_other_stores(store: TrajectoryStore) -> None:
    """Refuse nodes whose stores have other teachers: the ranks would follow them unnoticed.

    Raises:
        InputError: on all ranks.
    """
    teachers = [(file.name, store.teacher_metadata(index)) for index, file in enumerate(store.files)]
    ranks = all_ranks(teachers)
    other = next((rank for rank, theirs in enumerate(ranks) if theirs != ranks[0]), None)
    if other is not None:
        raise InputError(
            f"{store.path}: process 0 has {len(ranks[0])} teachers, process {other} has {len(ranks[other])} or "
            "others: copy this folder from one node to the others"
        )
