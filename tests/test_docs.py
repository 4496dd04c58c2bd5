"""The site's reference has every public name, and its navigation only pages that exist."""

import importlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from ftd_lightning.files import schema

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = json.loads((ROOT / "tests" / "public_names.json").read_text(encoding="utf-8"))
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    assert not [name for name in PUBLIC[module] if not re.search(rf"\b{re.escape(module)}\.{name}\b", REFERENCE)]


def test_what_the_reference_shows_exists() -> None:
    shown = re.findall(r"^::: ([\w.]+)\.(\w+)$", REFERENCE, re.MULTILINE)
    assert len(shown) == REFERENCE.count("::: ")
    assert not [f"{module}.{name}" for module, name in shown if not hasattr(importlib.import_module(module), name)]


def _pages(nav: list[Any] | dict[str, Any] | str) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(entry)]


def test_every_page_of_the_navigation_exists() -> None:
    pages = _pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(pages) == len(set(pages))
    assert not [page for page in pages if not (ROOT / "docs" / page).is_file()]


def test_the_formats_page_lists_what_the_schema_knows() -> None:
    """Another program reads and writes the files by this page."""
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    sets, stores = (page.partition(f"\n## {title}")[2].partition("\n## ")[0] for title in ("`set.saf", "A trajectory"))
    tensors, _, metadata = sets.partition("| metadata |")
    first = [line.split("|")[1] for line in metadata.splitlines() if line.startswith("|")]
    assert set(re.findall("`(.+?)`", " ".join(first))) == set(schema.SET_METADATA)
    assert set(schema.TEACHER_METADATA | schema.STORE_METADATA) <= set(re.findall("`(.+?)`", stores))
    for kind in get_args(schema.LabelKind):
        assert f'"{kind}"' in metadata
    assert {"images", "labels", "step_size", "ema_images"} <= set(re.findall(r"^\| `(.+?)`", tensors, re.MULTILINE))
