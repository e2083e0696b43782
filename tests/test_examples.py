"""The example notebook runs from top to bottom, and what it says about its pictures is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
import nbformat  # noqa: E402

NOTEBOOK = Path(__file__).parent.parent / "examples" / "deformable_attention.ipynb"


def test_notebook() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "commit it stripped"
    nbclient.execute(notebook, timeout=300, kernel_name="python3")  # raises what a cell does
    pictures = [
        [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for cell in cells
    ]
    assert [len(each) for each in pictures] == [0, 1, 1, 0, 1]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert losses[-1] < losses[0] / 10
    found = re.search(r"heaviest point: (\d+) pixels from the one asked for", printed)
    assert found is not None, printed
    assert int(found[1]) < 16
