"""Draws recorded sampling points and attention weights over an image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deform_attn.checks import check_integer, check_number
from deform_attn.extras import needs
from deform_attn.viz.record import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["choose_query", "draw", "figure"]


def choose_query(
    recording: Recording,
    image: Any,
    *,
    pixel: tuple[float, float] | None = None,
    box: tuple[float, float, float, float] | None = None,
    batch: int = 0,
    padded: bool | None = None,
) -> int:
    """Choose the query whose reference point, or reference box, is nearest to a place in the image.

    Args:
        recording: a recording of :func:`record` that has reference points.
        image: as in :func:`draw`; only its size is used.
        pixel: ``(x, y)``: the query with the nearest reference point is chosen.
        box: ``(x0, y0, x1, y1)`` in pixels: chosen is the query whose reference box has the largest
            intersection over union with it; for reference points, the one nearest to its centre.
        batch: position of the image in the batch.
        padded: as in :func:`draw`.

    Returns:
        Position of the query, for :func:`draw` and :func:`figure`.

    Raises:
        TypeError: an argument has another type.
        ValueError: neither or both of ``pixel`` and ``box`` are given; the pixel lies outside the
            image; the box overlaps no reference box; the recording has no reference points; or as
            in :func:`draw`.

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
        given = "both" if box is not None else "neither"
        raise ValueError(f"pixel, box: expected exactly one of them, got {given}")
    _check_recording(recording)
    if recording.reference_points is None:
        raise ValueError(
            f"recording: expected reference points, {recording.layer} has none; "
            "pass the position of a query to draw() or figure() instead"
        )
    _check_position("batch", batch, recording.reference_points.shape[0])
    height, width = _grey(image).shape
    scale = _pixels_per_image(recording, (height, width), batch, padded)[0]
    reference = recording.reference_points[batch, :, 0]  # [Q, 2, 4 or 5]
    centre = reference[:, :2] * scale - 0.5
    if pixel is not None:
        x, y = _numbers("pixel", pixel, "x, y")
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise ValueError(
                f"pixel: expected (x, y) inside the image of {width} x {height}, got {pixel}"
            )
    else:
        assert box is not None
        x0, y0, x1, y1 = _numbers("box", box, "x0, y0, x1, y1")
        if not (x0 < x1 and y0 < y1):
            raise ValueError(f"box: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {box}")
        if reference.shape[1] == 4:
            half = reference[:, 2:] * scale / 2
            low = torch.maximum(centre - half, torch.tensor([x0, y0]))
            high = torch.minimum(centre + half, torch.tensor([x1, y1]))
            intersection = (high - low).clamp(min=0).prod(-1)
            union = (2 * half).prod(-1) + (x1 - x0) * (y1 - y0) - intersection
            overlap = intersection / union
            if not overlap.any():
                raise ValueError(
                    f"box: expected one that overlaps a reference box of {recording.layer}, "
                    f"got {box}"
                )
            return int(overlap.argmax())
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return int((centre - torch.tensor([x, y])).square().sum(-1).argmin())


def _corners(box: Tensor) -> Tensor:
    """``[4, 2]`` of a box ``(cx, cy, w, h)`` or a rotated one ``(cx, cy, w, h, angle)``."""
    corners = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]) * box[2:4]
    if len(box) == 5:
        cos, sin = box[4].cos(), box[4].sin()
        corners = corners @ torch.stack((cos, sin, -sin, cos)).view(2, 2)
    return box[:2] + corners


MARKERS = "os^DvPX*"  # one per level; they repeat from the ninth level on
COLOUR_MAP = "YlOrRd"  # brightness falls with the weight, so it also reads without colour vision
REFERENCE_COLOUR = "#0072b2"


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

    The marker shows the level of a point, the colour its attention weight. A cross marks the
    reference point, a rectangle the reference box. As in Deformable DETR (arXiv 2010.04159),
    figures 6 and 7.

    Args:
        image: ``[3, H, W]``, ``[1, H, W]``, ``[H, W, 3]``, ``[H, W, 1]`` or ``[H, W]``, as a
            tensor, an array or a Pillow image, of any resolution; uint8, or floats in ``[0, 1]``.
            Floats outside that range (a normalized input) are scaled so that their minimum is 0 and
            their maximum 1.
        recording: a recording of :func:`record`.
        query: position of the query; see :func:`choose_query`.
        head: draw the points of this head only; None draws those of all heads.
        batch: position of the image in the batch.
        padded: whether ``image`` includes the padding that it had in its batch. Required if the
            recording's ``valid_ratios`` show padding for this image.
        axes: matplotlib axes to draw in; None creates a figure.

    Returns:
        The axes. Their artists have labels, for a legend.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument has another type.
        ValueError: ``image`` has another shape; ``query``, ``head`` or ``batch`` is out of range;
            ``padded`` is required but None.

    Example:
        >>> import torch
        >>> from deform_attn import MSDeformAttn, viz
        >>> layer = MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2)
        >>> reference = torch.rand(1, 5, 1, 2)
        >>> with viz.record(layer) as seen:
        ...     output = layer(torch.rand(1, 5, 32), reference, torch.rand(1, 48, 32), [(8, 6)])
        >>> axes = viz.draw(torch.rand(3, 80, 60), seen[-1], query=0, head=2)
        >>> axes.figure.savefig("/dev/null", format="png")
    """
    with needs("viz"):
        from matplotlib.collections import PathCollection
        from matplotlib.figure import Figure
        from matplotlib.markers import MarkerStyle
        from matplotlib.patches import Polygon
        from matplotlib.transforms import IdentityTransform

    _check_recording(recording)
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
    order = weights.argsort()  # points of large weight are drawn last, on top

    if axes is None:
        axes = Figure(layout="constrained").add_subplot()
    axes.imshow(grey.numpy(), cmap="gray", vmin=-1.2, vmax=1)  # pale, so that points stand out
    axes.set(xticks=[], yticks=[])
    markers = [MarkerStyle(MARKERS[i % len(MARKERS)]) for i in range(len(scale))]
    paths = [marker.get_path().transformed(marker.get_transform()) for marker in markers]
    points = PathCollection(  # Axes.scatter allows only one marker per call
        [paths[i] for i in level[order]],
        sizes=[34],  # area in square points (1/72 inch)
        offsets=pixels[order].numpy(),
        offset_transform=axes.transData,
        cmap=COLOUR_MAP,
        edgecolors="black",
        linewidths=0.6,
    )
    points.set_transform(IdentityTransform())
    points.set_array(weights[order].numpy())
    points.set_clim(0, float(weights.max()))
    axes.add_collection(points, autolim=False)
    on_image = ((pixels >= -0.5) & (pixels <= torch.tensor([width, height]) - 0.5)).all(-1)
    if not on_image.all():
        axes.set_xlabel(f"{int((~on_image).sum())} of {len(pixels)} points lie outside the image")
    for i, (h, w) in enumerate(recording.spatial_shapes):  # empty lines, as entries of the legend
        axes.plot([], [], f"k{MARKERS[i % len(MARKERS)]}", mfc="w", label=f"level {i} ({h} x {w})")
    if recording.reference_points is not None:
        reference = recording.reference_points[batch, query, 0]
        x, y = (reference[:2] * scale[0] - 0.5).tolist()
        axes.plot(x, y, "+", color=REFERENCE_COLOUR, ms=13, mew=2.5, label="reference point")
        if len(reference) >= 4:
            corners = _corners(reference) * scale[0] - 0.5
            box = Polygon(corners.numpy(), fill=False, color=REFERENCE_COLOUR)
            box.set_label("reference box")
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
    """Draw one or more queries side by side, with a legend and a common colour scale.

    Args:
        image: as in :func:`draw`.
        recording: as in :func:`draw`.
        queries: position of a query, or a list of positions; each gets a panel.
        head: as in :func:`draw`.
        batch: as in :func:`draw`.
        padded: as in :func:`draw`.

    Returns:
        A matplotlib figure: notebooks display it; ``figure.savefig("points.png")`` saves it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument has another type.
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
    with needs("viz"):
        from matplotlib.figure import Figure

    _check_recording(recording)
    if not isinstance(queries, Iterable):
        check_integer("queries", queries)
        queries = [queries]
    queries = list(queries)
    if not queries:
        raise ValueError("queries: expected at least one position, got none")
    height, width = _grey(image).shape
    side = 4.2  # width of a panel in inches; a strip is drawn in a part of its panel
    drawn = Figure(
        (side * len(queries) + 0.9, side * min(max(height / width, 0.3), 3) + 0.8),
        dpi=100,
        layout="constrained",
    )
    panels = [drawn.add_subplot(1, len(queries), 1 + i) for i in range(len(queries))]
    for axes, query in zip(panels, queries):
        draw(image, recording, query, head=head, batch=batch, padded=padded, axes=axes)
        axes.set_title(f"query {query}", fontsize=10)
    points = [axes.collections[0] for axes in panels]
    largest = max(collection.get_clim()[1] for collection in points)
    for collection in points:
        collection.set_clim(0, largest)
    drawn.colorbar(points[0], ax=panels, label="attention weight", pad=0.01, aspect=30)
    entries = panels[0].get_legend_handles_labels()
    drawn.legend(*entries, loc="outside lower center", ncols=len(queries) * 2)
    # IPython displays pyplot figures only; others need this method. pyplot would keep it open.
    drawn._repr_png_ = partial(_png, drawn)  # type: ignore[attr-defined]
    return drawn


def _png(drawn: Figure) -> bytes:
    file = BytesIO()
    drawn.savefig(file, format="png")
    return file.getvalue()


# Modes of Pillow whose pixels are indices of a palette, or no red, green and blue
_NO_PLAIN_COLOURS = ("P", "PA", "LA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")


def _grey(image: Any) -> Tensor:
    """The image as ``[H, W]`` in [0, 1], without colour, which shows the weights."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    else:
        import numpy as np

        if getattr(image, "mode", None) in _NO_PLAIN_COLOURS:
            image = image.convert("RGB")
        array = np.array(image)
        if array.dtype.kind == "f":
            array = array.astype(np.float64)
        elif array.dtype.kind in "iu":
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.kind not in "bfiuc":
            raise TypeError(
                "image: expected a tensor, an array or a Pillow image, got "
                f"{type(image).__name__}; open a file with PIL.Image.open"
            )
        pixels = torch.from_numpy(array)
    shape = tuple(pixels.shape)
    if len(shape) == 3 and shape[-1] in (3, 4):
        pixels = pixels[..., :3]
    elif len(shape) == 3 and shape[0] in (1, 3):
        pixels = pixels.movedim(0, -1)
    elif len(shape) == 3 and shape[-1] == 1:
        pass
    elif len(shape) == 2:
        pixels = pixels[..., None]
    else:
        raise ValueError(f"image: expected [3, H, W], [H, W, 3] or [H, W], got {list(shape)}")
    if pixels.numel() == 0 or pixels.dtype.is_complex:
        raise ValueError(f"image: expected real pixels, got {pixels.dtype} {list(shape)}")
    if pixels.dtype is torch.uint8:
        pixels = pixels / 255
    pixels = pixels.float()
    low, high = pixels.aminmax()
    if low < 0 or high > 1:
        pixels = (pixels - low) / (high - low)
    luma = torch.tensor([0.299, 0.587, 0.114]) if pixels.shape[-1] == 3 else torch.ones(1)
    return pixels @ luma


def _pixels_per_image(
    recording: Recording, size: tuple[int, int], batch: int, padded: bool | None
) -> Tensor:
    """``[L, 2]``: width and height of each level's whole map, in pixels of the drawn image."""
    height, width = size
    whole = torch.tensor([float(width), float(height)]).expand(len(recording.spatial_shapes), 2)
    if recording.valid_ratios is None or padded:
        return whole
    ratios = recording.valid_ratios[batch]
    if padded is None and bool((ratios != 1).any()):
        x, y = ratios[0].tolist()
        raise ValueError(
            "padded: expected True or False, got None: this image was padded in its batch and "
            f"fills ({x:.3g}, {y:.3g}) of (width, height). Pass True if `image` includes the "
            "padding, False if it does not"
        )
    return whole / ratios


def _check_recording(recording: object) -> None:
    if not isinstance(recording, Recording):
        raise TypeError(
            f"recording: expected one of record(), such as seen[-1], got {type(recording).__name__}"
        )


def _numbers(name: str, given: Any, expected: str) -> list[float]:
    """The numbers of a place in the image."""
    if not isinstance(given, Iterable) or len(found := list(given)) != expected.count(",") + 1:
        raise TypeError(f"{name}: expected ({expected}), got {given!r}")
    return [
        float(number) if isinstance(number, Tensor) else check_number(name, number)
        for number in found
    ]


def _check_position(name: str, position: int, count: int) -> None:
    check_integer(name, position)
    if not 0 <= position < count:
        raise ValueError(f"{name}: expected 0 to {count - 1}, got {position}")
