"""The schema of MSDA, and what every backend gets from it: autograd of any order, vmap, tracing.

A backend is a pair of PyTorch operators with one schema, forward and backward. They are defined
here, in Python, so that the package imports and falls back where no binary was built; C++ only
registers kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from deform_attn.formula import gather
from deform_attn.inputs import check_gradient, check_operands

__all__ = ["LIBRARY", "Operator", "define"]

# level_sizes is [h0, w0, h1, w1, ...] as host numbers; it or spatial_shapes is given, never both.
# Without level_start_index the levels follow one another. Locations have six dimensions, or five
# and num_points.
INPUTS = (
    "Tensor value, Tensor? spatial_shapes, Tensor? level_start_index, Tensor sampling_locations, "
    "Tensor attention_weights, SymInt[]? level_sizes, int[]? num_points"
)
LIBRARY = Library("deform_attn", "DEF")

Operator = Callable[..., Tensor]


def define(name: str) -> Operator:
    """Define ``deform_attn::<name>`` and its backward; return the differentiable call of the pair.

    The call takes the seven inputs of the schema by position.
    """
    LIBRARY.define(f"{name}({INPUTS}) -> Tensor")
    LIBRARY.define(
        f"{name}_backward(Tensor grad_output, {INPUTS}, bool deterministic) "
        "-> (Tensor, Tensor, Tensor)"
    )
    forward_op = getattr(torch.ops.deform_attn, name).default
    backward_op = getattr(torch.ops.deform_attn, f"{name}_backward").default

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return backward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *tensors, ctx.level_sizes, ctx.num_points, _ = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            grad_output, value, shapes, starts, locations, weights = ctx.saved_tensors

            def gradients(grad: Tensor, *inputs: Tensor) -> Any:
                def formula(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
                    return gather(
                        value, shapes, starts, locations, weights, ctx.level_sizes, ctx.num_points
                    )

                return torch.func.vjp(formula, *inputs)[1](grad)

            pull = torch.func.vjp(gradients, grad_output, value, locations, weights)[1]
            of_output, of_value, of_locations, of_weights = pull(grads)
            return (
                *(of_output, of_value, None, None, of_locations, of_weights),
                *(None, None, None),
            )

    class Forward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward_op(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            *tensors, ctx.level_sizes, ctx.num_points = inputs
            ctx.save_for_backward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad_output: Tensor) -> Any:
            # Dynamo cannot trace a Function inside another; the operator has one of its own
            gradients = backward_op if torch.compiler.is_compiling() else Backward.apply
            of_value, of_locations, of_weights = gradients(
                grad_output,
                *ctx.saved_tensors,
                *(ctx.level_sizes, ctx.num_points),
                torch.are_deterministic_algorithms_enabled(),
            )
            return of_value, None, None, of_locations, of_weights, None, None

    def call(
        value: Tensor,
        spatial_shapes: Tensor | None,
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        level_sizes: list[int] | None,
        num_points: list[int] | None,
    ) -> Tensor:
        inputs = (
            *(value, spatial_shapes, level_start_index, sampling_locations, attention_weights),
            *(level_sizes, num_points),
        )
        output: Tensor
        if forward_ad._current_level >= 0:
            output = gather(*inputs)
        elif torch.is_grad_enabled() and (
            value.requires_grad
            or sampling_locations.requires_grad
            or attention_weights.requires_grad
        ):
            output = Forward.apply(*inputs)  # type: ignore[no-untyped-call]
        elif torch.compiler.is_compiling():
            output = forward_op(*inputs)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # nothing to record: saves 3 us a call
                output = forward_op(*inputs)
        return output

    qualified = f"deform_attn::{name}"
    torch.library.register_fake(qualified, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(f"{qualified}_backward", _fake_backward, lib=LIBRARY)
    torch.library.register_vmap(qualified, _over_batch(forward_op, 0), lib=LIBRARY)
    torch.library.register_vmap(f"{qualified}_backward", _over_batch(backward_op, 1), lib=LIBRARY)
    LIBRARY.impl(name, _differentiable(forward_op, Forward), "Autograd")
    LIBRARY.impl(f"{name}_backward", _differentiable(backward_op, Backward), "Autograd")
    return call


def _differentiable(op: Any, function: Any) -> Callable[..., Any]:
    """The operator under the Autograd key: who calls ``torch.ops`` directly loses no gradient."""

    def under_autograd(*inputs: Any) -> Any:
        if forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"{op}: no forward-mode derivative; deform_attn.ms_deform_attn has one"
            )
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return under_autograd


def _fake_forward(*inputs: Any) -> Tensor:
    check_operands(*inputs)
    value, sampling_locations = inputs[0], inputs[3]
    B, _, M, D = value.shape
    output: Tensor = value.new_empty(B, sampling_locations.shape[1], M * D)
    return output


def _fake_backward(grad_output: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_operands(*inputs[:-1])
    value, locations, weights = inputs[0], inputs[3], inputs[4]
    check_gradient(grad_output, value, locations)
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _over_batch(op: Any, first: int) -> Callable[..., Any]:
    """A vmap rule that folds the mapped dimension into the batch.

    ``first`` is the position of value; grad_output, if there is one, comes before it.
    """
    per_batch = {*range(first), first, first + 3, first + 4}

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        folded = list(inputs)
        for i, (x, dim) in enumerate(zip(inputs, in_dims)):
            if i in per_batch:
                mapped = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
                folded[i] = mapped.expand(info.batch_size, *mapped.shape[1:]).flatten(0, 1)
            elif isinstance(x, Tensor) and dim is not None:
                raise NotImplementedError(
                    "vmap over spatial_shapes or level_start_index: the levels of a call are one "
                    "for the whole batch; map over value, sampling_locations or attention_weights"
                )
        outputs = op(*folded)

        def unfold(x: Tensor) -> Tensor:
            return x.view(info.batch_size, x.shape[0] // info.batch_size, *x.shape[1:])

        if isinstance(outputs, Tensor):
            return unfold(outputs), 0
        return tuple(unfold(x) for x in outputs), (0,) * len(outputs)

    return rule
