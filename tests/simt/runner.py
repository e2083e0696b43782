"""The emulated kernels as runners: every test of a backend runs with them too."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from deform_attn.testing import OpInputs
from tests.runners import Runner
from tests.simt import build
from tests.simt.emulated import Emulated

LARGEST_WORK = 300  # of a case: emulation is slow


def _runner(name: str, kernels: Emulated, algorithm: str) -> Runner:
    def forward(inputs: OpInputs) -> Tensor:
        inputs = inputs.replace_tensors(*(tensor.contiguous() for tensor in inputs.tensors))
        return kernels.forward(
            *inputs.arguments,
            inputs.num_points,
            baseline=algorithm == "baseline",
            value_mask=inputs.value_mask,
        )

    def backward(inputs: OpInputs, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = inputs.replace_tensors(*(tensor.contiguous() for tensor in inputs.tensors))
        return kernels.backward(
            grad_output,
            *inputs.arguments,
            inputs.num_points,
            algorithm=algorithm,
            value_mask=inputs.value_mask,
        )

    return Runner.from_kernels(
        name,
        forward,
        backward,
        why_not=lambda dtypes: build.why_not(),
        deterministic=algorithm == "deterministic",
        largest_work=LARGEST_WORK,
    )


def runners() -> Iterator[Runner]:
    """Each backward algorithm, with the atomics of new and old GPUs."""
    yield _runner("emulated/deterministic", Emulated(), "deterministic")
    yield _runner("emulated/scatter", Emulated(), "scatter")
    yield _runner("emulated/scatter_before_sm_90", Emulated(atomic_floats=1), "scatter")
    yield _runner("emulated/baseline", Emulated(), "baseline")
