"""Runs each notebook from its first cell to its last, beside the script that it is a pair of, and keeps what it shows.

    python scripts/notebooks.py             # `make notebooks`; needs jupytext, nbclient and ipykernel
    python scripts/notebooks.py recurrence  # one of them

What changes with every run (counts, times, names of cells, progress bars, warnings) is left out.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
FIGURES = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def tidy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook without what no reader wants."""
    for number, cell in enumerate(notebook["cells"]):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            for output in cell["outputs"]:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = None
    notebook["metadata"] = {"jupytext": notebook["metadata"]["jupytext"], "kernelspec": KERNEL}
    return notebook


def main() -> None:
    """Runs all notebooks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks; all by default")
    names = parser.parse_args().names or [file.stem for file in sorted(FOLDER.glob("*.py"))]
    os.environ.update(FIGURES)
    for name in names:
        notebook = jupytext.read(FOLDER / f"{name}.py")
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}}).execute()
        shown = tidy(json.loads(jupytext.writes(notebook, "ipynb")))
        (FOLDER / f"{name}.ipynb").write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"wrote notebooks/{name}.ipynb")


if __name__ == "__main__":
    main()
