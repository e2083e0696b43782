"""No count of tests/simt/traffic.json is passed: a change may lower what the kernels move.

After a change that lowers counts, or that is worth what it costs:

    python -m benchmarks.traffic --json tests/simt/traffic.json
"""

from __future__ import annotations

import json

import pytest

from simt import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

COMMITTED = json.loads((build.HERE / "traffic.json").read_text())
# an encoder and a decoder; the rest is for `make traffic`
TRIED = ("deformable_detr_encoder_800x1333 f32", "rtdetr_decoder_640 f32")


@pytest.mark.parametrize("entry", TRIED)
def test_counts_are_not_raised(entry: str) -> None:
    from benchmarks import traffic

    name, dtype = entry.split()
    counts = {entry: traffic.count(traffic.WORKLOADS[name], dtype)}
    assert not traffic.raised(counts, COMMITTED)


@pytest.mark.parametrize("entry", COMMITTED)
def test_bars(entry: str) -> None:
    """What the kernels were designed for, against one thread per channel."""
    counts = COMMITTED[entry]
    plain, ours = counts["forward plain"], counts["forward teams"]
    assert ours["loads"] <= plain["loads"] / 4
    assert ours["read"] <= 0.92 * plain["read"]
    if "encoder" in entry:
        assert ours["l1_missed"] <= 0.5 * plain["l1_missed"]
    plain = counts["backward plain"]
    for way in counts["chosen"]:
        ours = counts[f"backward {way}"]
        assert ours["atomics"] <= plain["atomics"] / 4 + 1e-4  # both are rounded
        limit = 0.6 if "encoder" in entry else 1.0
        assert ours["atomic_sectors"] <= limit * plain["atomic_sectors"]
    gather, scatter = (counts[f"backward {way}"] for way in ("gather", "scatter"))
    moved = ("read", "written", "atomic_sectors")
    assert sum(gather[kind] for kind in moved) <= 3 * sum(scatter[kind] for kind in moved)


def test_narrow_numbers_move_less() -> None:
    for name in ("deformable_detr_encoder_800x1333", "dino_decoder_900q"):
        wide, narrow = (COMMITTED[f"{name} {dtype}"]["forward teams"] for dtype in ("f32", "bf16"))
        assert narrow["read"] <= 0.6 * wide["read"]
