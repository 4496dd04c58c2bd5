import time

import pytest

from ftd_lightning.data.progress import estimated_bar
from ftd_lightning.data.transform import Whitening


def test_the_bar_runs_by_the_clock_and_says_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with estimated_bar("fitting", 1.5):
        time.sleep(0.7)
    shown = capsys.readouterr().err
    assert "fitting" in shown
    assert "left" in shown
    percents = [int(part.split("%")[0].rsplit(" ", 1)[-1]) for part in shown.split("\r") if "%" in part]
    assert any(10 <= percent <= 90 for percent in percents)
    assert percents[-1] == 100


def test_a_block_that_fails_does_not_end_full(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="broken"), estimated_bar("fitting", 100.0):
        raise RuntimeError("broken")
    assert "100%" not in capsys.readouterr().err


def test_short_work_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with estimated_bar("fitting", 0.1):
        pass
    assert capsys.readouterr().err == ""


def test_the_guess_grows_with_the_cube() -> None:
    assert Whitening.estimate_seconds(64) == 0.0
    assert Whitening.estimate_seconds(3072) > Whitening.estimate_seconds(1000) > 0
