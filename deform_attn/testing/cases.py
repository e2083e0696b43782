"""Small hostile calls: sizes, dtypes, metadata, memory layout and sampling locations.

- `OpInputs`: the arguments of one call of ``ms_deform_attn``
- `FusedInputs`: of one call of ``ms_deform_attn_fused``
- `Dtypes`: the dtypes of its three floating inputs (``DTYPES``, ``MIXED_DTYPES``)
- `Case`: how to make a call; ``CASES`` is the table that every kernel is tested with
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpInputs:
    """The arguments of one call of `deform_attn.ms_deform_attn`."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: Any  # int tensor [L, 2] or list of (height, width)
    level_start_index: Any  # int tensor [L], list or None
    sampling_locations: Tensor  # [B, Q, M, L, P, 2] or [B, Q, M, K, 2]
    attention_weights: Tensor
    num_points: list[int] | None = None
    value_mask: Tensor | None = None  # [B, S] bool, True for padding

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """value, sampling_locations, attention_weights."""
        return self.value, self.sampling_locations, self.attention_weights

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.sampling_locations.shape[1]

    @property
    def points_per_level(self) -> list[int]:
        """Sampling points of each level."""
        if self.num_points is not None:
            return list(self.num_points)
        return [self.sampling_locations.shape[4]] * len(self.spatial_shapes)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of `deform_attn.ms_deform_attn`, without the keywords."""
        return (self.value, self.spatial_shapes, self.level_start_index, *self.tensors[1:])

    def replace(self, **changes: Any) -> OpInputs:
        """The same call with other fields."""
        return dataclasses.replace(self, **changes)

    def replace_tensors(self, value: Tensor, locations: Tensor, weights: Tensor) -> OpInputs:
        """The same call with other `tensors`."""
        return self.replace(value=value, sampling_locations=locations, attention_weights=weights)

    def to(self, device: str) -> OpInputs:
        """The same call on another device."""
        return _moved(self, device)

    def leaves(self) -> OpInputs:
        """The same call with tensors that require a gradient; strides are kept."""
        return self.replace_tensors(*(t.detach().requires_grad_() for t in self.tensors))


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of value, sampling_locations and attention_weights."""

    name: str
    value: torch.dtype
    locations: torch.dtype
    weights: torch.dtype

    @property
    def native(self) -> bool:
        """Whether the kernels read these dtypes; all others are cast before."""
        acc = acc_dtype(self.value)
        return self.locations is acc and self.weights in (self.value, acc)


@dataclass(frozen=True)
class FusedInputs:
    """The arguments of one call of `deform_attn.ms_deform_attn_fused`."""

    value: Tensor  # [B, S, M, D]
    spatial_shapes: list[tuple[int, int]]  # (height, width) of each level
    reference_points: Tensor  # [B, Q, L or 1, 2, 4 or 5]
    sampling_offsets: Tensor  # [B, Q, M, L, P, 2] or [B, Q, M, K, 2]
    attention_logits: Tensor
    num_points: list[int] | None = None
    offset_scale: float = 0.7
    value_mask: Tensor | None = None  # [B, S] bool, True for padding

    @classmethod
    def draw(
        cls,
        dtype: torch.dtype,
        *,
        size: int = 2,
        num_points: list[int] | None = None,
        batch: int = 2,
        queries: int = 9,
        heads: int = 3,
        head_dim: int = 20,
        masked: bool = False,
        device: str = "cpu",
    ) -> FusedInputs:
        """Random inputs on three levels; the same numbers for every device.

        Args:
            dtype: of value, offsets and logits; reference points are float32, or float64 with it.
            size: 2 for reference points, 4 for boxes, 5 for rotated boxes.
            num_points: points of each level; None: four in each.
            batch: B.
            queries: Q.
            heads: M.
            head_dim: D.
            masked: with a value_mask of a third of the rows, which hold NaN.
            device: where the tensors are.
        """
        shapes = [(7, 5), (3, 4), (1, 1)]
        generator = torch.Generator().manual_seed(size + head_dim)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        points = [sum(num_points)] if num_points else [len(shapes), 4]
        rows = sum(height * width for height, width in shapes)
        reference = uniform((batch, queries, len(shapes), size), generator, 0, 1)
        reference[..., 4:] *= 2 * math.pi  # the angle of a rotated box
        value, mask = normal(batch, rows, heads, head_dim), None
        if masked:
            mask = torch.rand((batch, rows), generator=generator) < 1 / 3
            value[mask] = NAN
            mask = mask.to(device)
        return cls(
            value.to(device, dtype),
            shapes,
            reference.to(device, acc_dtype(dtype)),
            normal(batch, queries, heads, *points, 2).to(device, dtype),
            (3 * normal(batch, queries, heads, *points)).to(device, dtype),
            num_points,
            value_mask=mask,
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """value, reference_points, sampling_offsets, attention_logits."""
        return self.value, self.reference_points, self.sampling_offsets, self.attention_logits

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.reference_points.shape[1]

    @property
    def points_per_level(self) -> list[int]:
        """Sampling points of each level."""
        if self.num_points is not None:
            return list(self.num_points)
        return [self.sampling_offsets.shape[4]] * len(self.spatial_shapes)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of `deform_attn.ms_deform_attn_fused`, without the keywords."""
        return (self.value, self.spatial_shapes, None, *self.tensors[1:])

    def map(self, change: Callable[[Tensor], Tensor]) -> FusedInputs:
        """The same call with `change` applied to its tensors."""
        value, reference, offsets, logits = (change(tensor) for tensor in self.tensors)
        return dataclasses.replace(
            self,
            value=value,
            reference_points=reference,
            sampling_offsets=offsets,
            attention_logits=logits,
        )

    def to(self, device: str) -> FusedInputs:
        """The same call on another device."""
        return _moved(self, device)

    def double(self) -> FusedInputs:
        """The same numbers in float64."""
        return self.map(Tensor.double)

    def leaves(self) -> FusedInputs:
        """The same call with tensors that require a gradient."""
        return self.map(lambda tensor: tensor.detach().requires_grad_())


AnyInputs = TypeVar("AnyInputs", OpInputs, FusedInputs)


def _moved(inputs: AnyInputs, device: str) -> AnyInputs:
    moved: dict[str, Any] = {
        field.name: tensor.to(device)
        for field in dataclasses.fields(inputs)
        if isinstance(tensor := getattr(inputs, field.name), Tensor)
    }
    return dataclasses.replace(inputs, **moved)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the sums: float64 for float64, otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = {
    dtypes.name: dtypes
    for dtypes in (
        Dtypes("f64", f64, f64, f64),
        Dtypes("f32", f32, f32, f32),
        Dtypes("f16", f16, f32, f16),
        Dtypes("bf16", bf16, f32, bf16),
    )
}
# Kernels also read weights in the dtype of the sums; all other combinations are cast.
MIXED_DTYPES = {
    dtypes.name: dtypes
    for dtypes in (
        Dtypes("f16_weights_f32", f16, f32, f32),
        Dtypes("bf16_weights_f32", bf16, f32, f32),
        Dtypes("bf16_weights_f16", bf16, f32, f16),
        Dtypes("bf16_throughout", bf16, bf16, bf16),
        Dtypes("f32_locations_bf16", f32, bf16, f32),
        Dtypes("f32_locations_f64", f32, f64, f32),
        Dtypes("f32_weights_f16", f32, f32, f16),
        Dtypes("f32_weights_f64", f32, f32, f64),
        Dtypes("f64_locations_f32", f64, f32, f64),
        Dtypes("f64_weights_f32", f64, f64, f32),
    )
}


def uniform(shape: Sequence[int], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Float64 numbers between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=f64)


def around_the_map(shape: Sequence[int], generator: torch.Generator, case: Case) -> Tensor:
    """Locations on the map and up to a fifth of it outside."""
    return uniform(shape, generator, -0.2, 1.2)


def far_outside(shape: Sequence[int], generator: torch.Generator, case: Case) -> Tensor:
    """Half the coordinates on the map, the others up to 1e37 maps away."""
    distance = 10.0 ** torch.randint(0, 38, shape, generator=generator)
    far = torch.rand(shape, generator=generator) < 0.5
    return torch.where(
        far, uniform(shape, generator, -1, 1) * distance, uniform(shape, generator, 0, 1)
    )


def chosen_from(*numbers: float) -> Callable[..., Tensor]:
    """Locations whose coordinates are drawn independently from a few numbers."""

    def draw(shape: Sequence[int], generator: torch.Generator, case: Case) -> Tensor:
        return torch.tensor(numbers, dtype=f64)[
            torch.randint(len(numbers), tuple(shape), generator=generator)
        ]

    return draw


def on_pixels(shape: Sequence[int], generator: torch.Generator, case: Case) -> Tensor:
    """Pixel centres of the first level; exact in every dtype if its sides are powers of two."""
    height, width = case.levels[0]
    x = (torch.randint(-1, width + 1, shape[:-1], generator=generator) + 0.5) / width
    y = (torch.randint(-1, height + 1, shape[:-1], generator=generator) + 0.5) / height
    return torch.stack((x, y), -1).double()


def same_point(shape: Sequence[int], generator: torch.Generator, case: Case) -> Tensor:
    """All queries at one place: all of them add to the gradient of the same four pixels."""
    return uniform((2,), generator, 0.3, 0.6).expand(tuple(shape))


NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """How to make a call: sizes, metadata, memory layout and sampling locations."""

    name: str
    levels: tuple[tuple[int, int], ...] = ((5, 7), (3, 4), (2, 1))
    batch: int = 2
    queries: int = 5
    heads: int = 2
    head_dim: int = 8
    points: int | tuple[int, ...] = 2  # a tuple: the flat layout and num_points
    starts: tuple[int, ...] | None = None  # None: one level behind the other
    rows: int | None = None  # of value; None: as many as the levels need
    metadata: str = "int64"  # or int32, list, shapes_only, list_only (without level_start_index)
    layout: str = "plain"  # how the three tensors lie in memory: see `lay_out`
    locations: Callable[..., Tensor] = around_the_map
    masked: float = 0  # fraction of the rows that value_mask masks, which hold NaN; 0: no mask

    @property
    def work(self) -> int:
        """The number of sampled points: the time of an interpreted kernel grows with it."""
        points = (
            self.points if isinstance(self.points, tuple) else (self.points,) * len(self.levels)
        )
        return self.batch * self.queries * self.heads * sum(points)

    def smaller(self, work: int, *, queries_at_once: bool = False) -> Case:
        """The case with fewer queries, heads and batches, so that `work` is at most this.

        Args:
            work: the largest number of sampled points.
            queries_at_once: all queries take the time of one, as in an interpreted kernel: they
                are kept, and `work` is that of a query.
        """
        case = dataclasses.replace(self, queries=min(self.queries, 1)) if queries_at_once else self
        for name, least in (
            ("queries", 2),
            ("heads", 2),
            ("batch", 1),
            ("queries", 1),
            ("heads", 1),
        ):
            while case.work > work and getattr(case, name) > least:
                case = dataclasses.replace(case, **{name: getattr(case, name) - 1})
        return dataclasses.replace(case, queries=self.queries) if queries_at_once else case

    @property
    def level_starts(self) -> tuple[int, ...]:
        """level_start_index."""
        if self.starts is not None:
            return self.starts
        ends = [sum(h * w for h, w in self.levels[: i + 1]) for i in range(len(self.levels))]
        return (0, *ends[:-1])

    def make(self, dtypes: Dtypes, device: str = "cpu") -> OpInputs:
        """The inputs, rounded to the dtypes; the same numbers for every device."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        B, Q, M, D = self.batch, self.queries, self.heads, self.head_dim
        starts = self.level_starts
        ends = [start + h * w for start, (h, w) in zip(starts, self.levels)]
        S = max(ends) if self.rows is None else self.rows

        value = uniform((B, S, M, D), generator, -1, 1)
        used = torch.zeros(S, dtype=torch.bool)
        for start, end in zip(starts, ends):
            used[start:end] = True
        value[:, ~used] = NAN  # rows that belong to no level must not be read
        mask = None
        if self.masked:
            mask = torch.rand((B, S), generator=generator) < self.masked
            value[mask] = NAN

        if isinstance(self.points, tuple):
            point_shape: tuple[int, ...] = (sum(self.points),)
        else:
            point_shape = (len(self.levels), self.points)
        locations = self.locations((B, Q, M, *point_shape, 2), generator, self)
        weights = uniform((B, Q, M, *point_shape), generator, -0.25, 1)

        shapes: Any = [tuple(pair) for pair in self.levels]
        first_rows: Any = list(starts)
        if self.metadata.endswith("_only"):
            first_rows = None
        if not self.metadata.startswith("list"):
            integer = torch.int32 if self.metadata == "int32" else torch.int64
            shapes = torch.tensor(shapes, dtype=integer, device=device)
            if first_rows is not None:
                first_rows = torch.tensor(first_rows, dtype=integer, device=device)
        return OpInputs(
            lay_out(value.to(device, dtypes.value), self.layout),
            shapes,
            first_rows,
            lay_out(locations.to(device, dtypes.locations), self.layout),
            lay_out(weights.to(device, dtypes.weights), self.layout),
            list(self.points) if isinstance(self.points, tuple) else None,
            None if mask is None else lay_out(mask.to(device), self.layout),
        )


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout, with NaN (or 10**9) around them."""
    if layout == "plain" or tensor.dim() == 0:
        return tensor
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    wall = NAN if tensor.is_floating_point() else 10**9
    if layout == "strided":  # every second element of each dimension
        wide = tensor.new_full([2 * n for n in tensor.shape], wall)
        view = wide[(slice(None, None, 2),) * tensor.dim()]
        return view.copy_(tensor)
    if layout == "offset":  # contiguous and misaligned by one element
        wide = tensor.new_full((tensor.numel() + 130,), wall)
        view = wide[65 : 65 + tensor.numel()].view(tensor.shape)
        return view.copy_(tensor)
    if layout == "expanded":  # stride 0 along the batch
        return tensor[:1].expand_as(tensor)
    raise AssertionError(layout)


_ALL = (
    Case("non_square"),
    Case("one_level", levels=((6, 4),)),
    Case("one_pixel_level", levels=((1, 1), (4, 3), (1, 1))),
    Case("wide_and_tall_levels", levels=((1, 90), (90, 1))),
    Case("no_batch", batch=0),
    Case("no_queries", queries=0),
    Case("no_points", points=0),
    Case("one_of_each", levels=((1, 1),), batch=1, queries=1, heads=1, head_dim=1, points=1),
    Case("more_points_than_levels", levels=((4, 5), (2, 3)), points=5),
    Case("more_levels_than_points", levels=((4, 5),) * 5, points=1),
    Case("many_points", levels=((4, 5), (2, 3)), points=23, queries=2),
    Case("many_levels", levels=((2, 3),) * 40, points=1, queries=2),
    Case("many_listed_levels", levels=((2, 3),) * 40, points=1, queries=2, metadata="list"),
    Case("odd_heads", heads=7, head_dim=5),
    *(
        Case(f"head_dim_{d}", head_dim=d, queries=3, batch=1)
        for d in (1, 4, 8, 16, 30, 32, 64, 71, 128, 256)
    ),
    Case("far_outside", locations=far_outside),
    Case("on_borders", locations=chosen_from(0.0, 1.0, 0.5, -0.25, 1.25), levels=((4, 2), (2, 8))),
    Case("on_pixels", locations=on_pixels, levels=((4, 8), (8, 4))),
    Case("not_finite", locations=chosen_from(NAN, INF, -INF, 0.41, 0.73), queries=20),
    Case("nothing_on_the_map", locations=chosen_from(NAN, INF, -INF, 7.0, -7.0)),
    Case("same_point", locations=same_point, queries=40, batch=1),
    Case("transposed", layout="transposed"),
    Case("strided", layout="strided"),
    Case("offset", layout="offset"),
    Case("offset_head_dim_32", layout="offset", head_dim=32, queries=2),
    Case("expanded", layout="expanded"),
    Case("overlapping_levels", levels=((4, 5), (5, 4), (2, 3)), starts=(0, 0, 7)),
    Case("levels_in_reverse", levels=((2, 3), (4, 5)), starts=(20, 0)),
    Case("gaps_between_levels", levels=((4, 5), (2, 3)), starts=(3, 30), rows=50),
    Case("rows_behind_levels", levels=((4, 5), (2, 3)), rows=40, metadata="shapes_only"),
    Case("listed_points", points=(3, 6, 3)),
    Case("listed_points_equal", points=(2, 2, 2)),
    Case("level_without_points", points=(0, 2, 1)),
    Case("listed_points_all_zero", points=(0, 0, 0)),
    Case("starts_omitted", metadata="shapes_only"),
    Case("list_metadata", metadata="list"),
    Case("list_metadata_starts_omitted", metadata="list_only", points=(3, 6, 3)),
    Case("int32_metadata", metadata="int32"),
    Case("masked", masked=0.3),
    Case("masked_one_head_dim_32", masked=0.3, heads=1, head_dim=32, points=(3, 6, 3)),
    Case("masked_throughout", masked=1),
    Case("masked_strided", masked=0.5, layout="strided", head_dim=3),
    Case("masked_queries_are_pixels", masked=0.2, queries=49),
    Case(
        "shared_among_threads",
        levels=((9, 11), (4, 5)),
        queries=24,
        heads=8,
        head_dim=32,
        points=4,
    ),
)
CASES = {case.name: case for case in _ALL}
assert len(CASES) == len(_ALL)
