"""Equations as MathML, made when the site is built: browsers draw them without a script or a connection."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves, with `generic`: \(...\) within a line, \[...\] on lines of its own.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def _drawn(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]).strip(), display="inline" if found[2] == "(" else "block")


def on_page_content(content: str, **_: Any) -> str:
    """Replace the equations of a page; called by mkdocs."""
    return EQUATION.sub(_drawn, content)
