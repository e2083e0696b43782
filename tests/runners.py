"""The ways to call the operator in tests: backends on devices, and emulated kernels.

A test requests the fixtures `runner`, `dtypes` and `case`; conftest.py supplies each combination
that can run. To add a runner, yield it from `all_runners`:

    Runner.from_kernels("emulated/cuda", forward, backward, why_not=..., largest_work=100)
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deform_attn
from deform_attn.backends import BACKENDS
from deform_attn.testing import DTYPES, Case, Dtypes, OpInputs

Forward = Callable[[OpInputs], Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[OpInputs, Tensor], Gradients]  # inputs, grad_output [B, Q, M * D]


@dataclass(frozen=True)
class Runner:
    name: str
    call: Forward  # differentiable
    why_not: Callable[[Dtypes], str | None]  # why it cannot run with these dtypes
    device: str = "cpu"
    backend: str | None = None  # the package's name for it; None: kernels without the package
    exact_at_knots: bool = True
    deterministic: bool = True  # runs under torch.use_deterministic_algorithms(True)
    settles_dtypes: bool = True  # casts what no kernel reads natively
    any_layout: bool = True  # takes tensors that are not contiguous, and list metadata
    largest_work: int | None = None  # of a Case, which is made smaller; None: any
    queries_at_once: bool = False  # as in Case.smaller
    default: bool = True  # False: runs only where --runners names it

    @classmethod
    def from_kernels(cls, name: str, forward: Forward, backward: Backward, **fields: Any) -> Runner:
        """A runner of bare kernels: they get settled dtypes, contiguous tensors, int64 metadata."""
        return cls(
            name,
            lambda inputs: _Kernels.apply(forward, backward, inputs, *inputs.tensors),
            **({"any_layout": False, "settles_dtypes": False} | fields),
        )

    def __call__(self, inputs: OpInputs) -> Tensor:
        return self.call(inputs)

    def forward(self, inputs: OpInputs) -> Tensor:
        with torch.no_grad():
            return self.call(inputs)

    def gradients(self, inputs: OpInputs, grad_output: Tensor) -> Gradients:
        leaves = inputs.leaves()
        grads = torch.autograd.grad(self.call(leaves), leaves.tensors, grad_output)
        return grads[0], grads[1], grads[2]

    def takes(self, case: Case | None, dtypes: Dtypes | None) -> bool:
        """Whether the runner can run this case with these dtypes."""
        if dtypes is not None and self.why_not(dtypes) is not None:
            return False
        if dtypes is not None and not dtypes.native and not self.settles_dtypes:
            return False
        if case is None:
            return True
        return self.any_layout or (case.layout == "plain" and case.metadata == "int64")

    @property
    def slow(self) -> bool:
        return self.largest_work is not None

    def fitted(self, case: Case) -> Case:
        if self.largest_work is None:
            return case
        return case.smaller(self.largest_work, queries_at_once=self.queries_at_once)


class _Kernels(torch.autograd.Function):
    """Bare kernels as one differentiable call."""

    @staticmethod
    def forward(ctx: Any, forward: Forward, backward: Backward, inputs: OpInputs, *tensors: Tensor):
        ctx.kernel, ctx.inputs = backward, inputs.replace_tensors(*tensors)
        return forward(ctx.inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        return None, None, None, *ctx.kernel(ctx.inputs, grad_output.contiguous())


def package_runner(backend: str, device: str, **fields: Any) -> Runner:
    def call(inputs: OpInputs) -> Tensor:
        return deform_attn.ms_deform_attn(
            *inputs.arguments,
            num_points=inputs.num_points,
            backend=backend,
            value_mask=inputs.value_mask,
        )

    def why_not(dtypes: Dtypes) -> str | None:
        return BACKENDS[backend].why_not(device, dtypes.value)

    return Runner(f"{backend}/{device}", call, why_not, device, backend, **fields)


def all_runners() -> Iterator[Runner]:
    """All runners, also those that cannot run here."""
    yield package_runner("reference", "cpu", exact_at_knots=False)
    yield package_runner("compiled", "cpu")
    if torch.cuda.is_available():
        # grid_sample has no deterministic backward on a GPU
        yield package_runner("reference", "cuda", exact_at_knots=False, deterministic=False)
        yield package_runner("compiled", "cuda")
        yield package_runner("triton", "cuda")
    else:
        # interpreted: about half a second a case
        yield package_runner("triton", "cpu", largest_work=8, queries_at_once=True)
    if importlib.util.find_spec("tests.simt"):  # not beside an installed wheel
        yield from importlib.import_module("tests.simt.runner").runners()


def unavailable() -> dict[str, str]:
    """The runners that cannot run here, with the reasons."""
    reasons = {}
    if not torch.cuda.is_available():
        for backend in ("reference", "compiled", "triton"):
            reasons[f"{backend}/cuda"] = "no GPU"
    for runner in all_runners():
        why = [runner.why_not(dtypes) for dtypes in DTYPES.values()]
        if None not in why:
            reasons[runner.name] = str(why[0])
    return reasons


def package(runner: Runner) -> bool:
    """Whether it calls `deform_attn.ms_deform_attn`: any order of derivatives, layout and dtype."""
    return runner.backend is not None


def operators(runner: Runner) -> tuple[Any, Any]:
    """The forward and backward operator under torch.ops of a package runner."""
    suffix = {"compiled": "", "triton": "_triton", "reference": "_reference"}[str(runner.backend)]
    name = f"ms_deform_attn{suffix}"
    ops = torch.ops.deform_attn
    return getattr(ops, name), getattr(ops, f"{name}_backward")


class Recorder(TorchDispatchMode):
    """The calls of the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deform_attn":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))
