"""Where a layer looks: its sampling points and weights, recorded while a model runs, as a picture.

The operator is watched at PyTorch's dispatcher. One watcher sees every way to it (this package's
modules and functions, accelerated models, old repositories' extension calls), its schema names its
arguments, and it costs nothing while nobody records: no test on the way to a kernel, no global that
a compiled graph would have to guard. (Discrete sampling is no operator but a function, wrapped for
as long.) What no operator knows, reference points and the padding of images, is an argument of the
modules round it: hooks read it by the name that the field gives it. By name too is understood a
stock module that is given locations and weights but never calls the operator.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, overload
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from deform_attn import functional
from deform_attn.composite import discrete, fused_points
from deform_attn.levels import points_per_level

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Recording", "Recordings", "choose_query", "draw", "figure", "record"]


@dataclass(frozen=True)
class Recording:
    """What one call of one layer sampled. Tensors are copies on the CPU, in float32.

    ``K = sum(num_points)`` is the number of points of a query and head, level after level.

    Attributes:
        layer: name of the layer in the module that was recorded.
        spatial_shapes: ``(height, width)`` of each level.
        num_points: number of points in each level.
        sampling_locations: ``[batch, queries, num_heads, K, 2]``, ``(x, y)`` as fractions of the
            image with its padding.
        attention_weights: ``[batch, queries, num_heads, K]``.
        reference_points: ``[batch, queries, num_levels, 2]``, points ``(x, y)``, or
            ``[batch, queries, num_levels, 4]``, boxes ``(cx, cy, w, h)``, as fractions of the image
            with its padding; None where no module round the operator took ``reference_points``.
        valid_ratios: ``[batch, num_levels, 2]``, the portion ``(x, y)`` of each map that is image,
            not padding; None where no module round the operator took ``valid_ratios``. Encoders and
            decoders do: record those, or a whole model, to have them.
    """

    layer: str
    spatial_shapes: tuple[tuple[int, int], ...]
    num_points: tuple[int, ...]
    sampling_locations: Tensor
    attention_weights: Tensor
    reference_points: Tensor | None
    valid_ratios: Tensor | None


class Recordings(Sequence[Recording]):
    """The calls of a model's layers, by position or by the name of the layer (its last call)."""

    def __init__(self) -> None:
        self._calls: list[Recording] = []

    @property
    def layers(self) -> list[str]:
        """Name of the layer of each call."""
        return [call.layer for call in self._calls]

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, which: int | str) -> Recording: ...

    @overload
    def __getitem__(self, which: slice) -> Sequence[Recording]: ...

    def __getitem__(self, which: int | str | slice) -> Recording | Sequence[Recording]:
        if not self._calls:
            raise LookupError("nothing recorded yet: call the module inside the `with` block")
        if not isinstance(which, str):
            return self._calls[which]
        for call in reversed(self._calls):
            if call.layer == which:
                return call
        raise LookupError(f"layer: expected one of {', '.join(self.layers)}, got {which!r}")


@contextmanager
def record(module: nn.Module) -> Iterator[Recordings]:
    """Record what the deformable attention inside a module samples, while the block runs.

    Results and gradients stay what they are. Compiled modules run eagerly inside the block.

    Args:
        module: a layer, or a model with any number of them: modules of this package and whatever
            else calls its functions, models that it accelerated, and modules of others with a
            ``forward`` that takes ``sampling_locations`` and ``attention_weights`` (transformers).

    Yields:
        The calls in their order: ``seen[-1]``, ``seen["decoder.layers.5.cross_attn"]``.

    Raises:
        RuntimeError: nothing was recorded when the block ends; the message says why.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn, viz
        >>> layer = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> query, reference = torch.rand(1, 5, 32), torch.rand(1, 5, 2, 2)
        >>> with viz.record(layer) as seen:
        ...     output = layer(query, reference, torch.rand(1, 60, 32), [(8, 6), (4, 3)])
        >>> seen.layers, seen[-1].sampling_locations.shape
        (['MSDeformAttn'], torch.Size([1, 5, 4, 6, 2]))
    """
    watch = _Watch()
    with ExitStack() as stack:
        for name, child in module.named_modules():
            if child is not module and _NAMES.isdisjoint(_parameters(child.forward)):
                continue
            path = [part for part in name.split(".") if part != "_orig_mod"]  # torch.compile's
            layer = ".".join(path) or type(child).__name__
            enter = child.register_forward_pre_hook(partial(watch.enter, layer), with_kwargs=True)
            leave = child.register_forward_hook(watch.leave, always_call=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to ask would import it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(patch.object(functional, "discrete", watch.of_function(discrete)))
        stack.enter_context(watch)
        yield watch.seen
    if not watch.entered:
        raise RuntimeError(
            f"nothing recorded: {type(module).__name__} was not called inside the `with` block"
        )
    if not watch.seen:
        raise RuntimeError(
            f"nothing recorded: no deformable attention was seen in {type(module).__name__}. A "
            "stock function that does not go through deform_attn is seen once the model does, as "
            "after deform_attn.integrations.transformers.accelerate(model)"
        )


# Modules are understood by the names of their arguments. One that has these has an operator's.
_OPERANDS = {"value_spatial_shapes", "sampling_locations", "attention_weights"}
_NAMES = {"sampling_locations", "reference_points", "valid_ratios"}


class _Watch(TorchDispatchMode):
    """Sees calls of the operators, and the arguments of the modules that they are inside of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Recordings()
        self.entered = False
        self._around: list[tuple[str, dict[str, Any]]] = []  # names and arguments, outermost first

    def enter(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook."""
        self.entered = True
        self._around.append((layer, dict(zip(_parameters(module.forward), args)) | kwargs))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook; called after an exception too, then without an output."""
        given = self._around[-1][1]
        if given.keys() >= _OPERANDS and output is not None:
            self._add(given)
        self._around.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace == "deform_attn":
            names = [argument.name for argument in func._schema.arguments]
            self._see(dict(zip(names, args)) | kwargs)
        return output

    def of_function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, its calls seen as those of an operator are."""

        def seen(*args: Any) -> Tensor:
            output = function(*args)
            self._see(dict(zip(_parameters(function), args)))
            return output

        return seen

    def _see(self, given: dict[str, Any]) -> None:
        """Add a call inside of the module, not backward; what has the operands adds itself."""
        if not self._around or "grad_output" in given:
            return
        if not self._around[-1][1].keys() >= _OPERANDS:
            self._add(given)

    def _add(self, given: dict[str, Any]) -> None:
        """Record one attention from the arguments of its operator or module."""
        shapes = _spatial_shapes(given)
        num_points = given.get("num_points")
        if "sampling_offsets" in given:
            locations, weights = fused_points(
                *(shapes, given["reference_points"]),
                *(given["sampling_offsets"], given["attention_logits"]),
                *(num_points, given["offset_scale"]),
            )
        else:
            locations, weights = given["sampling_locations"], given["attention_weights"]
        B, Q, M = locations.shape[:3]
        L = len(shapes)
        reference = self._nearest("reference_points", given, (B, Q), L, (2, 4))
        names = [layer for layer, names in self._around if "reference_points" in names]
        self.seen._calls.append(
            Recording(
                layer=(names or [self._around[-1][0]])[-1],
                spatial_shapes=shapes,
                num_points=tuple(points_per_level(locations, L, num_points)),
                sampling_locations=_copy(locations).reshape(B, Q, M, -1, 2),
                attention_weights=_copy(weights).reshape(B, Q, M, -1),
                reference_points=reference,
                valid_ratios=self._nearest("valid_ratios", given, (B,), L, (2,)),
            )
        )

    def _nearest(
        self,
        name: str,
        given: dict[str, Any],
        leading: tuple[int, ...],
        num_levels: int,
        widths: tuple[int, ...],
    ) -> Tensor | None:
        """The innermost argument of that name, where it is ``[*leading, num_levels, width]``."""
        for arguments in (given, *(names for _, names in reversed(self._around))):
            x = arguments.get(name)
            if x is None:
                continue
            fits = isinstance(x, Tensor) and x.shape[:-2] == leading and x.shape[-1] in widths
            if fits and x.shape[-2] in (1, num_levels):
                return _copy(x).expand(*leading, num_levels, -1)
            return None
        return None


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _spatial_shapes(given: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    if given.get("level_sizes") is not None:
        sides = iter(given["level_sizes"])
        return tuple(zip(sides, sides))
    shapes = given["spatial_shapes" if "spatial_shapes" in given else "value_spatial_shapes"]
    return tuple((int(height), int(width)) for height, width in shapes)


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)


def choose_query(
    recording: Recording,
    image: Any,
    *,
    pixel: tuple[float, float] | None = None,
    box: tuple[float, float, float, float] | None = None,
    batch: int = 0,
    padded: bool | None = None,
) -> int:
    """The query that looks from a pixel, or at a box, of the image.

    Args:
        recording: what :func:`record` saw, with reference points.
        image: as in :func:`draw`; only its size is used.
        pixel: ``(x, y)``: the query with the nearest reference point is chosen.
        box: ``(x0, y0, x1, y1)`` in pixels: the query whose reference box overlaps most with it
            (intersection over union), or whose reference point is nearest to its centre.
        batch: position of the image in the batch.
        padded: as in :func:`draw`.

    Returns:
        Position of the query.

    Raises:
        ValueError: not one of ``pixel`` and ``box`` is given; it lies off the image or off every
            reference box; there are no reference points; or as in :func:`draw`.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn, viz
        >>> layer = MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2)
        >>> reference = torch.tensor([[0.25, 0.25], [0.75, 0.75]])[None, :, None]
        >>> with viz.record(layer) as seen:
        ...     output = layer(torch.rand(1, 2, 32), reference, torch.rand(1, 48, 32), [(8, 6)])
        >>> viz.choose_query(seen[-1], torch.rand(3, 80, 60), pixel=(50, 60))
        1
    """
    if (pixel is None) == (box is None):
        raise ValueError("pixel, box: expected one of them")
    if recording.reference_points is None:
        raise ValueError(
            f"recording: expected reference points, {recording.layer} has none; "
            "choose the query by its position"
        )
    _check_position("batch", batch, recording.reference_points.shape[0])
    height, width = _grey(image).shape
    scale = _pixels_per_image(recording, (height, width), batch, padded)[0]
    reference = recording.reference_points[batch, :, 0]  # [Q, 2 or 4]
    centre = reference[:, :2] * scale - 0.5
    if pixel is not None:
        x, y = pixel
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise ValueError(
                f"pixel: expected (x, y) on an image of {width} x {height}, got {pixel}"
            )
    else:
        assert box is not None
        x0, y0, x1, y1 = box
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {box}")
        if reference.shape[1] == 4:
            half = reference[:, 2:] * scale / 2
            low = torch.maximum(centre - half, torch.tensor([x0, y0]))
            high = torch.minimum(centre + half, torch.tensor([x1, y1]))
            shared = (high - low).clamp(min=0).prod(-1)
            overlap = shared / ((2 * half).prod(-1) + (x1 - x0) * (y1 - y0) - shared)
            if not overlap.any():
                raise ValueError(f"box: no reference box of {recording.layer} overlaps with {box}")
            return int(overlap.argmax())
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return int((centre - torch.tensor([x, y])).square().sum(-1).argmin())


MARKERS = "os^DvPX*"  # of the levels; from the ninth on they repeat
COLOURS = "YlOrRd"  # darker with the weight, which every eye sees; red as in the paper
REFERENCE = "#0072b2"


def draw(
    image: Any,
    recording: Recording,
    query: int,
    *,
    head: int | None = None,
    batch: int = 0,
    padded: bool | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the sampling points of a query over the image.

    A marker for each level, its colour the attention weight; a cross for the reference point, a
    frame for the reference box. Deformable DETR (arXiv 2010.04159), figures 6 and 7.

    Args:
        image: ``[3, H, W]`` or ``[1, H, W]``, ``[H, W, 3]`` or ``[H, W]``, a tensor, an array or a
            Pillow image of any resolution; uint8, or floats in ``[0, 1]``. Floats beyond (a
            normalized input) are stretched from their least to their largest.
        recording: what :func:`record` saw of a layer.
        query: position of the query; see :func:`choose_query`.
        head: points of this head; None: of all.
        batch: position of the image in the batch.
        padded: whether ``image`` is drawn with the padding that it had in its batch. It must be
            said where the recording knows of padding.
        axes: matplotlib's, to draw in; None: those of a new figure.

    Returns:
        The axes. Their artists have labels, for a legend.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``image`` has another shape; ``query``, ``head`` or ``batch`` is out of range;
            ``padded`` is needed.
    """
    _require_matplotlib()
    from matplotlib.collections import PathCollection
    from matplotlib.figure import Figure
    from matplotlib.markers import MarkerStyle
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import IdentityTransform

    B, Q, M = recording.sampling_locations.shape[:3]
    _check_position("batch", batch, B)
    _check_position("query", query, Q)
    if head is not None:
        _check_position("head", head, M)
    heads = slice(None) if head is None else slice(head, head + 1)
    grey = _grey(image)
    height, width = grey.shape
    scale = _pixels_per_image(recording, (height, width), batch, padded)  # [L, 2]
    level = torch.arange(len(scale)).repeat_interleave(torch.tensor(recording.num_points))
    locations = recording.sampling_locations[batch, query, heads]  # [heads, K, 2]
    pixels = (locations * scale[level] - 0.5).flatten(0, 1)
    level = level.repeat(len(locations))
    weights = recording.attention_weights[batch, query, heads].flatten()
    order = weights.argsort()  # the largest on top, whatever their level

    if axes is None:
        axes = Figure(layout="constrained").add_subplot()
    axes.imshow(grey.numpy(), cmap="gray", vmin=-1.2, vmax=1)  # pale: no darker than a large weight
    axes.set(xticks=[], yticks=[])
    markers = [MarkerStyle(MARKERS[i % len(MARKERS)]) for i in range(len(scale))]
    paths = [marker.get_path().transformed(marker.get_transform()) for marker in markers]
    points = PathCollection(  # what Axes.scatter makes, which has one marker for all
        [paths[i] for i in level[order]],
        sizes=[34],  # square points, as in scatter
        offsets=pixels[order].numpy(),
        offset_transform=axes.transData,
        cmap=COLOURS,
        edgecolors="black",
        linewidths=0.6,
    )
    points.set_transform(IdentityTransform())
    points.set_array(weights[order].numpy())
    points.set_clim(0, float(weights.max()))
    axes.add_collection(points, autolim=False)
    on_image = ((pixels >= -0.5) & (pixels <= torch.tensor([width, height]) - 0.5)).all(-1)
    if not on_image.all():
        axes.set_xlabel(f"{int((~on_image).sum())} of {len(pixels)} points lie off the image")
    for i, (h, w) in enumerate(recording.spatial_shapes):  # for a legend only
        axes.plot([], [], f"k{MARKERS[i % len(MARKERS)]}", mfc="w", label=f"level {i} ({h} x {w})")
    if recording.reference_points is not None:
        reference = recording.reference_points[batch, query, 0]
        x, y = (reference[:2] * scale[0] - 0.5).tolist()
        axes.plot(x, y, "+", color=REFERENCE, ms=13, mew=2.5, label="reference point")
        if len(reference) == 4:
            w, h = (reference[2:] * scale[0]).tolist()
            corner = (x - w / 2, y - h / 2)
            box = Rectangle(*(corner, w, h), fill=False, color=REFERENCE, label="reference box")
            axes.add_patch(box)
    return axes


def figure(
    image: Any,
    recording: Recording,
    queries: int | Sequence[int],
    *,
    head: int | None = None,
    batch: int = 0,
    padded: bool | None = None,
) -> Figure:
    """A figure of one or more queries side by side, with a legend and one scale of weights.

    Args:
        image: as in :func:`draw`.
        recording: as in :func:`draw`.
        queries: position of a query, or of several: a panel each.
        head: as in :func:`draw`.
        batch: as in :func:`draw`.
        padded: as in :func:`draw`.

    Returns:
        matplotlib's figure: a notebook shows it; ``figure.savefig("points.png")`` saves it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: as in :func:`draw`, or ``queries`` is empty.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn, viz
        >>> layer = MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2)
        >>> reference = torch.rand(1, 5, 1, 2)
        >>> with viz.record(layer) as seen:
        ...     output = layer(torch.rand(1, 5, 32), reference, torch.rand(1, 48, 32), [(8, 6)])
        >>> picture = viz.figure(torch.rand(3, 80, 60), seen[-1], [0, 3])
        >>> picture.savefig("/dev/null", format="png")
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    queries = [queries] if isinstance(queries, int) else list(queries)
    if not queries:
        raise ValueError("queries: expected at least one")
    height, width = _grey(image).shape
    side = 4.2  # inches that a panel is wide
    drawn = Figure(
        (side * len(queries) + 0.9, side * height / width + 0.8), dpi=100, layout="constrained"
    )
    panels = [drawn.add_subplot(1, len(queries), 1 + i) for i in range(len(queries))]
    for axes, query in zip(panels, queries):
        draw(image, recording, query, head=head, batch=batch, padded=padded, axes=axes)
        axes.set_title(f"query {query}", fontsize=10)
    points = [axes.collections[0] for axes in panels]
    largest = max(each.get_clim()[1] for each in points)
    for each in points:
        each.set_clim(0, largest)
    drawn.colorbar(points[0], ax=panels, label="attention weight", pad=0.01, aspect=30)
    entries = panels[0].get_legend_handles_labels()
    drawn.legend(*entries, loc="outside lower center", ncols=len(queries) * 2)
    # notebooks show figures of pyplot; this one is not, so that none is kept open
    drawn._repr_png_ = partial(_png, drawn)  # type: ignore[attr-defined]
    return drawn


def _png(drawn: Figure) -> bytes:
    file = BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "deform_attn.viz draws with matplotlib: pip install deform_attn[viz]"
        ) from error


def _grey(image: Any) -> Tensor:
    """``[H, W]`` in [0, 1]: colour is left to the weights."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        import numpy as np

        pixels = torch.from_numpy(np.array(image))
    shape = tuple(pixels.shape)
    if len(shape) == 3 and shape[-1] in (3, 4):
        pixels = pixels[..., :3]
    elif len(shape) == 3 and shape[0] in (1, 3):
        pixels = pixels.movedim(0, -1)
    elif len(shape) == 2:
        pixels = pixels[..., None]
    else:
        raise ValueError(f"image: expected [3, H, W], [H, W, 3] or [H, W], got {list(shape)}")
    if pixels.numel() == 0 or pixels.dtype.is_complex:
        raise ValueError(f"image: expected pixels, got {pixels.dtype} {list(shape)}")
    if pixels.dtype is torch.uint8:
        pixels = pixels / 255
    pixels = pixels.float()
    low, high = pixels.aminmax()
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low)
    share = torch.tensor([0.299, 0.587, 0.114]) if pixels.shape[-1] == 3 else torch.ones(1)
    return pixels @ share


def _pixels_per_image(
    recording: Recording, size: tuple[int, int], batch: int, padded: bool | None
) -> Tensor:
    """``[L, 2]``: pixels ``(x, y)`` of the drawn image that fraction 1 of a level spans."""
    height, width = size
    whole = torch.tensor([float(width), float(height)]).expand(len(recording.spatial_shapes), 2)
    if recording.valid_ratios is None or padded:
        return whole
    ratios = recording.valid_ratios[batch]
    if padded is None and bool((ratios != 1).any()):
        x, y = ratios[0].tolist()
        raise ValueError(
            f"padded: this image was padded, it fills ({x:.3g}, {y:.3g}) of (width, height) in its "
            "batch: expected True where `image` is drawn with that padding, False where without"
        )
    return whole / ratios


def _check_position(name: str, position: int, count: int) -> None:
    if not 0 <= position < count:
        raise ValueError(f"{name}: expected 0 to {count - 1}, got {position}")
