"""The comparison of all systems: what is finished is reported, what is not is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.detectors import study
from deform_attn.detr.drawn import Shapes

ROOT = Path(__file__).parents[2]


def curve(ap50: float, cpu_seconds: float = 100) -> dict[str, Any]:
    rows = [{"step": s, "AP": ap50 * s / 1600, "AP50": ap50 * s / 800} for s in (200, 400, 800)]
    return {"ap": rows, "cpu_seconds": cpu_seconds}


def test_the_table_shows_the_spread_and_fails_a_recipe_by_its_worst_seed() -> None:
    curves = {
        "dino": {"0": curve(0.8, 90), "1": curve(0.4, 110), "2": curve(0.6, 100)},
        "stewart": {"0": curve(0.32)},
    }
    rows = study.table(curves, 800).splitlines()
    assert rows[2] == (
        "| dino | 3 | 0.15 (0.10 to 0.20) | 0.60 (0.40 to 0.80) | 0.30 (0.20 to 0.40) | 100 "
        "| 0.45: NOT MET |"
    )
    assert rows[3] == "| stewart | 1 | 0.08 | 0.32 | 0.16 | 100 | 0.3: met |"


def test_the_page_shows_the_committed_curves() -> None:
    folder = ROOT / "benchmarks/results/detr"
    curves = json.loads((folder / "curves.json").read_text())
    assert set(curves) <= set(study.BARS)
    assert (folder / "table.md").read_text() == study.table(curves, 800)
    assert study.table(curves, 800) in (ROOT / "docs/detr/index.md").read_text()


def test_what_is_finished_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Shapes, "lengths", {"train": 32, "val": 8})
    arguments = [
        "benchmarks.detectors",
        "--out",
        str(tmp_path),
        "--recipes",
        "detr",
        "--steps",
        "8",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    study.main()
    assert "detr, seed 0" in capsys.readouterr().out
    assert json.loads((tmp_path / "curves.json").read_text())["detr"]["0"]["ap"][-1]["step"] == 8
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text().count("| detr, batch 64, layers 3 | 1 |") == 1
    monkeypatch.setattr(study, "train", None)
    study.main()
    assert "detr, seed 0" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "800", "--report"])
    with pytest.raises(SystemExit):
        study.main()
    assert "expected finished runs of 800 steps" in capsys.readouterr().err
