"""No count of tests/simt/traffic.json is passed: a change may lower what the kernels move.

After a change that lowers counts, or that is worth what it costs:

    python -m benchmarks.gates.traffic --json tests/simt/traffic.json
"""

from __future__ import annotations

import json

import pytest
import torch

from tests.simt import build
from tests.simt.emulated import Emulated

COMMITTED = json.loads((build.HERE / "traffic.json").read_text())
# an encoder and a decoder; the rest is for `make traffic`
TRIED = ("deformable_detr_encoder_800x1333 f32", "rtdetr_decoder_640 f32")
# What is not reached, and stays in the table: fusing saves memory traffic and launches, not L2's.
# Bytes a point through L2: forward, 77 of 99 are the gathered pixels of value; with nothing beside
# these and what every layer must move, 20, it would still be 97 of 137 unfused, 0.71x. Backward,
# 298 of 504 are pixels, the output's gradient and offsets, read as often as unfused, which moves
# 391 in all; what fusing adds are the reference points, 99: gathering reads a sector for each query
# that a tile looks at, of which it uses one level.
NOT_MET = {
    "layer fused: forward, l2_bytes",
    "layer fused: forward + backward, l2_bytes",
    "layer fused: forward + backward, fixed reference, l2_bytes",
}


@pytest.mark.parametrize("entry", TRIED)
def test_counts_are_not_raised(entry: str) -> None:
    from benchmarks.gates import traffic

    name, dtype = entry.split()
    counts = {entry: traffic.count(traffic.WORKLOADS[name], dtype)}
    assert not traffic.raised(counts, COMMITTED)


def test_more_and_new_counts_are_told() -> None:
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
    """What the kernels were designed for, against one thread per channel."""
    from benchmarks.gates import traffic

    assert {bar.text for bar in traffic.bars(COMMITTED) if not bar.met} == NOT_MET


@pytest.mark.parametrize("encoder", [False, True])
def test_bounds_of_blocks_that_do_not_run(encoder: bool) -> None:
    """The rectangles that the benchmark makes are those of the kernel, up to rounding."""
    from benchmarks.gates import traffic

    levels = ((19, 12), (5, 6))
    small = traffic.Workload(
        *("small", levels, 258 if encoder else 37, 3, 4, (2, 2)), encoder=encoder
    )
    inputs = traffic.draw(small)
    kernels = Emulated(processors=1)
    arguments = (
        *(inputs.value, inputs.spatial_shapes, inputs.level_start_index),
        *(inputs.sampling_locations, inputs.attention_weights),
    )
    targets = kernels.targets(*arguments, None, algorithm="gather")
    kernels.backward(inputs.grad_output, *arguments, algorithm="gather", targets=targets)
    made = torch.empty_like(targets[5])
    traffic.fill_bounds(inputs, made)
    assert torch.equal(targets[5], made)
