"""The tests of this folder fail without a C++ compiler, pybind11 and CUDA's headers."""

from __future__ import annotations

import pytest

from tests.simt import build


@pytest.fixture(autouse=True, scope="session")
def _can_build() -> None:
    if (why := build.why_not()) is not None:
        pytest.fail(
            f"the CUDA kernels cannot be emulated: {why}. Install it, or leave out tests/simt."
        )
