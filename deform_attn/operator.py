"""The schemas of MSDA, and what every backend gets from them: autograd, vmap, tracing.

A backend implements pairs of PyTorch operators, forward and backward. They are defined here, in
Python, so that the package imports and falls back where no binary was built; C++ only registers
kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from deform_attn import composite
from deform_attn.checks import check_fused_operands, check_gradient, check_operands

__all__ = ["ATTENTION", "FUSED", "LIBRARY", "Operator", "Signature", "define"]

LIBRARY = Library("deform_attn", "DEF")

Operator = Callable[..., Tensor]


@dataclass(frozen=True)
class Signature:
    """What an operator takes: its tensors first, then host numbers."""

    tensors: tuple[str, ...]  # the first is value, the second and third are the levels
    numbers: tuple[str, ...]
    check: Callable[..., None]  # of all inputs
    formula: Operator  # the same in plain PyTorch, differentiable any number of times

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the inputs that have gradients: all tensors but the levels."""
        return (0, *range(3, len(self.tensors)))

    def with_gradients(self, gradients: Any) -> tuple[Any, ...]:
        """One gradient an input: None for levels and numbers."""
        spread: list[Any] = [None] * (len(self.tensors) + len(self.numbers))
        for position, gradient in zip(self.differentiable, gradients):
            spread[position] = gradient
        return tuple(spread)


# level_sizes is [h0, w0, h1, w1, ...] as host numbers; it or spatial_shapes is given, never both.
# Without level_start_index the levels follow one another. Locations have six dimensions, or five
# and num_points.
_LEVELS = ("Tensor value", "Tensor? spatial_shapes", "Tensor? level_start_index")
_COUNTS = ("SymInt[]? level_sizes", "int[]? num_points")
ATTENTION = Signature(
    (*_LEVELS, "Tensor sampling_locations", "Tensor attention_weights"),
    _COUNTS,
    check_operands,
    composite.attention,
)
FUSED = Signature(
    (
        *_LEVELS,
        "Tensor reference_points",
        "Tensor sampling_offsets",
        "Tensor attention_logits",
    ),
    (*_COUNTS, "float offset_scale"),
    check_fused_operands,
    composite.fused,
)


def define(name: str, signature: Signature) -> tuple[Operator, Callable[..., Any]]:
    """Define ``deform_attn::<name>`` and its backward.

    The backward takes a flag for each gradient, ``wanted``; those that are not are None.
    Returns the differentiable call of the pair, which takes the inputs of the signature by
    position, and the backward operator for who has an autograd of his own.
    """
    inputs = ", ".join((*signature.tensors, *signature.numbers))
    outputs = ", ".join(["Tensor"] * len(signature.differentiable))
    LIBRARY.define(f"{name}({inputs}) -> Tensor")
    LIBRARY.define(
        f"{name}_backward(Tensor grad_output, {inputs}, bool deterministic, bool[] wanted) "
        f"-> ({outputs})"
    )
    forward_op = getattr(torch.ops.deform_attn, name).default
    backward_op = getattr(torch.ops.deform_attn, f"{name}_backward").default
    tensors, differentiable = len(signature.tensors), signature.differentiable

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return backward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[: 1 + tensors])
            ctx.level_sizes, ctx.num_points, *ctx.others = inputs[1 + tensors : -2]
            ctx.wanted = inputs[-1]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            grad_output = ctx.saved_tensors[0]
            operands = [*ctx.saved_tensors[1:], ctx.level_sizes, ctx.num_points, *ctx.others]

            def those_wanted(gradients: Any) -> Any:
                return tuple(grad for grad, wanted in zip(gradients, ctx.wanted) if wanted)

            def gradients(grad: Tensor, *varied: Tensor) -> Any:
                def output(*varied: Tensor) -> Tensor:
                    now = list(operands)
                    for position, tensor in zip(differentiable, varied):
                        now[position] = tensor
                    return signature.formula(*now)

                return those_wanted(torch.func.vjp(output, *varied)[1](grad))

            varied = [operands[position] for position in differentiable]
            pull_back = torch.func.vjp(gradients, grad_output, *varied)[1]
            of_output, *of_inputs = pull_back(those_wanted(grads))
            return (of_output, *signature.with_gradients(of_inputs), None, None)

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[:tensors])
            # apart, or Dynamo takes symbolic sizes for constants
            ctx.level_sizes, ctx.num_points, *ctx.others = inputs[tensors:]

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            # Dynamo cannot trace a Function inside another; the operator has one of its own
            gradients = backward_op if torch.compiler.is_compiling() else Backward.apply
            deterministic = torch.are_deterministic_algorithms_enabled()
            numbers = (ctx.level_sizes, ctx.num_points, *ctx.others)
            wanted = [ctx.needs_input_grad[position] for position in differentiable]
            return signature.with_gradients(
                gradients(grad_output, *ctx.saved_tensors, *numbers, deterministic, wanted)
            )

    def call(*inputs: Any) -> Tensor:
        output: Tensor
        if forward_ad._current_level >= 0:
            output = signature.formula(*inputs)
        elif torch.is_grad_enabled() and any(inputs[i].requires_grad for i in differentiable):
            output = Forward.apply(*inputs)  # type: ignore[no-untyped-call]
        elif torch.compiler.is_compiling():
            output = forward_op(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # nothing to record: saves 3 us a call
                output = forward_op(*inputs)
        return output

    def check(*inputs: Any) -> None:
        # Compared, a symbolic size would be a constant of the graph; kernels check when they run.
        if not torch.compiler.is_compiling():
            signature.check(*inputs)

    def fake_forward(*inputs: Any) -> Tensor:
        check(*inputs)
        value, points = inputs[0], inputs[3]
        B, _, M, D = value.shape
        output: Tensor = value.new_empty(B, points.shape[1], M * D)
        return output

    def fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor | None, ...]:
        wanted = inputs[-1]
        check(*inputs[:-2])
        if not torch.compiler.is_compiling():
            check_gradient(grad_output, inputs[0], inputs[3], wanted, len(differentiable))
        return tuple(
            inputs[i].new_empty(inputs[i].shape) if flag else None
            for i, flag in zip(differentiable, wanted)
        )

    for op, fake, function, first in (
        (forward_op, fake_forward, Forward, 0),
        (backward_op, fake_backward, Backward, 1),
    ):
        qualified = op._schema.name
        batched = {*range(first), *(first + position for position in differentiable)}
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_vmap(qualified, _over_batch(op, batched), lib=LIBRARY)
        LIBRARY.impl(op._schema.name, _differentiable(op, function), "Autograd")
    return call, backward_op


def _differentiable(op: Any, function: Any) -> Callable[..., Any]:
    """The operator under the Autograd key: who calls ``torch.ops`` directly loses no gradient."""

    def under_autograd(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{op}: no forward-mode derivative; the functions of deform_attn have one"
            )
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return under_autograd


def _over_batch(op: Any, batched: set[int]) -> Callable[..., Any]:
    """A vmap rule that folds the mapped dimension into the batch of the inputs at ``batched``."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        folded = list(inputs)
        for i, (x, dim) in enumerate(zip(inputs, in_dims)):
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
