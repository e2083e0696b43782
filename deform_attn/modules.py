"""Attention modules: the projections around the operator.

``_Attention`` is the implementation. Each public class has the argument names, initial weights,
state dict and mask convention of the modules that it replaces.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError

from deform_attn.checks import (
    LevelNames,
    check_choice,
    check_counts,
    check_flag,
    check_integer,
    check_keywords,
    check_level_sizes,
    check_levels,
    check_method,
    check_positive,
    check_scale,
    check_sizes,
    check_spatial_shapes,
    check_tensor,
    check_threshold,
    explained,
)
from deform_attn.functional import ms_deform_attn_fused
from deform_attn.levels import Levels, readable

__all__ = ["MSDeformAttn", "MSDeformableAttention", "MultiScaleDeformableAttention"]


# query, reference_points, value, spatial_shapes, level_start_index, mask
_Arguments: TypeAlias = tuple[Tensor, Tensor, Tensor, Levels, Tensor | None, Tensor | None]


class _Attention(nn.Module):
    """Projections with the official initial weights, then the fused operator.

    A module's ``forward`` calls ``_attend``, which calls ``ms_deform_attn_fused`` with
    ``sampling_offsets(query)`` and ``attention_weights(query)`` as offsets and logits.
    """

    names, mask_name = LevelNames(), "key_padding_mask"
    mask_keeps = False  # True: a mask is True for pixels; False: it is True for padding
    layout = ""  # added to messages where query and value are not [batch, rows, channels]
    offset_scale, method, official_clamp = 0.5, "default", False

    def __init__(
        self, channels: int, heads: int, points: Sequence[int], value_channels: int | None
    ) -> None:
        """``points`` per level; without ``value_channels`` no value and output projection."""
        super().__init__()
        self._channels, self._heads, self._points = channels, heads, list(points)
        self._head_dim = (channels if value_channels is None else value_channels) // heads
        total = heads * sum(points)
        # created in the official order, so that a seed gives the same weights
        self.sampling_offsets = nn.Linear(channels, total * 2)
        self.attention_weights = nn.Linear(channels, total)
        self.value_proj: nn.Module = nn.Identity()
        self.output_proj: nn.Module = nn.Identity()
        if value_channels is not None:
            self.value_proj = nn.Linear(channels, value_channels)
            self.output_proj = nn.Linear(value_channels, channels)
        # on each layer, so that they replace nn.Linear's even if a model is reset layer by layer
        _reset_by(self.sampling_offsets, partial(_reset_offsets, heads=heads, points=self._points))
        _reset_by(self.attention_weights, _reset_to_zero)
        _reset_by(self.value_proj, _reset_projection)
        _reset_by(self.output_proj, _reset_projection)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the official initial weights (again), for example after ``to_empty``.

        In the beginning head ``m`` samples in direction ``2 pi m / num_heads``, its k-th point k
        pixels away, with equal weights; projections are Xavier uniform. Deformable DETR
        (arXiv 2010.04159), appendix. Parameters may be ``DTensor`` (FSDP2). The method of each
        layer does its part, so a loop over ``modules()`` in any order gives the same.
        """
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def _reset_parameters(self) -> None:
        """The name in the official modules, which models call."""
        self.reset_parameters()

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``."""
        raise TypeError(
            f"{type(self).__name__}: torch.jit.script cannot compile it, as TorchScript has no "
            "keyword arguments of several types; use torch.jit.trace, torch.export.export or "
            "torch.compile. Scripted code can call torch.ops.deform_attn.ms_deform_attn"
        )

    def _attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Levels,
        level_start_index: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """``[batch, queries, channels]``; query and value are batch first."""
        arguments = query, reference_points, value, spatial_shapes, level_start_index, mask
        return explained(self._attention, self._check, arguments)

    def _attention(self, arguments: _Arguments) -> Tensor:
        query, reference_points, value, spatial_shapes, level_start_index, mask = arguments
        value = self.value_proj(value)
        padding = None if mask is None else self._padding(mask, value)
        B, Q, _ = query.shape
        counts, uniform = self._points, len(set(self._points)) == 1
        points = (B, Q, self._heads, *((len(counts), counts[0]) if uniform else (sum(counts),)))
        output: Tensor = self.output_proj(
            ms_deform_attn_fused(
                value.view(*value.shape[:2], self._heads, self._head_dim),
                spatial_shapes,
                level_start_index,
                reference_points,
                self.sampling_offsets(query).view(*points, 2),
                self.attention_weights(query).view(points),
                num_points=None if uniform else counts,
                offset_scale=self.offset_scale,
                method=self.method,
                official_clamp=self.official_clamp,
                value_mask=padding,  # not before value_proj, which adds its bias to zeros
            )
        )
        return output

    def _check(self, arguments: _Arguments) -> None:
        """Check what the operator does not check or names differently; called after a failure."""
        query, reference_points, value, spatial_shapes, level_start_index, mask = arguments
        channels, levels = self._channels, len(self._points)
        value_name = self.names.value
        tensors = {value_name: value, "query": query, "reference_points": reference_points}
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
        if mask is not None:
            check_tensor(self.mask_name, mask)
        if value.dim() != 3 or value.shape[-1] != channels:
            raise ValueError(
                f"{value_name}: expected shape [batch, rows, {channels}]{self.layout}, "
                f"got {tuple(value.shape)}"
            )
        B = value.shape[0]
        if query.dim() != 3 or query.shape[0] != B or query.shape[-1] != channels:
            raise ValueError(
                f"query: expected shape [{B}, queries, {channels}]{self.layout}, "
                f"got {tuple(query.shape)}"
            )
        if (given := check_spatial_shapes(spatial_shapes, value, self.names)) != levels:
            raise ValueError(
                f"{self.names.spatial_shapes}: expected {levels} levels, the number that the "
                f"module was created with, got {given}"
            )
        check_levels(value, spatial_shapes, level_start_index, self.names)
        check_level_sizes(value.shape[1], spatial_shapes, level_start_index, self.names)
        # offloaded parameters are on "meta" until they are used; quantized layers have none
        devices = {parameter.device for parameter in self.parameters()} - {torch.device("meta")}
        for name, tensor in tensors.items():
            if devices and tensor.device not in devices:
                expected = " or ".join(map(str, devices))
                raise ValueError(
                    f"{name}: expected on the module's device ({expected}), got {tensor.device}"
                )
        dtypes = {x.dtype for x in self.parameters() if x.is_floating_point()}
        for name in (value_name, "query"):
            dtype = tensors[name].dtype
            if torch.is_autocast_enabled(value.device.type) and dtype.is_floating_point:
                continue
            if dtypes and dtype not in dtypes:
                expected = " or ".join(map(str, dtypes))
                raise ValueError(f"{name}: expected the module's dtype ({expected}), got {dtype}")

    def _padding(self, mask: Tensor, value: Tensor) -> Tensor:
        """The mask, checked: True for padding."""
        meaning = "True for pixels" if self.mask_keeps else "True for padding"
        shape = value.shape[:2]
        if mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(
                f"{self.mask_name}: expected a bool tensor of shape {list(shape)}, {meaning}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        if mask.device != value.device:
            raise ValueError(
                f"{self.mask_name}: expected on {self.names.value}'s device ({value.device}), "
                f"got {mask.device}"
            )
        padding = ~mask if self.mask_keeps else mask
        if readable(padding) and padding.numel() > 0 and padding.all():
            raise ValueError(
                f"{self.mask_name}: expected {meaning}, got a mask that leaves no pixel; if it has "
                f"the opposite meaning, pass ~{self.mask_name}"
            )
        return padding


def _reset_by(layer: nn.Module, reset: Callable[[nn.Linear], None]) -> None:
    """Give a linear layer (nothing else) another ``reset_parameters``; it stays an nn.Linear."""
    if isinstance(layer, nn.Linear):
        layer.reset_parameters = partial(reset, layer)  # type: ignore[method-assign]


def _reset_offsets(layer: nn.Linear, heads: int, points: Sequence[int]) -> None:
    new: dict[str, Any] = {"dtype": torch.float32, "device": layer.bias.device}
    angles = torch.arange(heads, **new) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)  # [M, 2]
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.cat([torch.arange(1, count + 1, **new) for count in points])
    offsets = (directions[:, None] * steps[:, None]).flatten()
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(_like(layer.bias, offsets))


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """The values, distributed as the parameter is: the same on every rank."""
    if not hasattr(parameter, "device_mesh"):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        values, parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _reset_to_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _reset_projection(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


class MSDeformAttn(_Attention):
    """Multi-scale deformable attention with the interface of Deformable DETR.

    For each head and level, a query predicts ``n_points`` offsets from its reference point, and
    their weights (a softmax over the points of all levels). Deformable DETR (arXiv 2010.04159),
    section 4.1. Argument names, initial weights and state dict are those of its official module,
    which DINO, Mask2Former, LW-DETR and RF-DETR use too.

    Args:
        d_model: channels of query, input and output.
        n_levels: number of feature maps.
        n_heads: number of heads; divides ``d_model``.
        n_points: points that a query samples in each level and head.

    Raises:
        TypeError: a size is no integer.
        ValueError: a size is less than 1, or ``d_model`` is not a multiple of ``n_heads``.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn
        >>> attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> shapes = torch.tensor([[8, 6], [4, 3]])
        >>> start = torch.tensor([0, 48])
        >>> features = torch.rand(2, 60, 32)
        >>> query, reference = torch.rand(2, 5, 32), torch.rand(2, 5, 2, 2)
        >>> attention(query, reference, features, shapes, start).shape
        torch.Size([2, 5, 32])
    """

    names = LevelNames("input_flatten", "input_spatial_shapes", "input_level_start_index")
    mask_name = "input_padding_mask"

    def __init__(
        self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4
    ) -> None:
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        d_model, n_levels, n_heads, n_points = check_sizes("d_model", "n_heads", **sizes)
        super().__init__(d_model, n_heads, [n_points] * n_levels, d_model)
        self.im2col_step = 64  # set by callers of the official module; not used here
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Levels,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query to a few points of every feature map.

        Args:
            query: ``[batch, queries, d_model]``.
            reference_points: ``[batch, queries, n_levels, 2]``, the point ``(x, y)`` as fractions
                of the map, ``[batch, queries, n_levels, 4]``, a box ``(cx, cy, w, h)``, or
                ``[batch, queries, n_levels, 5]``, a rotated box ``(cx, cy, w, h, angle)`` (see
                :func:`deform_attn.ms_deform_attn_fused`). The unit of an offset is a pixel of the
                level for points, and ``(w, h) / 2 / n_points`` for boxes. Dimension 2 may be 1:
                the same for all levels.
            input_flatten: feature maps, one row per pixel: ``[batch, rows, d_model]``.
            input_spatial_shapes: ``(height, width)`` of each level: ``[n_levels, 2]`` or a list.
            input_level_start_index: row of each level's first pixel, ``[n_levels]``.
            input_padding_mask: ``[batch, rows]``, True for padding; these rows read as zero.

        Returns:
            ``[batch, queries, d_model]``.

        Raises:
            ValueError: a shape, device or mask does not fit; the message names the argument.
        """
        return self._attend(
            query,
            reference_points,
            input_flatten,
            input_spatial_shapes,
            input_level_start_index,
            input_padding_mask,
        )


class MultiScaleDeformableAttention(_Attention):
    """Multi-scale deformable attention with the interface of mmcv and detrex.

    Unlike :class:`MSDeformAttn` it applies dropout to the output and adds the query (or
    ``identity``). Argument names, initial weights and state dict are those of the modules of mmcv
    and detrex.

    Args:
        embed_dims: channels of query and output.
        num_heads: number of heads; divides ``embed_dims``.
        num_levels: number of feature maps.
        num_points: points that a query samples in each level and head.
        im2col_step: accepted and ignored; mmcv's kernels need it.
        dropout: dropout probability of the output.
        batch_first: query and value are ``[batch, rows, channels]``, not ``[rows, batch, ...]``.
        norm_cfg: accepted and ignored, as in mmcv.
        init_cfg: accepted and ignored, as in mmcv.
        value_proj_ratio: channels of the projected value over ``embed_dims``.
        embed_dim: detrex's name for ``embed_dims``.
        img2col_step: detrex's name for ``im2col_step``.

    Raises:
        TypeError: an argument has another type.
        ValueError: a size is less than 1, a number is out of its range, or a number of channels is
            not a multiple of ``num_heads``.

    Example:
        >>> import torch
        >>> from deform_attn import MultiScaleDeformableAttention
        >>> attention = MultiScaleDeformableAttention(32, 4, 2, 3, batch_first=True)
        >>> features, query = torch.rand(2, 60, 32), torch.rand(2, 5, 32)
        >>> attention(
        ...     query,
        ...     value=features,
        ...     reference_points=torch.rand(2, 5, 2, 2),
        ...     spatial_shapes=torch.tensor([[8, 6], [4, 3]]),
        ...     level_start_index=torch.tensor([0, 48]),
        ... ).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        embed_dims: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        im2col_step: int = 64,
        dropout: float = 0.1,
        batch_first: bool = False,
        norm_cfg: Any = None,
        init_cfg: Any = None,
        value_proj_ratio: float = 1.0,
        *,
        embed_dim: int | None = None,
        img2col_step: int | None = None,
    ) -> None:
        if embed_dim is not None:
            check_integer("embed_dim", embed_dim, 1)
            if embed_dims not in (256, embed_dim):  # 256: not given
                raise ValueError(f"embed_dim: expected embed_dims ({embed_dims}), got {embed_dim}")
            embed_dims = embed_dim
        check_integer("embed_dims", embed_dims, 1)
        check_positive("value_proj_ratio", value_proj_ratio)
        check_threshold("dropout", dropout)
        check_flag("batch_first", batch_first)
        value_channels = int(embed_dims * value_proj_ratio)
        sizes = {
            "embed_dims": embed_dims,
            "num_heads": num_heads,
            "num_levels": num_levels,
            "num_points": num_points,
            "embed_dims * value_proj_ratio": value_channels,
        }
        for channels in ("embed_dims", "embed_dims * value_proj_ratio"):
            checked = check_sizes(channels, "num_heads", **sizes)
        embed_dims, num_heads, num_levels, num_points, value_channels = checked
        super().__init__(embed_dims, num_heads, [num_points] * num_levels, value_channels)
        self.im2col_step = im2col_step if img2col_step is None else img2col_step
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.dropout = nn.Dropout(dropout)
        self.batch_first = bool(batch_first)
        self.norm_cfg = norm_cfg
        self.init_cfg = init_cfg
        if not batch_first:
            self.layout = " (after [rows, batch, ...] was transposed, as batch_first is False)"

    def init_weights(self) -> None:
        """The name of :meth:`reset_parameters` in mmcv, whose runners call it."""
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Levels | None = None,
        level_start_index: Tensor | None = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``dropout(attention) + identity``.

        Args:
            query: ``[queries, batch, embed_dims]``, or batch first.
            key: unused, as in mmcv.
            value: feature maps, one row per pixel: ``[rows, batch, embed_dims]``, or batch first;
                None: ``query``.
            identity: added to the output; None: ``query``. ``query_pos`` is not part of it.
            query_pos: added to the query before the projections; shape of ``query``.
            key_padding_mask: ``[batch, rows]``, True for padding; these rows read as zero.
            reference_points: ``[batch, queries, num_levels, 2, 4 or 5]`` as in
                :class:`MSDeformAttn`.
            spatial_shapes: ``(height, width)`` of each level: ``[num_levels, 2]`` or a list.
            level_start_index: row of each level's first pixel, ``[num_levels]``.
            residual: deprecated name of ``identity``.
            kwargs: ignored; mmcv's layers pass additional arguments.

        Returns:
            Shape of ``query``.

        Raises:
            TypeError: ``reference_points`` or ``spatial_shapes`` is missing, or an additional
                argument is one of those that are not given, misspelt.
            ValueError: a shape, device or mask does not fit; the message names the argument.
        """
        try:
            if kwargs and not torch.compiler.is_compiling():
                given = locals()
                check_keywords(kwargs, tuple(name for name in _FORWARD if given[name] is None))
        except TraceError:
            check_tensor("query", query)
            raise
        if reference_points is None or spatial_shapes is None:
            missing = "reference_points" if reference_points is None else "spatial_shapes"
            raise TypeError(f"{missing}: expected a tensor, got None")
        if residual is not None:
            warnings.warn(
                "residual: deprecated, the argument is called identity",
                DeprecationWarning,
                stacklevel=2,
            )
            identity = residual if identity is None else identity
        value = query if value is None else value
        identity = query if identity is None else identity
        attended = query
        try:
            if query_pos is not None:
                attended = query + query_pos
            if not self.batch_first:
                attended, value = attended.transpose(0, 1), value.transpose(0, 1)
            output = self._attend(
                attended,
                reference_points,
                value,
                spatial_shapes,
                level_start_index,
                key_padding_mask,
            )
            if not self.batch_first:
                output = output.transpose(0, 1)
            dropped: Tensor = self.dropout(output)
            return dropped + identity
        except (AttributeError, RuntimeError, TypeError):
            self._check_added(query, {"query_pos": query_pos, "identity": identity}, value)
            raise

    def _check_added(self, query: Tensor, added: dict[str, Tensor | None], value: Tensor) -> None:
        """Check what ``_attend`` does not get; called after a failure."""
        check_tensor("query", query)
        check_tensor("value", value)
        for name, tensor in added.items():
            if tensor is None:
                continue
            check_tensor(name, tensor)
            try:
                fits = torch.broadcast_shapes(tensor.shape, query.shape) == query.shape
            except RuntimeError:
                fits = False
            if not fits or tensor.device != query.device:
                raise ValueError(
                    f"{name}: expected query's shape {tuple(query.shape)} on {query.device}, got "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )


# Arguments of MultiScaleDeformableAttention.forward.
_FORWARD = tuple(inspect.signature(MultiScaleDeformableAttention.forward).parameters)

VARIANTS = ("rtdetr", "rtdetrv2", "dfine")


class MSDeformableAttention(_Attention):
    """Multi-scale deformable attention with the interface of RT-DETR, RT-DETRv2, D-FINE and DEIM.

    The unit of an offset is ``(w, h) * offset_scale / points`` of the reference box, where
    ``points`` is the number of points in the level. RT-DETR (arXiv 2304.08069), RT-DETRv2 (arXiv
    2407.17140), D-FINE (arXiv 2410.13842). Argument names, initial weights and state dict are those
    of their official modules.

    Args:
        embed_dim: channels of query, value and output.
        num_heads: number of heads; divides ``embed_dim``.
        num_levels: number of feature maps.
        num_points: points that a query samples in each level and head; a list where they differ.
        method: ``"default"`` (bilinear), or ``"discrete"``: each point reads one pixel, and the
            offsets are not trained (see :func:`deform_attn.ms_deform_attn`).
        offset_scale: fraction of a box's side that ``points`` offsets of 1 add up to.
        variant: ``"rtdetr"``; ``"rtdetrv2"``, which also has the buffer ``num_points_scale``; or
            ``"dfine"`` (D-FINE and DEIM), which has the buffer but no value and output projection.
        official_clamp: for ``"discrete"``, see :func:`deform_attn.ms_deform_attn`.

    Raises:
        TypeError: an argument has another type.
        ValueError: a size is less than 1, ``embed_dim`` is not a multiple of ``num_heads``, the
            length of ``num_points`` is not ``num_levels``, or ``method`` or ``variant`` is unknown.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformableAttention
        >>> attention = MSDeformableAttention(32, 4, num_levels=2, num_points=[3, 6])
        >>> query, box, memory = torch.rand(2, 5, 32), torch.rand(2, 5, 1, 4), torch.rand(2, 60, 32)
        >>> attention(query, box, memory, [(8, 6), (4, 3)]).shape
        torch.Size([2, 5, 32])
    """

    names = LevelNames(spatial_shapes="value_spatial_shapes")
    mask_name, mask_keeps = "value_mask", True

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        method: str = "default",
        offset_scale: float = 0.5,
        *,
        variant: str = "rtdetrv2",
        official_clamp: bool = False,
    ) -> None:
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_levels": num_levels}
        embed_dim, num_heads, num_levels = check_sizes("embed_dim", "num_heads", **sizes)
        counts = check_counts(num_points, num_levels)
        check_method(method, official_clamp)
        check_scale(offset_scale)
        check_choice("variant", variant, VARIANTS)
        super().__init__(embed_dim, num_heads, counts, None if variant == "dfine" else embed_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.num_points_list = counts
        self.method = method
        self.offset_scale = offset_scale
        self.variant = variant
        self.official_clamp = bool(official_clamp)
        if variant != "rtdetr":
            self.register_buffer("num_points_scale", self._portions())
        if method == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def reset_parameters(self) -> None:
        """As in the other modules; the buffer ``num_points_scale`` is set, too."""
        super().reset_parameters()
        scale = getattr(self, "num_points_scale", None)
        if scale is not None:
            scale.copy_(self._portions(scale.device))

    def _portions(self, device: torch.device | None = None) -> Tensor:
        """1 / points of its level for each point: what the buffer ``num_points_scale`` holds."""
        counts = self.num_points_list
        return torch.cat([torch.full((n,), 1 / max(n, 1), device=device) for n in counts])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """The buffer must agree with ``num_points``, from which locations are computed."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        name, expected = prefix + "num_points_scale", self._portions(torch.device("cpu"))
        scale, errors = state_dict.get(name), others[-1]
        if (
            not isinstance(scale, Tensor)
            or scale.shape != expected.shape
            or not readable(scale.cpu())
        ):
            return
        if not torch.allclose(scale.double().cpu(), expected.double(), rtol=1e-2):
            errors.append(
                f"{name}: expected 1 / points for num_points {self.num_points_list}, "
                f"got {scale.tolist()}"
            )

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor | Sequence[Tensor],
        value_spatial_shapes: Levels,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from every query to a few points of every feature map.

        Args:
            query: ``[batch, queries, embed_dim]``.
            reference_points: ``[batch, queries, 1 or num_levels, 4]``, a box ``(cx, cy, w, h)`` as
                fractions of the map; ``[..., 5]``, a rotated box ``(cx, cy, w, h, angle)`` (see
                :func:`deform_attn.ms_deform_attn_fused`); or ``[..., 2]``, a point ``(x, y)``: the
                unit of an offset is then a pixel of the level.
            value: feature maps, one row per pixel: ``[batch, rows, embed_dim]``. For ``"dfine"``
                also the official form, a list with ``[batch, num_heads, embed_dim / num_heads,
                height * width]`` of each level, which is copied to the first form.
            value_spatial_shapes: ``(height, width)`` of each level: a list or ``[num_levels, 2]``.
            value_mask: ``[batch, rows]``, True for pixels, False for padding, which reads as zero.

        Returns:
            ``[batch, queries, embed_dim]``.

        Raises:
            ValueError: a shape, device or mask does not fit; the message names the argument.
        """
        if not isinstance(value, Tensor):
            listed = value, value_spatial_shapes
            value = explained(self._joined, self._check_listed, listed)
        return self._attend(query, reference_points, value, value_spatial_shapes, None, value_mask)

    def _check_listed(self, arguments: tuple[Any, Any]) -> None:
        """Check the types of the official form; called after a failure."""
        levels, spatial_shapes = arguments
        if isinstance(levels, Proxy):
            check_tensor("value", levels)
        if not isinstance(levels, list | tuple) or not levels:
            raise TypeError(
                "value: expected a tensor, or a list of tensors, one for each level, "
                f"got {type(levels).__name__} {str(levels)[:80]}"
            )
        for level in levels:
            check_tensor("value", level)
        check_spatial_shapes(spatial_shapes, levels[0], self.names)

    def _joined(self, arguments: tuple[Sequence[Tensor], Levels]) -> Tensor:
        """``[batch, rows, embed_dim]`` from a list of ``[batch, heads, head_dim, rows]``."""
        levels, spatial_shapes = arguments
        shape = [self.num_heads, self.embed_dim // self.num_heads]
        listed = not isinstance(spatial_shapes, Tensor) and not torch.compiler.is_compiling()
        for i, level in enumerate(levels):
            rows = level.shape[-1]
            if listed and i < len(spatial_shapes):
                rows = math.prod(spatial_shapes[i])
            if level.dim() != 4 or [*level.shape[1:]] != [*shape, rows]:
                raise ValueError(
                    f"value: expected shape [batch, {shape[0]}, {shape[1]}, {rows}] for level {i} "
                    f"(height * width is {rows}), got {tuple(level.shape)}"
                )
        return torch.cat([level.permute(0, 3, 1, 2) for level in levels], 1).flatten(2)
