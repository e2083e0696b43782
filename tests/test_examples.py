"""The code of README.md, of the pages and of the notebook runs, and prints what is written beside
it. Blocks of mmdet, Core ML and downloaded weights are left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("init_detector(", "coremltools", "PekingU/")
PAGES = ("README.md", "docs/seeing.md", "docs/integrations.md", "docs/detr/index.md")
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.M)
    if not any(word in block for word in LEFT_OUT)
]

# What a block takes from its reader: defined here, by a word of the block.
GIVEN = {
    "= accelerate(": """
from tests import transformers_models
from tests.transformers_models import SMALL
model = transformers_models.build(SMALL["deformable_detr"])
""",
    "export(": """
import torch, deform_attn
model = deform_attn.MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2).eval()
args = (torch.rand(1, 5, 32), torch.rand(1, 5, 1, 2), torch.rand(1, 48, 32), [(8, 6)])
""",
    "viz.record(": """
import torch, deform_attn
photo = torch.rand(3, 320, 320)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder, layer = torch.nn.Module(), torch.nn.Module()
        layer.cross_attn = deform_attn.MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2)
        self.decoder.layers = torch.nn.ModuleDict({"5": layer})
    def forward(self, images):
        query, reference = torch.rand(1, 5, 32), torch.rand(1, 5, 1, 2)
        layer = self.decoder.layers["5"].cross_attn
        return layer(query, reference, torch.rand(1, 48, 32), [(8, 6)])
model, images = Model(), photo[None]
""",
}


def test_readme_and_pages(tmp_path: Path) -> None:
    assert len(BLOCKS) == 8
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "photograph.jpg").symlink_to(ROOT / "examples" / "digits.jpg")
    # one process for all blocks, not this one: shims replace modules, so their block is the last
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    for block in sorted(BLOCKS, key=lambda block: "install_shims" in block):
        code += "".join(lines for word, lines in GIVEN.items() if word in block) + block
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = re.findall(r"print\(.*\)  # prints (.*)", code)
    assert len(expected) == 2
    assert set(expected) <= set(done.stdout.splitlines())


def test_measured_tables() -> None:
    """Every line of the tables is one that `python -m benchmarks.op table` prints."""
    report = pytest.importorskip("benchmarks.op.report")
    file = ROOT / "benchmarks" / "results" / "epyc-zen4-2core" / "bench.json"
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "benchmarks.md").read_text()
    lines = report.markdown(json.loads(file.read_text())).splitlines()
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) > 20
    assert [line for line in table if line not in pages] == []


def test_notebook() -> None:
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "deformable_attention.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "commit it stripped"
    nbclient.execute(notebook, timeout=300, kernel_name="python3")  # raises what a cell raises
    pictures = [
        [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for cell in cells
    ]
    assert [len(each) for each in pictures] == [0, 1, 1, 0, 1]
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", printed)]
    assert losses[-1] < losses[0] / 10
    distance = re.search(r"heaviest point: (\d+) pixels from the target", printed)
    assert distance is not None, printed
    assert int(distance[1]) < 16
