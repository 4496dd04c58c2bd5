"""What the documents show is there, and runs as it stands there."""

import re
from pathlib import Path

import pytest

from ftd_lightning import SyntheticSet, TrajectoryStore
from ftd_lightning.shipped_configs import shipped_names

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The changelog also names configs that are gone.
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_configs_that_documents_name_ship() -> None:
    names = shipped_names()
    folders = "|".join(sorted({name.partition("/")[0] for name in names}))
    unknown = {}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        # --config FOLDER/NAME, and `FOLDER/NAME` in running text; configs/FOLDER/NAME.yaml is a file of the repository.
        patterns = (r"--config ([\w-]+/[\w-]+)", rf"`((?:{folders})/[\w-]+)`", r"configs/([\w-]+/[\w-]+)\.yaml")
        shown = {name for pattern in patterns for name in re.findall(pattern, text)}
        if missing := sorted(shown - set(names)):
            unknown[document.name] = missing
    assert not unknown


def test_the_files_that_documents_link_to_are_there() -> None:
    links = [
        (document, link)
        for document in DOCUMENTS
        for link in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
        if not link.startswith(("http:", "https:", "mailto:"))
    ]
    assert not [f"{document.name}: {link}" for document, link in links if not (document.parent / link).exists()]
