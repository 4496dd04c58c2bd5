"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

from ftd_lightning import SyntheticSet, TrajectoryStore

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.mark.filterwarnings(
    "ignore"
)  # of the progress and loggers of whoever copies it, which are Lightning's defaults
@pytest.mark.slow
def test_plugging_into_other_lightning_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = re.search(r"<!-- test: plug-in -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    exec(compile(code, "README.md", "exec"), {})
    store = TrajectoryStore("mine/lightning_logs/version_0/trajectories")
    assert (len(store), store.epochs, store.num_parameters) == (2, 5, 64 * 32 + 32 + 330)
    synthetic = SyntheticSet.load("mine/lightning_logs/version_1/set.safetensors")
    assert synthetic.images.shape == (10, 1, 8, 8)
    assert synthetic.metadata["iterations"] == 100
    assert Path("mine/lightning_logs/version_2/evaluation.json").is_file()


def test_the_files_it_names_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    for name in {*re.findall(r"configs/[\w/]+\.yaml", README), *re.findall(r"\((notebooks/[\w.]+)\)", README)}:
        assert (root / name).is_file(), name
