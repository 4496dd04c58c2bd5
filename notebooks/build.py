"""Make the notebooks from the scripts beside this file, and run them: ``make notebooks``, or with names of some.

A script is Python in cells: a line ``# %%`` begins a cell of code, ``# %% [markdown]`` one of text in comments. The
scripts are what is edited; outputs are those of the last run.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
os.environ["TQDM_DISABLE"] = "1"  # a slow machine would show bars, on standard error
LARGEST = 200_000  # bytes of a notebook: what a code-hosting page shows at once


def cells(script: str) -> list[nbformat.NotebookNode]:
    """Cut a script into cells."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = part.partition("\n")
        if "[markdown]" in kind:
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines())
            cell = nbformat.v4.new_markdown_cell(text)
        else:
            cell = nbformat.v4.new_code_cell(re.sub(r"  # noqa.*", "", body.strip()))
        cell["id"] = f"cell-{len(found)}"  # random ones would change the file at every run
        found.append(cell)
    return found


def build(script: Path) -> Path:
    """Make and run one notebook; an error in a cell ends it."""
    notebook = nbformat.v4.new_notebook(cells=cells(script.read_text()))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata = {}  # times of execution
        warned = [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        if warned:  # a warning names folders of the machine, and tells a reader nothing
            raise ValueError(f"{script.stem}: a cell wrote to standard error: {warned[0]}")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    text = nbformat.writes(notebook) + "\n"
    if len(text) > LARGEST:
        raise ValueError(f"{script.stem}: {len(text)} bytes with its outputs, {LARGEST} at most; make them smaller")
    target = HERE / f"{script.stem}.ipynb"
    target.write_text(text)
    return target


if __name__ == "__main__":
    names = sys.argv[1:] or sorted(path.stem for path in (HERE / "scripts").glob("*.py"))
    for name in names:
        script = HERE / "scripts" / f"{name}.py"
        if '"cifar10"' in script.read_text() and not Path("data/cifar-10-batches-py").is_dir():
            print(f"{name}: left as it is, because CIFAR-10 is not in data/")
        else:
            print(build(script), flush=True)
