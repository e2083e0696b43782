"""The counts of tests/simt/traffic.json are upper limits: a change may only lower them.

After a change that lowers counts, or that is worth a higher one:

    python -m benchmarks.gates.traffic --json tests/simt/traffic.json
"""

from __future__ import annotations

import json

import pytest

from tests.simt import build

COMMITTED = json.loads((build.HERE / "traffic.json").read_text())
# Fusing saves memory traffic and launches, not traffic through L2. The tiles of an encoder's
# backward pass read points and gradients a second time, fused or not: their bytes are a larger
# share of a fused layer. The deterministic backward of a decoder writes and reads sums of 8 bytes
# for every element of value, and each of its atomics adds to twice the bytes.
NOT_MET = {
    "deterministic backward: sectors, of the atomic one",
    "layer fused: forward + backward, least_bytes",
    "layer fused: forward + backward, fixed reference, least_bytes",
    "layer fused: forward, l2_bytes",
    "layer fused: forward + backward, l2_bytes",
    "layer fused: forward + backward, fixed reference, l2_bytes",
    "layer fused: forward, masked, l2_bytes",
    "layer fused: forward + backward, masked, l2_bytes",
}


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_counts_are_not_raised(kind: str) -> None:
    """Of small workloads; `make traffic` counts all of them."""
    from benchmarks.gates import traffic

    workload = traffic.SMALL[kind == "decoder"]
    counts = {f"{workload.name} f32": traffic.count(workload, "f32")}
    assert not traffic.raised(counts, COMMITTED)


def test_higher_and_new_counts_are_reported() -> None:
    from benchmarks.gates import traffic

    before = {"w f32": {"forward": {"loads": 2.0}}}
    assert not traffic.raised(before, before)
    more = {
        "w f32": {"forward": {"loads": 2.1}, "another": {"loads": 1.0}},
        "v f32": {"forward": {}},
    }
    assert traffic.raised(more, before) == [
        "w f32, forward: loads 2.0 -> 2.1",
        "w f32, another: not counted before; --json writes a new file",
        "v f32, forward: not counted before; --json writes a new file",
    ]


def test_bars() -> None:
    """The bars of the design, compared with one thread per channel."""
    from benchmarks.gates import traffic

    assert {bar.text for bar in traffic.bars(COMMITTED) if not bar.met} == NOT_MET
