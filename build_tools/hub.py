"""Lays out the Linux wheels in dist/ as a kernel for Hugging Face's `kernels`.

    python build_tools/hub.py dist/*manylinux*.whl --out dist/hub

`kernels.get_local_kernel("dist/hub")` loads it; the folder can be uploaded as a kernel repository.
A variant holds the package as the wheel does, so nothing is compiled again. The Hub's own builder
is not used: it makes one library for each version of torch, and these libraries serve all of them.
An installed deform_attn takes precedence: a process can register operators only once.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

from toolchain import TORCH_FLOOR

INIT = '''"""Multi-scale deformable attention: the package deform_attn as a kernel of the Hub."""

import importlib
import sys
from pathlib import Path

try:
    package = importlib.import_module("deform_attn")
except ModuleNotFoundError:  # not installed: the copy beside this file
    sys.path.append(str(Path(__file__).parent))
    package = importlib.import_module("deform_attn")

from types import SimpleNamespace

from deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from deform_attn.integrations.transformers import MultiScaleDeformableAttention

layers = SimpleNamespace(MultiScaleDeformableAttention=MultiScaleDeformableAttention)
__all__ = ["MSDeformAttn", "layers", "ms_deform_attn", "ms_deform_attn_fused"]
__version__ = package.__version__
'''


def variants(wheel: Path) -> list[tuple[str, str]]:
    """Names of a wheel's variants, each with the type of its backend."""
    machine = wheel.stem.rpartition("manylinux_2_28_")[2]
    abi = "torch-stable-abi" + "".join(map(str, TORCH_FLOOR))
    found = [(f"{abi}-cpu-{machine}-linux", "cpu")]
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read("deform_attn/_libraries.json"))
    # `kernels` takes a variant for CUDA x.y where torch has CUDA x.z, z >= y.
    if "file" in record["libraries"]["cuda"]:
        found += [(f"{abi}-cu{version}-{machine}-linux", "cuda") for version in ("126", "130")]
    return found


def lay_out(wheel: Path, out: Path) -> None:
    """Writes the variants of a wheel below `out`."""
    with zipfile.ZipFile(wheel) as archive:
        version = re.search(r"-(\d+)\.(\d+)\.", wheel.name)
        assert version is not None, wheel.name
        files = [name for name in archive.namelist() if name.startswith("deform_attn/")]
        for variant, backend in variants(wheel):
            folder = out / "build" / variant
            shutil.rmtree(folder, ignore_errors=True)
            archive.extractall(folder, files)
            (folder / "__init__.py").write_text(INIT, encoding="utf-8")
            facts = {
                "id": f"deform_attn_{wheel.name.split('-')[1].replace('.', '_')}_{backend}",
                "name": "deform-attn",
                "version": max(1, int(version[1])),
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            text = json.dumps(facts, indent=2) + "\n"
            (folder / "metadata.json").write_text(text, encoding="utf-8")
            print(folder)


def main() -> int:
    """Writes the kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dist") / "hub")
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        lay_out(wheel, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
