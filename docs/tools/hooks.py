"""Hooks of mkdocs: equations as MathML, pages of the notebooks, and the version beside the link to the source."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

from ftd_lightning import __version__

# What pymdownx.arithmatex leaves, with `generic`: \(...\) within a line, \[...\] on lines of its own.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def _drawn(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block")


def on_config(config: Any) -> None:
    """Add the version, for the header."""
    config.extra["release"] = __version__


def on_files(files: Any, config: Any) -> None:
    """Add a page for each notebook, with its outputs as they were committed."""
    for notebook in sorted((Path(config.config_file_path).parent / "notebooks").glob("*.ipynb")):
        page, found = MarkdownExporter().from_filename(str(notebook), {"unique_key": notebook.stem})
        for name, content in {f"{notebook.stem}.md": page, **found["outputs"]}.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page, which browsers then draw without a script or a connection."""
    return EQUATION.sub(_drawn, content)
