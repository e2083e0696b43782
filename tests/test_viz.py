"""viz: recordings equal the operator's arguments; points are drawn where they were sampled."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import deform_attn
from deform_attn import (
    MSDeformableAttention,
    MSDeformAttn,
    MultiScaleDeformableAttention,
    ms_deform_attn,
    viz,
)

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.image import imread
from PIL import Image

B, Q, M, P = 2, 5, 4, 3
SHAPES = [(8, 6), (4, 3)]
L, ROWS = 2, 60
IMAGE = torch.rand(3, 80, 60)


def random_layer() -> MSDeformAttn:
    module = MSDeformAttn(d_model=32, n_levels=L, n_heads=M, n_points=P)
    for projection in (module.sampling_offsets, module.attention_weights):
        nn.init.normal_(projection.weight, std=0.2)
    return module


def arguments(width: int = 2) -> tuple[Tensor, ...]:
    """Query, reference points, feature maps, shapes."""
    reference = 0.3 + 0.4 * torch.rand(B, Q, L, width)
    return torch.randn(B, Q, 32), reference, torch.randn(B, ROWS, 32), torch.tensor(SHAPES)


def recorded(width: int = 2) -> viz.Recording:
    with viz.record(module := random_layer()) as seen:
        module(*arguments(width))
    return seen[-1]


# --- what is recorded


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_what_a_layer_samples(backend: str, width: int, grad: bool) -> None:
    module, inputs = random_layer(), arguments(width)
    query, reference = inputs[:2]
    with deform_attn.use_backend(backend), torch.set_grad_enabled(grad):
        output = module(*inputs)
        with viz.record(module) as seen:
            same = module(*inputs)
            if grad:
                same.sum().backward()
    assert torch.equal(output, same)
    assert seen.layers == ["MSDeformAttn"]
    found = seen[-1]

    offsets = module.sampling_offsets(query).view(B, Q, M, L, P, 2)
    anchor = reference[:, :, None, :, None]
    if width == 2:
        offsets = offsets / torch.tensor(SHAPES).flip(-1)[:, None]
    else:
        offsets = offsets / P * anchor[..., 2:] / 2
    locations = (anchor[..., :2] + offsets).flatten(3, 4)
    weights = module.attention_weights(query).view(B, Q, M, L * P).softmax(-1)
    torch.testing.assert_close(found.sampling_locations, locations.detach())
    torch.testing.assert_close(found.attention_weights, weights.detach())
    assert found.reference_points is not None
    assert torch.equal(found.reference_points, reference)
    assert found.spatial_shapes == tuple(SHAPES)
    assert found.num_points == (P, P)
    assert found.valid_ratios is None


FAMILY = {
    "official": lambda: MSDeformAttn(32, L, M, P),
    "mmcv": lambda: MultiScaleDeformableAttention(32, M, L, P, dropout=0, batch_first=True),
    "rtdetr": lambda: MSDeformableAttention(32, M, L, P, variant="rtdetr"),
    "rtdetrv2": lambda: MSDeformableAttention(32, M, L, [1, 4]),
    "discrete": lambda: MSDeformableAttention(32, M, L, [2, 3], "discrete"),
    "dfine": lambda: MSDeformableAttention(32, M, L, [4, 2], variant="dfine"),
}


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("name", FAMILY)
def test_all_that_a_module_samples(name: str, backend: str) -> None:
    """The operator, called with what was recorded, gives the module's output."""
    module = FAMILY[name]()
    for projection in (module.sampling_offsets, module.attention_weights):
        nn.init.normal_(projection.weight, std=0.2)
    query, _, memory, shapes = arguments()
    reference = torch.rand(B, Q, 1, 4)
    with deform_attn.use_backend(backend), viz.record(module) as seen:
        if name == "mmcv":
            boxes = reference.expand(-1, -1, L, -1)
            output = module(query, value=memory, reference_points=boxes, spatial_shapes=shapes)
            output = output - query
        elif name == "official":
            output = module(query, reference.expand(-1, -1, L, -1), memory, shapes)
        else:
            output = module(query, reference, memory, SHAPES)
    (found,) = seen
    value = memory if name == "dfine" else module.value_proj(memory)
    attended = ms_deform_attn(
        value.view(B, ROWS, M, -1),
        *(SHAPES, None, found.sampling_locations, found.attention_weights),
        num_points=found.num_points,
        method="discrete" if name == "discrete" else "default",
    )
    torch.testing.assert_close(
        output, attended if name == "dfine" else module.output_proj(attended)
    )
    assert found.reference_points is not None
    assert torch.equal(found.reference_points, reference.expand(-1, -1, L, -1))


def test_a_compiled_layer() -> None:
    module, inputs = random_layer(), arguments()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        output = compiled(*inputs)
        with viz.record(compiled) as seen:
            assert torch.equal(compiled(*inputs), output)
    assert seen.layers == ["MSDeformAttn"]


def test_a_traced_layer() -> None:
    """TorchScript's methods have no signature. A module around the layer is a name for it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Module()
            self.decoder.layer = random_layer()

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.decoder.layer(*tensors, shapes)  # type: ignore[no-any-return]

    (*tensors, shapes), model = arguments(), Model()
    traced = torch.jit.trace(model, tuple(tensors))
    with viz.record(model) as expected:
        model(*tensors)
    with viz.record(traced) as seen:
        traced(*tensors)
    (found,) = seen
    assert torch.equal(found.sampling_locations, expected["decoder.layer"].sampling_locations)
    assert expected["decoder"] is expected["decoder.layer"] is expected[0]
    with pytest.raises(LookupError, match="layer: expected one of decoder.layer, got 'deco'"):
        expected["deco"]


class Custom(nn.Module):
    """Calls the function, with levels that have different numbers of points."""

    def forward(self, locations: Tensor, weights: Tensor) -> Tensor:
        value = torch.rand(B, ROWS, M, 8)
        return ms_deform_attn(value, SHAPES, None, locations, weights, num_points=[1, 4])


def test_a_call_of_the_function() -> None:
    locations, weights = torch.rand(B, Q, M, 5, 2), torch.rand(B, Q, M, 5)
    with viz.record(module := Custom()) as seen:
        module(locations, weights)
    assert seen.layers == ["Custom"]
    assert torch.equal(seen[0].sampling_locations, locations)
    assert torch.equal(seen[0].attention_weights, weights)
    assert seen[0].num_points == (1, 4)
    assert seen[0].reference_points is None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = random_layer()

    def forward(self, query: Tensor, memory: Tensor, reference_points: Tensor) -> Any:
        return self.cross_attn(query, reference_points, memory, SHAPES)


class Decoder(nn.Module):
    """Nested modules that all take reference points; the innermost ones are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, query: Tensor, reference_points: Tensor, memory: Tensor, valid_ratios: Any):
        for layer in self.layers:
            scaled = reference_points[:, :, None] * valid_ratios[:, None]
            query = layer(query, memory, reference_points=scaled)
        return query


# the second image fills the left three quarters and the upper half of the padded batch
RATIOS = torch.tensor([[1.0, 1.0], [0.75, 0.5]])[:, None].expand(B, L, 2)


def decoded(reference: Tensor) -> viz.Recordings:
    with viz.record(decoder := Decoder()) as seen:
        decoder(torch.randn(B, Q, 32), reference, torch.randn(B, ROWS, 32), valid_ratios=RATIOS)
    return seen


def test_a_model() -> None:
    reference = torch.rand(B, Q, 2)
    seen = decoded(reference)
    assert seen.layers == ["layers.0.cross_attn", "layers.1.cross_attn"]
    assert seen["layers.1.cross_attn"] is seen[1]
    assert len(seen[:1]) == 1
    for call in seen:
        assert call.reference_points is not None
        assert torch.equal(call.reference_points, reference[:, :, None] * RATIOS[:, None])
        assert call.valid_ratios is not None
        assert torch.equal(call.valid_ratios, RATIOS)


class Stock(nn.Module):
    """Like the parameter-free module inside transformers' layers, with and without our operator."""

    def __init__(self, accelerated: bool) -> None:
        super().__init__()
        self.accelerated = accelerated

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        if not self.accelerated:
            return torch.zeros(())
        return ms_deform_attn(
            *(value, value_spatial_shapes, level_start_index, sampling_locations),
            attention_weights,
        )


class Around(nn.Module):
    def __init__(self, accelerated: bool) -> None:
        super().__init__()
        self.attn = Stock(accelerated)

    def forward(self, query: Tensor, *, reference_points: Tensor, points: Any) -> Tensor:
        shapes, value = torch.tensor(SHAPES), torch.rand(B, ROWS, M, 8)
        return self.attn(value, shapes, SHAPES, torch.tensor([0, 48]), *points, 64)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_stock_module(accelerated: bool) -> None:
    points = torch.rand(B, Q, M, L, P, 2), torch.rand(B, Q, M, L, P)
    reference = torch.rand(B, Q, 1, 4)
    module = Around(accelerated)
    with viz.record(module) as seen:
        module(torch.rand(1), reference_points=reference, points=points)
    assert seen.layers == ["Around"]
    assert torch.equal(seen[0].sampling_locations, points[0].flatten(3, 4))
    assert torch.equal(seen[0].attention_weights, points[1].flatten(3, 4))
    assert seen[0].reference_points is not None
    assert torch.equal(seen[0].reference_points, reference.expand(-1, -1, L, -1))


def test_nothing_is_left_behind() -> None:
    module = random_layer()
    with pytest.raises(ValueError, match="query: expected shape"), viz.record(module):
        module(torch.rand(1), *arguments()[1:])
    with pytest.raises(ZeroDivisionError), viz.record(module):
        raise ZeroDivisionError
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert not _get_current_dispatch_mode_stack()
    with viz.record(module) as seen:  # a call that fails does not disturb the next
        with pytest.raises(ValueError, match="query: expected shape"):
            module(torch.rand(1), *arguments()[1:])
        module(*arguments())
    module(*arguments())
    assert len(seen) == 1


def test_nothing_recorded() -> None:
    module, linear = random_layer(), nn.Linear(2, 2)
    not_called = pytest.raises(RuntimeError, match="MSDeformAttn was not called inside")
    with not_called, viz.record(module):
        pass
    none_inside = pytest.raises(
        RuntimeError, match="found no call of deformable attention in Linear"
    )
    with none_inside, viz.record(linear):
        linear(torch.rand(2))
    with viz.record(module) as seen:
        with pytest.raises(LookupError, match="nothing recorded yet"):
            seen[-1]
        module(*arguments())
    with pytest.raises(LookupError, match="layer: expected one of MSDeformAttn, got 'encoder'"):
        seen["encoder"]


# --- models of transformers


def test_a_stock_model_with_a_padded_image() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=M,
        decoder_attention_heads=M,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=Q,
    )
    model = transformers.DeformableDetrModel(config).eval()
    mask = torch.zeros(B, 64, 128, dtype=torch.long)
    mask[0], mask[1, :32, :96] = 1, 1  # the second image is 32 x 96
    with torch.no_grad(), viz.record(model) as seen:
        model(torch.rand(B, 3, 64, 128), pixel_mask=mask)
    assert seen.layers == [
        "encoder.layers.0.self_attn",
        *("decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"),
    ]
    encoder = seen[0]
    assert encoder.spatial_shapes[:3] == ((8, 16), (4, 8), (2, 4))
    assert encoder.reference_points is not None
    for call in seen:
        assert call.valid_ratios is not None
        assert call.valid_ratios[1, :3].tolist() == [[0.75, 0.5]] * 3
    # the encoder has one query per pixel of each level: choose_query finds it at its position
    picture = torch.rand(3, 32, 96)
    for row, (x, y) in ((2 * 16 + 5, (43.5, 19.5)), (128 + 1 * 8 + 3, (55.5, 23.5))):
        found = viz.choose_query(encoder, picture, pixel=(x, y), batch=1, padded=False)
        assert found == row
        axes = viz.draw(picture, encoder, row, batch=1, padded=False)
        np.testing.assert_allclose(axes.lines[-1].get_xydata(), [[x, y]], rtol=1e-5)
    sampled = viz.draw(picture, seen[-1], 0, batch=1, padded=False)
    assert len(drawn_points(sampled)[0]) == M * 4 * 4


# --- choosing a query


def recording_at(*reference: list[float]) -> viz.Recording:
    """A recording with these reference points in all levels."""
    anchors = torch.tensor(reference)[None, :, None].expand(1, -1, L, -1)
    points = torch.rand(1, len(reference), M, L * P, 2)
    weights = torch.rand(1, len(reference), M, L * P)
    return viz.Recording("made", tuple(SHAPES), (P, P), points, weights, anchors, None)


def test_choose_query() -> None:
    points = recording_at([0.1, 0.1], [0.5, 0.1], [0.5, 0.9])
    assert viz.choose_query(points, IMAGE, pixel=(30, 10)) == 1
    assert viz.choose_query(points, IMAGE, pixel=(59, 79)) == 2
    assert viz.choose_query(points, IMAGE, box=(20, 60, 40, 79)) == 2
    # two boxes overlap the given one: the intersection decides only relative to the union
    boxes = recording_at([0.5, 0.5, 0.1, 0.1], [0.5, 0.5, 0.2, 0.3], [0.5, 0.5, 1.0, 1.0])
    assert viz.choose_query(boxes, IMAGE, box=(24, 28, 36, 52)) == 1
    assert viz.choose_query(boxes, IMAGE, box=(1, 1, 58, 78)) == 2


def test_choose_a_query_that_cannot_be() -> None:
    points, boxes = recording_at([0.5, 0.5]), recording_at([0.5, 0.5, 0.1, 0.1])
    without = dataclasses.replace(points, reference_points=None)
    for message, recording, options in (
        ("pixel, box: expected exactly one of them, got neither", points, {}),
        (
            "pixel, box: expected exactly one of them, got both",
            points,
            {"pixel": (1, 1), "box": (0, 0, 1, 1)},
        ),
        ("recording: expected reference points, made has none", without, {"pixel": (1, 1)}),
        (r"pixel: expected \(x, y\) inside the image of 60 x 80", points, {"pixel": (70, 10)}),
        ("box: expected .* with x0 < x1", points, {"box": (5, 0, 1, 1)}),
        ("box: expected one that overlaps a reference box of made", boxes, {"box": (0, 0, 1, 1)}),
        ("batch: expected 0 to 0, got 1", points, {"pixel": (1, 1), "batch": 1}),
    ):
        with pytest.raises(ValueError, match=message):
            viz.choose_query(recording, IMAGE, **options)


# --- the picture


def drawn_points(axes: Axes) -> tuple[np.ndarray, np.ndarray]:
    (points,) = axes.collections
    return np.asarray(points.get_offsets()), np.asarray(points.get_array())


def test_points_lie_where_values_were_read() -> None:
    """If the image has the level's size, pixels with a gradient are the neighbours of points."""
    height, width = 8, 6
    module = MSDeformAttn(d_model=8, n_levels=1, n_heads=1, n_points=2)
    nn.init.normal_(module.sampling_offsets.weight)
    features = torch.rand(1, height * width, 8, requires_grad=True)
    reference = torch.tensor([[0.42, 0.3], [0.7, 0.61]])[None, :, None]
    with viz.record(module) as seen:
        output = module(torch.randn(1, 2, 8), reference, features, [(height, width)])
    for query in range(2):
        (grad,) = torch.autograd.grad(output[0, query].sum(), features, retain_graph=True)
        read = {divmod(int(row), width) for row in grad[0].abs().sum(-1).nonzero()}
        offsets, _ = drawn_points(viz.draw(torch.rand(height, width), seen[-1], query))
        near = {
            (int(np.floor(y)) + dy, int(np.floor(x)) + dx)
            for x, y in offsets
            for dy in (0, 1)
            for dx in (0, 1)
        }
        assert read == {(y, x) for y, x in near if 0 <= y < height and 0 <= x < width}


def test_colours_and_markers() -> None:
    recording = recorded(width=4)
    axes = viz.draw(IMAGE, recording, 3, head=1, batch=1)
    offsets, weights = drawn_points(axes)
    (points,) = axes.collections
    assert len(offsets) == L * P
    assert (np.diff(weights) >= 0).all()  # the largest weight is drawn last
    assert points.get_clim() == (0, weights.max())
    expected = recording.attention_weights[1, 3, 1]
    order = expected.argsort()
    np.testing.assert_array_equal(weights, expected[order])
    pixels = recording.sampling_locations[1, 3, 1][order] * torch.tensor([60, 80]) - 0.5
    np.testing.assert_allclose(offsets, pixels, rtol=1e-6)
    outlines = [path.vertices.tobytes() for path in points.get_paths()]
    level = (order >= P).tolist()
    assert len(set(zip(outlines, level))) == len(set(outlines)) == L

    assert recording.reference_points is not None
    x, y, w, h = (recording.reference_points[1, 3, 0] * torch.tensor([60, 80, 60, 80])).tolist()
    (box,) = axes.patches
    corners = box.get_xy()
    np.testing.assert_allclose(corners[:4].mean(0), (x - 0.5, y - 0.5), rtol=1e-5)
    np.testing.assert_allclose(np.ptp(corners, 0), (w, h), rtol=1e-5)
    cross = axes.lines[-1]
    np.testing.assert_allclose(cross.get_xydata(), [[x - 0.5, y - 0.5]], rtol=1e-5)
    assert axes.get_legend_handles_labels()[1] == [
        *("level 0 (8 x 6)", "level 1 (4 x 3)", "reference point", "reference box")
    ]


def test_all_heads() -> None:
    offsets, _ = drawn_points(viz.draw(IMAGE, recorded(), 0))
    assert len(offsets) == M * L * P


def test_points_off_the_image() -> None:
    recording = recording_at([0.5, 0.5])
    locations = recording.sampling_locations.clone()
    assert viz.draw(IMAGE, recording, 0).get_xlabel() == ""
    locations[0, 0, 0, :2] = torch.tensor([1.2, -0.1])
    outside = dataclasses.replace(recording, sampling_locations=locations)
    label = viz.draw(IMAGE, outside, 0).get_xlabel()
    assert label == f"2 of {M * L * P} points lie outside the image"


@pytest.mark.parametrize("recipe", ["deformable_detr_two_stage", "dino"])
def test_a_detector_with_a_padded_image(recipe: str) -> None:
    """deform_attn.detr's layers take the ratios as a part of `memory`."""
    from deform_attn.detr.recipes import build

    model = build(recipe, num_classes=2, width=32, layers=1, queries=5)[0].eval()
    padding = torch.zeros(2, 64, 128, dtype=torch.bool)
    padding[1, 32:], padding[1, :, 96:] = True, True
    with torch.no_grad(), viz.record(model) as seen:
        model(torch.rand(2, 3, 64, 128), padding)
    assert len(seen) == 2  # encoder, decoder
    for recording in seen:
        expected = torch.tensor([[1.0, 1.0], [0.75, 0.5]])[:, None].expand(2, 3, 2)
        torch.testing.assert_close(recording.valid_ratios, expected)
        with pytest.raises(ValueError, match="padded: expected True or False, got None"):
            viz.draw(IMAGE, recording, 0, batch=1)


def test_padded_image() -> None:
    """Points of a padded image are drawn in the right place, with and without the padding."""
    reference = torch.full((B, Q, 2), 0.2)
    reference[1, 2] = torch.tensor([0.5, 0.25])
    recording = decoded(reference)[-1]
    with pytest.raises(ValueError, match=r"padded: expected True or False, .* fills \(0.75, 0.5\)"):
        viz.draw(IMAGE, recording, 2, batch=1)
    assert viz.draw(IMAGE, recording, 2, batch=0)  # this image has no padding
    alone = viz.draw(IMAGE, recording, 2, batch=1, padded=False)
    np.testing.assert_allclose(alone.lines[-1].get_xydata(), [[29.5, 19.5]])
    assert viz.choose_query(recording, IMAGE, pixel=(30, 20), batch=1, padded=False) == 2

    with_padding = torch.zeros(3, 160, 80)
    with_padding[:, :80, :60] = IMAGE
    whole = viz.draw(with_padding, recording, 2, batch=1, padded=True)
    np.testing.assert_allclose(whole.lines[-1].get_xydata(), [[29.5, 19.5]])
    np.testing.assert_allclose(drawn_points(whole)[0], drawn_points(alone)[0], rtol=1e-5)


def test_images() -> None:
    numbers = (IMAGE * 255).to(torch.uint8)
    numbers[:, 0, 0] = torch.tensor([0, 255, 0])
    grey = (numbers.float() / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    array = numbers.movedim(0, -1).numpy()
    normalized = (numbers / 255 - 0.5) / 0.25
    for image in (
        *(numbers, numbers / 255, normalized, array, Image.fromarray(array), grey, grey[None]),
        Image.fromarray(array).convert("RGBA"),
        grey[..., None].numpy().astype(">f8"),
    ):
        shown = viz.draw(image, recording_at([0.5, 0.5]), 0).images[0].get_array()
        np.testing.assert_allclose(shown, grey, atol=1e-5)


@pytest.mark.parametrize("mode", ["P", "LA", "CMYK", "HSV"])
def test_modes_of_pillow(mode: str) -> None:
    """A palette's indices are no brightness, nor is hue."""
    colour = (200, 30, 90)
    image = Image.new("RGB", (30, 20), colour)
    brightness = np.dot(colour, [0.299, 0.587, 0.114]) / 255
    image = image.quantize() if mode == "P" else image.convert(mode)
    shown = viz.draw(image, recording_at([0.5, 0.5]), 0).images[0].get_array()
    np.testing.assert_allclose(shown, np.full((20, 30), brightness), atol=0.03)


def test_a_figure_of_a_strip() -> None:
    for size in ((3000, 2), (2, 3000)):
        sides = viz.figure(torch.rand(size), recorded(), 0).get_size_inches()
        assert 1 < min(sides) <= max(sides) < 15


def test_what_cannot_be_drawn() -> None:
    recording = recorded()
    for message, image, options in (
        (r"image: expected \[3, H, W\].* got \[1, 3, 8, 8\]", IMAGE[None, :, :8, :8], {}),
        (r"image: expected \[3, H, W\].* got \[5, 8, 8\]", torch.rand(5, 8, 8), {}),
        ("image: expected real pixels", torch.rand(3, 0, 8), {}),
        ("query: expected 0 to 4, got 5", IMAGE, {"query": 5}),
        ("query: expected 0 to 4, got -1", IMAGE, {"query": -1}),
        ("head: expected 0 to 3, got 4", IMAGE, {"head": 4}),
        ("batch: expected 0 to 1, got 2", IMAGE, {"batch": 2}),
    ):
        with pytest.raises(ValueError, match=message):
            viz.draw(image, recording, **{"query": 0, **options})
    with pytest.raises(ValueError, match="queries: expected at least one"):
        viz.figure(IMAGE, recording, [])
    for call, message in (
        (lambda: viz.record(3).__enter__(), "module: expected a torch.nn.Module, got int"),
        (
            lambda: viz.draw(IMAGE, None, 0),
            r"recording: expected .*, such as seen\[-1\], got NoneT",
        ),
        (lambda: viz.figure(IMAGE, [recording], 0), "recording: expected .*, got list"),
        (
            lambda: viz.draw("a.png", recording, 0),
            "image: expected a tensor, .*, got str; open a f",
        ),
        (lambda: viz.draw(IMAGE, recording, "0"), "query: expected an integer, got '0'"),
        (lambda: viz.draw(IMAGE, recording, 0, head=1.5), "head: expected an integer, got 1.5"),
        (lambda: viz.figure(IMAGE, recording, None), "queries: expected an integer, got None"),
        (
            lambda: viz.choose_query(recording, IMAGE, pixel=3),  # type: ignore[arg-type]
            r"pixel: expected \(x, y\), got 3",
        ),
        (
            lambda: viz.choose_query(recording, IMAGE, pixel=("a", 1)),  # type: ignore[arg-type]
            "pixel: expected a number, got 'a'",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert viz.figure(IMAGE, recording, np.int64(3)).axes[0].get_title() == "query 3"


@pytest.mark.parametrize("queries", [1, [0, 3, 4]])
def test_figure(queries: int | list[int], tmp_path: Path) -> None:
    recording = recorded(width=4)
    picture = viz.figure(IMAGE, recording, queries)
    picture.savefig(tmp_path / "points.png")
    *panels, bar = picture.axes
    assert len(panels) == (1 if isinstance(queries, int) else 3)
    limits = {axes.collections[0].get_clim() for axes in panels}
    largest = max(drawn_points(axes)[1].max() for axes in panels)
    assert limits == {(0, largest)}
    assert bar.get_ylim() == (0, largest)

    (legend,) = picture.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("level 0 (8 x 6)", "level 1 (4 x 3)", "reference point", "reference box")
    ]
    frame = legend.get_window_extent()
    for axes in (*panels, bar):
        assert not frame.overlaps(axes.get_tightbbox())
    assert picture.bbox.containsx(frame.x0)
    assert picture.bbox.containsx(frame.x1)

    pixels = imread(tmp_path / "points.png")[..., :3]
    height = pixels.shape[0]
    for axes in panels:  # the point of largest weight has its colour in the saved picture
        colour = np.asarray(axes.collections[0].to_rgba([drawn_points(axes)[1].max()]))[0, :3]
        x, y = axes.transData.transform(drawn_points(axes)[0][-1])
        np.testing.assert_allclose(pixels[height - 1 - int(y), int(x)], colour, atol=0.01)
    assert picture._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recorded()
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert viz.choose_query(recorded(), IMAGE, pixel=(3, 4)) in range(Q)
    for function in (viz.draw, viz.figure):
        with pytest.raises(ImportError, match=r"pip install \"deform_attn\[viz\]\""):
            function(IMAGE, recording, 0)
