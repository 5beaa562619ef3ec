"""Takes out of notebooks what changes with every run: counts, times, names of cells, progress bars and warnings.

python scripts/tidy_notebooks.py      # `make notebooks` runs them first
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def tidy(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook without them."""
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            for output in cell["outputs"]:
                output.pop("execution_count", None)
                if output["output_type"] == "execute_result":
                    output["execution_count"] = None
    notebook["metadata"] = {"jupytext": notebook["metadata"]["jupytext"], "kernelspec": KERNEL}
    return notebook


KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def main() -> None:
    """Rewrites each notebook."""
    for file in sorted(FOLDER.glob("*.ipynb")):
        notebook = tidy(json.loads(file.read_text("utf-8")))
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
