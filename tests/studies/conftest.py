"""Fits of a study in this process instead of a child."""

import contextlib

import pytest

from ftd_lightning import cli


class InProcess:
    """Runs fits as ``studies.fits.run_child`` does, and keeps their commands."""

    def __init__(self):
        self.commands = []

    def __call__(self, command, log, deadline):
        self.commands.append(list(command))
        with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                cli.main(command)
            except SystemExit as stop:
                return stop.code or 0
        return 0


@pytest.fixture
def in_process():
    """Give a runner of fits in this process; see ``InProcess``."""
    return InProcess()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
