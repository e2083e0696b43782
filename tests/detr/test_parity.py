"""Every recorded system, reproduced: values, losses, gradients, matchings."""

from __future__ import annotations

from pathlib import Path

import pytest

from .systems import SYSTEMS
from .table import errors, quantity


@pytest.mark.parametrize("name", SYSTEMS)
def test_all_that_is_recorded_is_reproduced(name: str, goldens: Path) -> None:
    found = errors(name, goldens)
    wrong = {key: error for key, error in found.items() if not error <= quantity(name, key)[1]}
    assert not wrong, wrong
