"""Make an environment for each group of libraries that exclude each other.

    python -m benchmarks.clients.environments results/clients [NAME ...]

Each is a virtual environment with what the libraries need beyond the environment that runs this,
whose packages (torch, onnx, onnxruntime) it sees.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ENVIRONMENTS = {
    "mmdet": ["mmcv-lite==2.1.0", "mmdet==3.3.0"],
    "onedl": ["onedl-mmcv==2.3.6", "onedl-mmdetection==3.5.1"],
    "groundingdino": ["rf-groundingdino==0.3.0", "transformers<5"],
    "groundingdino-py": ["groundingdino-py==0.4.0", "transformers<5"],
    "dfine": ["dfine-seg==0.6.2", "pydfine==0.2.1"],
    "ultralytics": ["ultralytics==8.4.190"],
    "rfdetr": ["rfdetr==1.11.2"],
    "libreyolo": ["libreyolo==1.6.0"],
    "lightly": ["lightly-train==0.18.0"],
}


def make(name: str, folder: Path) -> None:
    """Create ``folder/name`` and install its packages."""
    path = folder / name
    venv.create(path, with_pip=False)
    (site,) = path.glob("lib/python*/site-packages")
    (site / "zz_parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    constraint = folder / "constraints.txt"
    constraint.write_text(f"torch=={importlib.metadata.version('torch')}\n")
    command = [path / "bin" / "python", "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "--constraint", constraint]
    subprocess.run([*command, *ENVIRONMENTS[name]], check=True)


def main() -> int:
    """Exit status 1 where an environment could not be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help=f"default: all of {', '.join(ENVIRONMENTS)}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in arguments.names or ENVIRONMENTS:
        if (arguments.folder / name / "done").exists():
            continue
        try:
            make(name, arguments.folder)
        except subprocess.CalledProcessError as error:
            print(f"{name}: pip failed with exit status {error.returncode}", file=sys.stderr)
            failed = 1
        else:
            (arguments.folder / name / "done").touch()
    return failed


if __name__ == "__main__":
    sys.exit(main())
