"""The Python blocks of the documents that are marked as tested run, page by page, each in one namespace."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"<!-- test -->\n```python\n(.*?)```", re.DOTALL)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Lightning's, for whoever copies the blocks


def blocks(page: str) -> list[str]:
    found = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    assert found, page
    return found


def test_plug_in_and_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats page reads the set that the other page makes."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for page in ("plug-in.md", "formats.md"):
        for block in blocks(page):
            exec(compile(block, page, "exec"), namespace)
    assert "own" in namespace


def test_every_tested_block_belongs_to_a_page_that_is_run() -> None:
    marked = {path.name for path in DOCS.rglob("*.md") if BLOCK.search(path.read_text(encoding="utf-8"))}
    assert marked == {"plug-in.md", "formats.md"}
