"""The operators' schemas, and what every backend gets from them: autograd, vmap, tracing.

A backend implements pairs of PyTorch operators, forward and backward. They are defined in Python,
so that the package imports and falls back where no binary was built; the C++ libraries only
register kernels for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.library import Library

from deform_attn import composite, flops
from deform_attn.checks import check_gradient, check_operands
from deform_attn.gathered import standard
from deform_attn.operands import (
    AnyOperands,
    DiscreteOperands,
    FusedOperands,
    Operands,
    of_backward,
)

__all__ = ["ATTENTION", "FUSED", "LIBRARY", "Operator", "Signature", "call_discrete", "define"]

LIBRARY = Library("deform_attn", "DEF")

Operator = Callable[..., Tensor]

_requires_grad = attrgetter("requires_grad")

# Types of the operands that are not "Tensor".
_TYPES = {
    "spatial_shapes": "Tensor?",
    "level_start_index": "Tensor?",
    "level_sizes": "SymInt[]?",
    "num_points": "int[]?",
    "offset_scale": "float",
    "official_clamp": "bool",
    "value_mask": "Tensor?",
}
# The last argument of every operator, forward and backward: calls without it stay valid.
_MASK = "Tensor? value_mask=None"


@dataclass(frozen=True)
class Signature:
    """The operands of an operator, and how it is differentiated."""

    record: type[AnyOperands]  # its fields are the schema's arguments: tensors, numbers, value_mask
    names: tuple[str, ...]  # of the operands that have gradients
    composite: Callable[
        [Any], Tensor
    ]  # the same in plain PyTorch, differentiable any number of times

    @property
    def schema(self) -> str:
        """The arguments with their types, without ``value_mask``."""
        names = self.record._fields[:-1]
        return ", ".join(f"{_TYPES.get(name, 'Tensor')} {name}" for name in names)

    @property
    def batched(self) -> list[int]:
        """Positions of the tensors that have a batch dimension, without ``value_mask``."""
        return [i for i, name in enumerate(self.record._fields) if name not in _TYPES]

    @property
    def differentiable(self) -> list[int]:
        """Positions of the operands that have gradients."""
        return [self.record._fields.index(name) for name in self.names]


ATTENTION = Signature(
    Operands, ("value", "sampling_locations", "attention_weights"), composite.attention
)
FUSED = Signature(
    FusedOperands,
    ("value", "reference_points", "sampling_offsets", "attention_logits"),
    composite.fused,
)
DISCRETE = Signature(DiscreteOperands, ("value", "attention_weights"), composite.discrete)


class _Function(_SingleLevelFunction):
    """Single-level: the dispatcher has already unwrapped the tensors of torch.func's transforms."""

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple[Any, ...]:
        """What torch.autograd.Function has, and torch._dynamo.config.compiled_autograd needs."""
        return (ctx._autograd_function_id,)


def define(name: str, signature: Signature) -> tuple[Operator, Callable[..., Any]]:
    """Define ``deform_attn::<name>`` and its backward.

    The backward takes ``output_mask``, one flag per gradient, and returns None for those that are
    not set.

    Returns:
        The differentiable call, which takes the operands by position, and the backward operator,
        for callers with an autograd of their own.
    """
    outputs = ", ".join(["Tensor"] * len(signature.names))
    LIBRARY.define(f"{name}({signature.schema}, {_MASK}) -> Tensor")
    LIBRARY.define(
        f"{name}_backward(Tensor grad_output, {signature.schema}, bool deterministic, "
        f"bool[] output_mask, {_MASK}) -> ({outputs})"
    )
    forward_op = getattr(torch.ops.deform_attn, name).default
    backward_op = getattr(torch.ops.deform_attn, f"{name}_backward").default
    eager_forward, eager_backward = forward_op._op, backward_op._op  # what their __call__ calls
    record, differentiable = signature.record, signature.differentiable
    num_operands, num_tensors = len(record._fields), record._fields.index("level_sizes")
    of_differentiable = itemgetter(*differentiable)

    def spread(gradients: Any) -> list[Any]:
        """One gradient per operand: None for those that have none."""
        by_operand: list[Any] = [None] * num_operands
        for position, gradient in zip(differentiable, gradients):
            by_operand[position] = gradient
        return by_operand

    class Backward(_Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *operands, ctx.output_mask, value_mask = inputs
            ctx.save_for_backward(*operands[: 1 + num_tensors], value_mask)
            ctx.level_sizes, ctx.num_points, *ctx.others = operands[1 + num_tensors : -1]
            return _below_autograd(backward_op, inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            grad_output, *inputs, value_mask = ctx.saved_tensors
            operands = [*inputs, ctx.level_sizes, ctx.num_points, *ctx.others, value_mask]

            def masked(gradients: Any) -> Any:
                return tuple(grad for grad, flag in zip(gradients, ctx.output_mask) if flag)

            def gradients(grad: Tensor, *varied: Tensor) -> Any:
                def output(*varied: Tensor) -> Tensor:
                    now = list(operands)
                    for position, tensor in zip(differentiable, varied):
                        now[position] = tensor
                    return signature.composite(record(*now))

                return masked(torch.func.vjp(output, *varied)[1](grad))

            varied = [operands[position] for position in differentiable]
            pull_back = torch.func.vjp(gradients, grad_output, *varied)[1]
            grad_grad_output, *grad_operands = pull_back(masked(grads))
            return (grad_grad_output, *spread(grad_operands), None, None)

    class Forward(_Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.save_for_backward(*inputs[:num_tensors], inputs[-1])
            # apart, or Dynamo takes symbolic sizes for constants
            ctx.level_sizes, ctx.num_points, *ctx.others = inputs[num_tensors:-1]
            return _below_autograd(forward_op, inputs)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            *tensors, value_mask = ctx.saved_tensors
            inputs = (
                grad_output,
                *tensors,
                ctx.level_sizes,
                ctx.num_points,
                *ctx.others,
                torch.are_deterministic_algorithms_enabled(),
                [ctx.needs_input_grad[position] for position in differentiable],
                value_mask,
            )
            if is_compiling() or _is_observed():
                gradients = backward_op(*inputs)
            elif is_grad_enabled():  # with create_graph=True
                gradients = Backward.apply(*inputs)  # type: ignore[attr-defined]
            else:
                with _AutoDispatchBelowAutograd():
                    gradients = eager_backward(*inputs)
            return tuple(spread(gradients))

    def call(*inputs: Any) -> Tensor:
        """The composite under forward-mode AD, the bare operator where nothing is recorded, else
        the Function; through the dispatcher where the call is compiled or observed.
        """
        output: Tensor
        if forward_ad._current_level >= 0:
            output = signature.composite(record(*inputs))
        elif is_compiling():
            output = forward_op(*inputs)
        elif _is_observed():
            output = _observed(forward_op, record, inputs)
        elif is_grad_enabled() and any(map(_requires_grad, of_differentiable(inputs))):
            output = Forward.apply(*inputs)  # type: ignore[attr-defined]
        else:
            with _AutoDispatchBelowAutograd():
                output = eager_forward(*inputs)
        return output

    def check(*inputs: Any) -> None:
        # Compared, a symbolic size would be a constant of the graph; kernels check when they run.
        if not is_compiling():
            check_operands(record(*inputs))

    def fake_forward(*inputs: Any) -> Tensor:
        check(*inputs)
        value, points = inputs[0], inputs[3]
        B, _, M, D = value.shape
        output: Tensor = value.new_empty(B, points.shape[1], M * D)
        return output

    def fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
        operands, _, output_mask = of_backward(record, inputs)
        check(*operands)
        if not is_compiling():
            check_gradient(grad_output, operands, output_mask, len(differentiable))
        return tuple(
            inputs[i].new_empty(inputs[i].shape) if flag else None
            for i, flag in zip(differentiable, output_mask)
        )

    for op, fake, function, first in (
        (forward_op, fake_forward, Forward, 0),
        (backward_op, fake_backward, Backward, 1),
    ):
        qualified = op._schema.name
        batched = {*range(first), *(first + position for position in signature.batched)}
        batched.add(len(op._schema.arguments) - 1)  # value_mask
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, _over_batch(op, batched), lib=LIBRARY)
        LIBRARY.impl(op._schema.name, _differentiable(op, function), "Autograd")
    return call, backward_op


def _is_observed() -> bool:
    """Whether an eager call is traced, transformed by ``torch.func`` or seen by a dispatch mode.

    Other calls skip the operator's Autograd kernel, which is written in Python.
    """
    return _is_tracing() or _are_functorch_transforms_active() or _len_torch_dispatch_stack() > 0


def _observed(op: Operator, record: type[AnyOperands], inputs: tuple[Any, ...]) -> Tensor:
    """A call for which ``_is_observed`` holds."""
    if _is_tracing():
        onnx = sys.modules.get("torch.onnx")  # imported by an export
        if onnx is not None and onnx.is_in_onnx_export():
            return standard(record(*inputs))
    flops.register()
    return op(*inputs)


def _differentiable(op: Any, function: Any) -> Callable[..., Any]:
    """The operator under the Autograd key, for callers of ``torch.ops``: with gradients."""
    count = len(op._schema.arguments)

    def under_autograd(*inputs: Any) -> Any:
        inputs += (None,) * (count - len(inputs))  # the dispatcher drops a value_mask of None
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{op}: no forward-mode derivative; the functions of deform_attn have one"
            )
        if is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            with enable_single_level_autograd_function():
                return function.apply(*inputs)
        with _AutoDispatchBelowAutograd():
            return op(*inputs)

    return under_autograd


def _below_autograd(op: Any, inputs: tuple[Any, ...]) -> Any:
    """The operator without this level's autograd; ``torch.func`` may have levels below it.

    A Function's forward runs with gradients disabled, which must not reach those.
    """
    if _are_functorch_transforms_active():
        with torch.enable_grad(), _AutoDispatchBelowAutograd():
            return op(*inputs)
    with _AutoDispatchBelowAutograd():
        return op(*inputs)


def _over_batch(op: Any, batched: set[int]) -> Callable[..., Any]:
    """A vmap rule that folds the mapped dimension into the batch of the inputs at ``batched``."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        folded = list(inputs)
        for i, (x, dim) in enumerate(zip(inputs, in_dims)):
            if x is None:
                continue
            if i in batched:
                mapped = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
                folded[i] = mapped.expand(info.batch_size, *mapped.shape[1:]).flatten(0, 1)
            elif isinstance(x, Tensor) and dim is not None:
                raise NotImplementedError(
                    "vmap over spatial_shapes or level_start_index: the levels of a call are one "
                    "for the whole batch; map over its other tensors"
                )
        outputs = op(*folded)

        def unfold(x: Tensor) -> Tensor:
            return x.view(info.batch_size, x.shape[0] // info.batch_size, *x.shape[1:])

        if isinstance(outputs, Tensor):
            return unfold(outputs), 0
        return (
            tuple(None if x is None else unfold(x) for x in outputs),
            tuple(None if x is None else 0 for x in outputs),
        )

    return rule


call_discrete, _ = define("ms_deform_attn_discrete", DISCRETE)
LIBRARY.impl("ms_deform_attn_discrete", composite.discrete_forward, "CompositeExplicitAutograd")
LIBRARY.impl(
    "ms_deform_attn_discrete_backward", composite.discrete_backward, "CompositeExplicitAutograd"
)
