"""The messages of failed CUDA launches; every launch is checked. Needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "c++")

PROGRAM = """
#include <iostream>
#include "errors.cuh"
int main(int, char** argv) {
  std::cout << deform_attn::launch_error("forward_teams", std::stoi(argv[1]), "the message",
                                         std::stoi(argv[2]), deform_attn::architectures(argv[3]));
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert shutil.which(COMPILER), f"no C++ compiler {COMPILER}"
    source = tmp_path_factory.mktemp("errors") / "errors.cpp"
    source.write_text(PROGRAM)
    command = [COMPILER, "-std=c++17", f"-I{CUDA}", str(source), "-o", str(source.with_suffix(""))]
    subprocess.run(command, check=True)
    return source.with_suffix("")


def message(program: Path, error: int, capability: int, built: str) -> str:
    command = [str(program), str(error), str(capability), built]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("error", "capability", "here"), [(209, 90, "9.0"), (98, 121, "12.1"), (222, 103, "10.3")]
)
def test_a_missing_image_is_named(program: Path, error: int, capability: int, here: str) -> None:
    """It names the kernel, the GPU's architecture, those built, and the command to build it."""
    text = message(program, error, capability, "750,860,1200")
    assert "CUDA kernel forward_teams was not built for this GPU, which has" in text
    assert f"capability {here}" in text
    assert "built for: 7.5, 8.6, 12.0." in text
    assert f'TORCH_CUDA_ARCH_LIST="{here}" pip install --no-build-isolation --no-binary=' in text
    assert ("driver is too old" in text) == (error == 222)


def test_other_errors_keep_the_message_of_the_runtime(program: Path) -> None:
    expected = "CUDA kernel forward_teams was not launched: the message"
    assert message(program, 9, 90, "900").endswith(expected)  # invalid configuration
    text = message(program, 700, 90, "900")  # illegal address, of a kernel before this one
    assert expected in text
    assert "CUDA_LAUNCH_BLOCKING=1" in text


def test_every_launch_is_checked() -> None:
    """Directly behind each LAUNCH stands the check that raises with the kernel's name."""
    check = r"check_launch\(\"(\w+)\", device"
    launch = re.compile(rf"LAUNCH\(\s*\(?\s*(\w+)[^;]*;\s*(?:return )?({check})?")
    found = []
    for file in [*CUDA.glob("*.cuh"), *CUDA.glob("*.cu")]:
        text = re.sub(r"//.*|#define.*\\\n.*", "", file.read_text())
        launches = launch.findall(text)
        assert len(launches) == text.count("LAUNCH(")
        assert "<<<" not in text, f"{file.name}: a launch past LAUNCH"
        found += launches
    assert found
    for kernel, check, named in found:
        assert check, f"the launch of {kernel} is not checked"
        assert named == kernel
