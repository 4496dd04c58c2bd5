"""Docstrings as Markdown: what they contain that Markdown, or griffe, would not read as it is meant."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")
LITERAL_BLOCK = re.compile(r"::(?=\n\n)")
CODE_OR_STAR = re.compile(r"(``.+?``|`[^`]+`)|\*(?=_)", re.DOTALL)  # of theta*_t, which would begin an emphasis
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # griffe knows doctests under "Examples:" only


class DocstringMarkup(griffe.Extension):
    """Rewrites roles, such as :func:`unroll`, as code, the double colon before a literal block as one, and the like."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object; called by griffe."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", obj.docstring.value)
            text = CODE_OR_STAR.sub(lambda found: found[1] or r"\*", text)
            obj.docstring.value = EXAMPLE.sub("Examples:", LITERAL_BLOCK.sub(":", text))
