"""Files on their way to a machine without a network, and back from it: wheels, packed images, records and sets.

    PYTHONPATH=tests python3 -m benchmarks.transfer FROM TO

joins what ``benchmarks.stages`` brought home in FROM, and unpacks it into TO. Such a machine has neither this library's
requirements nor more room for a file than :data:`LIMIT`, so nothing here needs more than Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath

LIMIT = 15 * 2**20  # bytes of a file that comes back; 16 MiB would be refused
ROOM = 3 * LIMIT  # bytes for sets: a whitening takes 36 MiB, and all that comes back may take 64
LARGE = 2**20  # bytes from which on a tensor is stored once for all the files that have it
SETS = ("set.safetensors", "best.safetensors")  # teachers have other names, and stay
CONTENTS = "contents.json"
RECORDS = (".json", ".md", ".png", ".txt", ".yaml", ".csv")
COPIED = ("data", "packed", "site")  # folders of the working folder that the machine was given


class TransferError(Exception):
    """A file that is missing or not what it should be; one line."""


def fits_here(wheel: Path) -> bool:
    """Whether a wheel is for this version of Python and this machine, by the tags in its name."""
    python, abi, platform = wheel.stem.split("-")[-3:]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    stable = abi == "abi3" and any(int(n) <= sys.version_info.minor for n in re.findall(r"cp3(\d+)", python))
    machine = sysconfig.get_platform().split("-")[-1]
    return bool({"py3", own} & set(python.split("."))) | stable and (platform == "any" or platform.endswith(machine))


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Unpack each wheel of a folder into a folder for PYTHONPATH; those that were unpacked already are left.

    Returns:
        The names of those unpacked now.

    Raises:
        TransferError: if the folder has no wheels, or one that is broken or for another Python or machine.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise TransferError(f"{folder}: has no wheels (*.whl)")
    unpacked = []
    for wheel in wheels:
        mark = site / f".{wheel.name}"
        if mark.exists():
            continue
        if not fits_here(wheel):
            raise TransferError(f"{wheel.name}: is not for this Python {sys.version.split()[0]} and machine")
        try:
            with zipfile.ZipFile(wheel) as archive:
                for entry in archive.infolist():
                    _unpack_entry(archive, entry, site)
        except zipfile.BadZipFile as error:
            raise TransferError(f"{wheel.name}: is broken: {error}") from error
        mark.touch()
        unpacked.append(wheel.name)
    return unpacked


def _unpack_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, site: Path) -> None:
    """Write a file to where an installation would; scripts and headers serve no import."""
    parts = PurePosixPath(entry.filename).parts
    if parts[0].endswith(".data"):
        if parts[1] not in ("purelib", "platlib"):
            return
        parts = parts[2:]
    if entry.is_dir():
        return
    if ".." in parts or PurePosixPath(entry.filename).is_absolute():
        raise TransferError(f"{Path(archive.filename or '').name}: {entry.filename} lies outside of it")
    target = site.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def gather(folders: Iterable[Path], packed: Path) -> None:
    """Copy what lies in folders into one, beside what earlier calls brought there: halves may come one by one."""
    for folder in folders:
        if not folder.is_dir():
            raise TransferError(f"{folder}: no such folder")
        for path in folder.rglob("*"):
            target = packed / path.relative_to(folder)
            if path.is_file() and not (target.is_file() and target.stat().st_size == path.stat().st_size):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def split(path: Path, limit: int = LIMIT) -> list[Path]:
    """Split a file into ``NAME.00``, ``NAME.01`` and so on of at most limit bytes; a smaller one stays whole."""
    if path.stat().st_size <= limit:
        return [path]
    pieces = []
    with path.open("rb") as file:
        while chunk := file.read(limit):
            pieces.append(path.with_name(f"{path.name}.{len(pieces):02d}"))
            pieces[-1].write_bytes(chunk)
    path.unlink()
    return pieces


def join(folder: Path, name: str, target: Path) -> bool:
    """Put a file that :func:`split` was given together again, at target.

    Returns:
        Whether there is such a file.

    Raises:
        TransferError: if a piece between others is missing; at the end, opening the archive tells.
    """
    pieces = sorted(piece for piece in folder.glob(f"{name}.*") if piece.suffix[1:].isdecimal())
    if missing := set(range(len(pieces))) - {int(piece.suffix[1:]) for piece in pieces}:
        raise TransferError(f"{folder}: {name}.{min(missing):02d} is missing")
    pieces = [folder / name] if (folder / name).is_file() else pieces
    with target.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    return bool(pieces)


def cut(path: Path, large: int = LARGE) -> list[tuple[int, int]]:
    """Divide a safetensors file at its large tensors: (first byte, end) of each part, in order, without gaps.

    All sets of whitened images carry the same matrix, and it is nearly all of each.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    bounds = {0, path.stat().st_size}
    bounds |= {8 + length + place for start, end in places if end - start >= large for place in (start, end)}
    return list(pairwise(sorted(bounds)))


def pack_sets(work: Path, target: Path, *, room: int, large: int = LARGE) -> dict[str, list[str]]:
    """Write the sets below a folder into a tar archive: each part of a file once, and what they consist of.

    Args:
        work: the folder.
        target: the archive; not compressed, for float32 numbers hardly shrink.
        room: bytes that the archive may take; sets beyond it are left out.
        large: bytes of a tensor that is a part of its own.

    Returns:
        "packed" and "left_out", names of sets within the folder.
    """
    contents: dict[str, list[str]] = {}
    stored: set[str] = set()
    sets: dict[str, list[str]] = {"packed": [], "left_out": []}
    size = 2**16  # of the list and of the archive's end
    with tempfile.TemporaryDirectory() as folder, tarfile.open(target, "w") as tar:
        for path in sorted(path for path in work.rglob("*.safetensors") if path.name in SETS):
            name, data = path.relative_to(work).as_posix(), path.read_bytes()
            parts = [(hashlib.sha256(data[a:b]).hexdigest(), data[a:b]) for a, b in cut(path, large)]
            new = {digest: part for digest, part in parts if digest not in stored}
            more = sum(len(part) + 1024 for part in new.values())
            if size + more > room:
                sets["left_out"].append(name)
                continue
            for digest, part in new.items():
                (Path(folder) / digest).write_bytes(part)
                tar.add(Path(folder) / digest, f"parts/{digest}")
            size, stored = size + more, stored | set(new)
            contents[name] = [digest for digest, _ in parts]
            sets["packed"].append(name)
        (Path(folder) / CONTENTS).write_text(json.dumps(contents, indent=1))
        tar.add(Path(folder) / CONTENTS, CONTENTS)
    return sets


def restore_sets(archive: Path, target: Path) -> list[str]:
    """Write the sets of an archive of :func:`pack_sets` below a folder, byte for byte; gives their names."""
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory() as folder:
        tar.extractall(folder, filter="data")
        contents = json.loads((Path(folder) / CONTENTS).read_text())
        for name, parts in contents.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for digest in parts:
                    file.write((Path(folder) / "parts" / digest).read_bytes())
    return list(contents)


def pack_records(work: Path, target: Path) -> int:
    """Write reports, pictures, logs and TensorBoard's events below a folder into an archive; gives their number."""
    count = 0
    with tarfile.open(target, "w:gz") as tar:
        for path in sorted(work.rglob("*")):
            within = path.relative_to(work)
            record = path.suffix in RECORDS or path.name.startswith("events.out.tfevents")
            if path.is_file() and record and within.parts[0] not in COPIED:
                tar.add(path, within.as_posix())
                count += 1
    return count


def clear(out: Path, name: str) -> None:
    """Remove a file or its pieces, which an earlier call left."""
    for path in out.glob(f"{name}*"):
        path.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Join and unpack what was brought home."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM", help="the folder that benchmarks.stages wrote to")
    parser.add_argument("target", type=Path, metavar="TO", help="where records and sets go")
    options = parser.parse_args(arguments)
    options.target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "archive"
            if join(options.source, "records.tar.gz", archive):
                with tarfile.open(archive) as tar:
                    tar.extractall(options.target, filter="data")
            if join(options.source, "sets.tar", archive):
                print("\n".join(restore_sets(archive, options.target)))
    except (TransferError, tarfile.TarError, OSError) as error:
        sys.exit(f"transfer: {error}")


if __name__ == "__main__":
    main()
