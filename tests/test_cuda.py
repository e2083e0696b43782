"""What only a machine with a GPU can try: streams, graphs, a second GPU, calls that never wait."""

from __future__ import annotations

import pytest
import torch

from deform_attn.testing import CASES, Dtypes, OpInputs, check, grad_output_for, results
from tests.runners import Runner


def kernels(runner: Runner) -> bool:
    return runner.device == "cuda" and runner.backend in ("compiled", "triton")


def drawn(dtypes: Dtypes) -> OpInputs:
    inputs = CASES["head_dim_32"].make(dtypes, "cuda")
    return inputs.replace_tensors(inputs.value.nan_to_num(0.5), *inputs.tensors[1:])


@pytest.mark.only(runners=kernels, dtypes=["f32", "bf16"])
def test_current_stream(runner: Runner, dtypes: Dtypes) -> None:
    """What was launched there before is waited for: a value that arrives late is the one read."""
    inputs = drawn(dtypes)
    grad_output = grad_output_for(inputs)
    expected = results(runner, inputs, grad_output)
    late = torch.zeros_like(inputs.value)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.copy_(inputs.value)
        found = results(runner, inputs.replace_tensors(late, *inputs.tensors[1:]), grad_output)
    torch.cuda.synchronize()
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


@pytest.mark.only(runners=kernels, dtypes=["f32"])
def test_nothing_is_waited_for(runner: Runner, dtypes: Dtypes) -> None:
    """Level sizes stay on the device: no call synchronises with it."""
    inputs = drawn(dtypes)
    grad_output = grad_output_for(inputs)
    results(runner, inputs, grad_output)  # Triton compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(runner, inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.only(runners=kernels, dtypes=["f32"])
def test_captured_in_a_graph(runner: Runner, dtypes: Dtypes) -> None:
    """Replayed on other numbers in the same memory."""
    inputs = drawn(dtypes)
    expected = runner.forward(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = runner.forward(inputs)
    inputs.value.mul_(2)
    graph.replay()
    torch.testing.assert_close(output, 2 * expected)


@pytest.mark.only(runners=lambda runner: kernels(runner) and torch.cuda.device_count() > 1)
def test_second_gpu(runner: Runner, dtypes: Dtypes) -> None:
    """Tensors run where they are, and the current device stays what it was."""
    assert torch.cuda.current_device() == 0
    check(runner, CASES["listed_points"].make(dtypes, "cuda:1"))
    assert torch.cuda.current_device() == 0
