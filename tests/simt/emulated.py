"""The emulated kernels as functions of torch tensors.

Emulated   one build of the kernels: forward and backward
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.simt import build

TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ALGORITHMS = ("baseline", "scatter", "tiles", "fixed", "gather", "planned", "deterministic")
NAN = float("nan")
PROCESSORS = 132  # multiprocessors of the emulated GPU


@dataclass(frozen=True)
class Emulated:
    """The kernels with atomics on `atomic_floats` floats at a time (4 as since sm_90, 1 before)."""

    atomic_floats: int = 4
    processors: int = PROCESSORS
    long_offsets: bool = False  # int64 offsets where int32 suffices

    counting: bool = False  # a build that counts what the kernels access

    @property
    def module(self) -> Any:
        floats = f"-DATOMIC_FLOATS={self.atomic_floats}"
        if self.counting:
            # the hooks of the thread sanitizer, without its library
            flags = ("-DSIMT_TRAFFIC", "-fsanitize=thread", "-fno-tree-sra")
            name = f"counting_{self.atomic_floats}"
            return build.module(name, floats, *flags, link=("-shared",))
        return build.module(f"kernels_{self.atomic_floats}", floats)

    def set_order(self, order: str, seed: int = 0) -> None:
        """In which order warps and lanes run: forward, reversed or shuffled."""
        self.module.set_order(order, seed)

    def forward(
        self,
        value: Tensor,  # [B, S, M, D]
        spatial_shapes: Tensor | Sequence[tuple[int, int]],  # a tensor is read by the kernel
        level_start_index: Tensor | None,
        sampling_locations: Tensor,  # [B, Q, M, L, P, 2] or [B, Q, M, K, 2]
        attention_weights: Tensor,
        num_points: Sequence[int] | None = None,
        baseline: bool = False,
        output: Tensor | None = None,  # to be written to
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """The output, [B, Q, M * D]."""
        call = _Call(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            num_points,
            value_mask=value_mask,
        )
        B, _, M, D = value.shape
        if output is None:
            output = value.new_full((B, sampling_locations.shape[1], M * D), NAN)
        self.module.forward(
            call.fields, output.data_ptr(), baseline, self.processors, self.long_offsets
        )
        return output

    def backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points: Sequence[int] | None = None,
        algorithm: str = "planned",
        targets: tuple[Tensor, ...] | None = None,  # from targets()
        output_mask: tuple[bool, bool] = (True, True),  # as there
        value_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of value, sampling_locations and attention_weights."""
        assert algorithm in ALGORITHMS
        call = _Call(
            value,
            spatial_shapes,
            level_start_index,
            sampling_locations,
            attention_weights,
            num_points,
            value_mask=value_mask,
        )
        if targets is None:
            targets = self.targets(
                *(value, spatial_shapes, level_start_index),
                *(sampling_locations, attention_weights, num_points),
                algorithm=algorithm,
                output_mask=output_mask,
            )
        self._backward(call, grad_output, targets, algorithm)
        return targets[0], targets[1], targets[2]

    def targets(
        self, *arguments: Any, algorithm: str, output_mask: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor, ...]:
        """The tensors that the kernels write to, as before the call, in the order of Outputs.

        The arguments are those of a call. First the gradients of value, locations (offsets),
        weights (logits) and reference points, then working memory. `output_mask`: whether those of
        value and of reference points are requested; else they are empty.
        """
        call = _Call(*arguments)
        _, zeros, sizes = self._plan(call, algorithm, *output_mask)
        value, locations, weights, reference = call.tensors
        sums, *others = sizes
        nothing = torch.empty(0)
        grad_value = torch.zeros_like(value) if zeros else torch.full_like(value, NAN)
        return (
            grad_value if output_mask[0] else nothing,
            torch.full_like(locations, NAN),
            torch.full_like(weights, NAN),
            nothing if reference is None or not output_mask[1] else torch.full_like(reference, NAN),
            torch.zeros(sums, dtype=torch.uint8),
            *(torch.full((size,), 255, dtype=torch.uint8) for size in others),
        )

    def _backward(
        self, call: _Call, grad_output: Tensor, targets: tuple[Tensor, ...], algorithm: str
    ) -> None:
        self.module.backward(
            *(call.fields, grad_output.data_ptr(), tuple(t.data_ptr() for t in targets), algorithm),
            *(self.processors, self.long_offsets),
        )

    def fused_forward(
        self,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        reference_points: Tensor,  # [B, Q, L or 1, 2, 4 or 5]
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        num_points: Sequence[int] | None,
        offset_scale: float,
        output: Tensor | None = None,  # to be written to
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """The output, [B, Q, M * D]."""
        call = _Call(
            *(value, spatial_shapes, level_start_index, sampling_offsets, attention_logits),
            *(num_points, reference_points, offset_scale, value_mask),
        )
        B, Q = reference_points.shape[:2]
        if output is None:
            output = value.new_full((B, Q, value.shape[2] * value.shape[3]), NAN)
        self.module.forward(
            call.fields, output.data_ptr(), False, self.processors, self.long_offsets
        )
        return output

    def fused_backward(
        self,
        grad_output: Tensor,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        reference_points: Tensor,
        sampling_offsets: Tensor,
        attention_logits: Tensor,
        num_points: Sequence[int] | None,
        offset_scale: float,
        algorithm: str = "planned",
        targets: tuple[Tensor, ...] | None = None,  # from targets()
        output_mask: tuple[bool, bool] = (True, True),  # as there
        value_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of value, reference_points, sampling_offsets and attention_logits."""
        arguments = (
            *(value, spatial_shapes, level_start_index, sampling_offsets, attention_logits),
            *(num_points, reference_points, offset_scale),
        )
        if targets is None:
            targets = self.targets(*arguments, algorithm=algorithm, output_mask=output_mask)
        self._backward(_Call(*arguments, value_mask), grad_output, targets, algorithm)
        return targets[0], targets[3], targets[1], targets[2]

    def chosen_algorithm(self, *arguments: Any, deterministic: bool = False) -> str:
        """The algorithm that choose_backward takes for a call."""
        name = "deterministic" if deterministic else "planned"
        return self._plan(_Call(*arguments), name, True, True)[0]

    def _plan(self, call: _Call, algorithm: str, value: bool, reference: bool) -> Any:
        """The algorithm, whether grad_value must be zeros before, and bytes of working memory."""
        return self.module.plan(
            *(call.fields, algorithm, self.processors, self.long_offsets, value, reference)
        )


class _Call:
    """The arguments as the module takes them, and the tensors that must outlive the call."""

    def __init__(
        self,
        value: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points: Sequence[int] | None = None,
        reference_points: Tensor | None = None,  # with it, offsets and logits come before
        offset_scale: float = 0.0,
        value_mask: Tensor | None = None,
    ) -> None:
        for tensor in (value, sampling_locations, attention_weights):
            assert tensor.is_contiguous()
        assert value_mask is None or value_mask.is_contiguous()
        self.tensors = (value, sampling_locations, attention_weights, reference_points)
        levels = len(spatial_shapes)
        counts = num_points
        if counts is None:
            counts = [sampling_locations.shape[4]] * levels
        on_device = isinstance(spatial_shapes, Tensor)
        self.kept = [
            tensor.long().contiguous() if isinstance(tensor, Tensor) else None
            for tensor in (spatial_shapes, level_start_index)
        ]
        acc_dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        fused = reference_points is not None
        assert sampling_locations.dtype == (attention_weights.dtype if fused else acc_dtype)
        assert attention_weights.dtype in (acc_dtype, value.dtype)
        assert not fused or (
            reference_points.dtype == acc_dtype and reference_points.is_contiguous()
        )
        B, S, M, D = value.shape
        self.fields = {
            "batch": B,
            "rows": S,
            "queries": sampling_locations.shape[1],
            "heads": M,
            "head_dim": D,
            "levels": levels,
            "points": sum(counts),
            "shapes": self.kept[0].data_ptr() if on_device else 0,
            "starts": self.kept[1].data_ptr() if self.kept[1] is not None else 0,
            "sizes": [] if on_device else [(int(h), int(w)) for h, w in spatial_shapes],
            "first_point": [0, *itertools.accumulate(counts)],
            "type": TYPES[value.dtype],
            "weights_are_acc": attention_weights.dtype == acc_dtype,
            "value": value.data_ptr(),
            "locations": sampling_locations.data_ptr(),
            "weights": attention_weights.data_ptr(),
            "reference": reference_points.data_ptr() if fused else 0,
            "reference_levels": reference_points.shape[2] if fused else 0,
            "reference_size": reference_points.shape[3] if fused else 0,
            "mask": 0 if value_mask is None else value_mask.data_ptr(),
            "offset_scale": offset_scale,
        }
