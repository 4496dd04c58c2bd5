"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ftd_lightning.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` to fill; on a clean exit it becomes ``folder``, otherwise it is removed.

    Raises:
        InputError: if ``folder`` exists and is not an empty folder.
    """
    folder = Path(os.path.realpath(folder))  # resolve() raises for a loop of links
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder.name}: is there already and not an empty folder; name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
    try:
        part.mkdir()
        yield part
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        if error.errno is None or not str(error.filename).startswith(str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # names the folder, not its part
    finally:
        shutil.rmtree(part, ignore_errors=True)
