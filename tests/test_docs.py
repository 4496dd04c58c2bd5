"""The documents: names and files in them exist, marked code runs, the reference has every public name."""

import importlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fits import make_trainer

from ftd_lightning import DistillationDataModule, SyntheticEvaluation, SyntheticSet, TrajectoryStore
from ftd_lightning.files import schema
from ftd_lightning.shipped_configs import shipped_names

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = json.loads((ROOT / "tests" / "public_names.json").read_text(encoding="utf-8"))
# The changelog also names configs that are gone.
TEXTS = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
REFERENCE = "\n".join(text for page, text in TEXTS.items() if page.startswith("docs/reference/"))
BLOCK = re.compile(r"<!-- test(?:: plug-in)? -->\n```python\n(.*?)```", re.DOTALL)


def test_the_reference_has_the_public_names_and_no_others() -> None:
    names = {f"{module}.{name}" for module, names in PUBLIC.items() for name in names}
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", REFERENCE)]
    shown = re.findall(r"^::: ([\w.]+)\.(\w+)$", REFERENCE, re.MULTILINE)
    assert not [f"{module}.{name}" for module, name in shown if not hasattr(importlib.import_module(module), name)]


def _pages(nav: list[Any] | dict[str, Any] | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(entry)]


def _exists(path: Path) -> bool:
    notebook = re.sub(r"docs/(notebooks/\w+)\.md$", r"\1.ipynb", str(path))  # pages that mkdocs makes of notebooks
    return Path(notebook).exists()


def test_pages_and_linked_files_exist() -> None:
    pages = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert not [page for page in pages if not _exists(ROOT / "docs" / page)]
    links = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\(([^)#\s]+)", text)]
    local = [(page, link) for page, link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert not [f"{page}: {link}" for page, link in local if not _exists((ROOT / page).parent / link)]


def test_configs_in_the_documents_ship() -> None:
    names = set(shipped_names())
    folders = "|".join(sorted({name.partition("/")[0] for name in names}))
    # --config FOLDER/NAME, and `FOLDER/NAME` in running text; configs/FOLDER/NAME.yaml is a file of the repository.
    patterns = (r"--config ([\w-]+/[\w-]+)", rf"`((?:{folders})/[\w-]+)`", r"configs/([\w-]+/[\w-]+)\.yaml")
    for page, text in TEXTS.items():
        assert not {name for pattern in patterns for name in re.findall(pattern, text)} - names, page


def test_the_formats_page_lists_the_schema() -> None:
    """Another program reads and writes the files by this page."""
    page = TEXTS["docs/formats.md"]
    sets, stores = (page.partition(f"\n## {title}")[2].partition("\n## ")[0] for title in ("`set.saf", "A trajectory"))
    tensors, _, metadata = sets.partition("| metadata |")
    first = [line.split("|")[1] for line in metadata.splitlines() if line.startswith("|")]
    assert set(re.findall("`(.+?)`", " ".join(first))) == set(schema.SET_METADATA)
    assert set(schema.TEACHER_METADATA | schema.STORE_METADATA) <= set(re.findall("`(.+?)`", stores))
    assert all(f'"{kind}"' in metadata for kind in get_args(schema.LabelKind))
    assert {"images", "labels", "step_size", "ema_images"} <= set(re.findall(r"^\| `(.+?)`", tensors, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, for whoever copies the blocks
def test_marked_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README by itself; formats.md reads the set that plug-in.md makes."""
    monkeypatch.chdir(tmp_path)
    marked = {page: BLOCK.findall(text) for page, text in TEXTS.items() if BLOCK.search(text)}
    assert set(marked) == {"README.md", "docs/encoders.md", "docs/plug-in.md", "docs/formats.md"}
    exec(compile(marked["README.md"][0], "README.md", "exec"), {})
    store = TrajectoryStore("mine/teachers")
    assert (len(store), store.epochs, store.num_parameters) == (2, 5, 64 * 32 + 32 + 330)
    assert SyntheticSet.load("mine/set.safetensors").metadata["iterations"] == 100
    assert Path("lightning_logs/version_2/evaluation.json").is_file()
    encoder: dict[str, Any] = {}
    exec(compile(marked["docs/encoders.md"][0], "docs/encoders.md", "exec"), encoder)
    assert encoder["probes"].results["accuracy"]["clp-dd+pyramid"]["mean"] > 0.3
    here: dict[str, Any] = {}
    for page in ("docs/plug-in.md", "docs/formats.md"):
        for block in marked[page]:
            exec(compile(block, page, "exec"), here)
    # The training loop ends where SyntheticEvaluation does.
    own = float((here["answers"] == here["classes"]).float().mean())
    data = DistillationDataModule.from_datasets(here["train"], here["test"], synthetic="distilled/set.safetensors")
    evaluation = SyntheticEvaluation(here["network"], networks=4, augment="")
    trainer = make_trainer(tmp_path, max_epochs=300)
    trainer.fit(evaluation, data)
    trainer.test(evaluation, data)
    assert own > 0.4
    assert own == pytest.approx(evaluation.results["accuracy"]["ftd"]["mean"], abs=0.1)
    # The matching module brings the student closer to the teachers.
    mine, module = here["mine"], here["MyMatching"]
    assert len(re.findall(r"class MyMatching.*?\n\n\n", TEXTS["docs/plug-in.md"], re.DOTALL)[0].splitlines()) <= 40
    before, after = (
        sum(float(module(mine.store, mine.student, *images).training_step((0, epoch), 0)) for epoch in range(4))
        for images in (here["real"], (mine.images.detach(), mine.labels))
    )
    assert after < 0.8 * before
