"""Bad calls: each is refused with an error that names the argument, what was expected, what came."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deform_attn
from deform_attn.testing import CASES, DTYPES, Dtypes, FusedInputs, OpInputs, grad_output_for
from tests.runners import Runner, operators, package

Edit = Callable[[OpInputs], dict[str, Any]]  # what of a good call to replace


@dataclass(frozen=True)
class Bad:
    name: str
    edit: Edit
    argument: str  # the error begins with it
    contains: tuple[str, ...]  # parts of the message: what was expected, what came
    error: type[Exception] = ValueError
    case: str = "non_square"  # levels ((5, 7), (3, 4), (2, 1)), B 2, Q 5, M 2, D 8, P 2, S 49


def shapes_with(*row: int) -> Edit:
    """The first level replaced."""
    return lambda i: {
        "spatial_shapes": torch.cat([torch.tensor([row]), i.spatial_shapes[1:]]),
    }


def starts_with(start: int) -> Edit:
    return lambda i: {
        "level_start_index": torch.cat([torch.tensor([start]), i.level_start_index[1:]])
    }


def value(change: Callable[[torch.Tensor], Any]) -> Edit:
    return lambda i: {"value": change(i.value)}


def locations(change: Callable[[torch.Tensor], Any]) -> Edit:
    return lambda i: {"sampling_locations": change(i.sampling_locations)}


def weights(change: Callable[[torch.Tensor], Any]) -> Edit:
    return lambda i: {"attention_weights": change(i.attention_weights)}


def const(**changes: Any) -> Edit:
    return lambda i: changes


TENSORS = [
    Bad("value of 3 dimensions", value(lambda t: t[0]), "value", ("4 dimensions", "(49, 2, 8)")),
    Bad(
        "value of 5 dimensions",
        value(lambda t: t[None]),
        "value",
        ("4 dimensions", "(1, 2, 49, 2, 8)"),
    ),
    Bad("value of integers", value(torch.Tensor.int), "value", ("float32", "torch.int32")),
    Bad("value complex", value(lambda t: t + 0j), "value", ("float32", "complex")),
    Bad("value bool", value(torch.Tensor.bool), "value", ("float32", "torch.bool")),
    Bad("no heads", value(lambda t: t[:, :, :0]), "value", ("head", "(2, 49, 0, 8)")),
    Bad("no channels", value(lambda t: t[..., :0]), "value", ("channel", "(2, 49, 2, 0)")),
    Bad(
        "locations of 5 dimensions",
        locations(lambda t: t.flatten(3, 4)),
        "sampling_locations",
        ("num_levels", "(2, 5, 2, 6, 2)"),
    ),
    Bad("locations of 3", locations(lambda t: t[0, 0, 0]), "sampling_locations", ("(3, 2, 2)",)),
    Bad(
        "locations of three coordinates",
        locations(lambda t: torch.cat([t, t[..., :1]], -1)),
        "sampling_locations",
        ("2]", "(2, 5, 2, 3, 2, 3)"),
    ),
    Bad(
        "batch of locations",
        locations(lambda t: t[:1]),
        "sampling_locations",
        ("batch 2", "(1, 5,"),
    ),
    Bad(
        "heads of locations",
        locations(lambda t: t[:, :, :1]),
        "sampling_locations",
        ("num_heads 2", "(2, 5, 1,"),
    ),
    Bad(
        "levels of locations",
        locations(lambda t: t[:, :, :, :2]),
        "sampling_locations",
        ("num_levels 3", "(2, 5, 2, 2,"),
    ),
    Bad(
        "locations of integers",
        locations(torch.Tensor.long),
        "sampling_locations",
        ("floating", "torch.int64"),
    ),
    Bad("locations complex", locations(lambda t: t + 0j), "sampling_locations", ("complex",)),
    Bad(
        "queries of weights",
        weights(lambda t: t[:, :4]),
        "attention_weights",
        ("(2, 5, 2, 3, 2)", "(2, 4, 2, 3, 2)"),
    ),
    Bad(
        "weights flattened",
        weights(lambda t: t.flatten(3)),
        "attention_weights",
        ("(2, 5, 2, 3, 2)", "(2, 5, 2, 6)"),
    ),
    Bad(
        "points of weights",
        weights(lambda t: t[..., :1]),
        "attention_weights",
        ("(2, 5, 2, 3, 2)", "(2, 5, 2, 3, 1)"),
    ),
    Bad(
        "weights of integers",
        weights(torch.Tensor.long),
        "attention_weights",
        ("floating", "int64"),
    ),
    Bad("value on another device", value(lambda t: t.to("meta")), "value", ("meta",)),
    Bad(
        "locations on another device",
        locations(lambda t: t.to("meta")),
        "sampling_locations",
        ("meta",),
    ),
    Bad(
        "weights on another device",
        weights(lambda t: t.to("meta")),
        "attention_weights",
        ("meta",),
    ),
]
METADATA = [
    Bad(
        "shapes of floats",
        lambda i: {"spatial_shapes": i.spatial_shapes.float()},
        "spatial_shapes",
        ("integer", "float32"),
    ),
    Bad(
        "shapes of 1 dimension",
        lambda i: {"spatial_shapes": i.spatial_shapes.flatten()},
        "spatial_shapes",
        ("[num_levels, 2]", "(6,)"),
    ),
    Bad(
        "shapes of triples",
        lambda i: {"spatial_shapes": i.spatial_shapes[:, [0, 1, 1]]},
        "spatial_shapes",
        ("[num_levels, 2]", "(3, 3)"),
    ),
    Bad(
        "no levels",
        const(spatial_shapes=torch.zeros(0, 2, dtype=torch.long)),
        "spatial_shapes",
        ("at least one",),
    ),
    Bad(
        "starts of floats",
        lambda i: {"level_start_index": i.level_start_index.float()},
        "level_start_index",
        ("integer", "float32"),
    ),
    Bad(
        "starts of 2 dimensions",
        lambda i: {"level_start_index": i.level_start_index[None]},
        "level_start_index",
        ("[num_levels]", "(1, 3)"),
    ),
    Bad(
        "too few starts",
        lambda i: {"level_start_index": i.level_start_index[:2]},
        "level_start_index",
        ("3", "2"),
    ),
    Bad("height zero", shapes_with(0, 7), "spatial_shapes", ("(0, 7)", "level 0")),
    Bad("negative height", shapes_with(-5, 7), "spatial_shapes", ("(-5, 7)", "level 0")),
    Bad("negative sides", shapes_with(-5, -7), "spatial_shapes", ("(-5, -7)", "level 0")),
    Bad("side of 2**31", shapes_with(2**31, 1), "spatial_shapes", (str(2**31), "level 0")),
    Bad("side of 2**63 - 1", shapes_with(1, 2**63 - 1), "spatial_shapes", (str(2**63 - 1),)),
    Bad("product past 2**63", shapes_with(2**32, 2**32), "spatial_shapes", (str(2**32), "level 0")),
    Bad(
        "product of 2**62",
        shapes_with(2**31 - 1, 2**31 - 1),
        "level_start_index",
        ("49", "level 0"),
    ),
    Bad("level too large", shapes_with(5, 10), "level_start_index", ("49", "50", "level 0")),
    Bad(
        "levels past the rows",
        lambda i: {"level_start_index": None, "value": i.value[:, :48]},
        "spatial_shapes",
        ("48", "49", "level 2"),
    ),
    Bad("negative start", starts_with(-1), "level_start_index", ("-1", "level 0")),
    Bad("start past the rows", starts_with(15), "level_start_index", ("50", "49", "level 0")),
    Bad("start of 2**63 - 1", starts_with(2**63 - 1), "level_start_index", ("level 0", "49")),
]
LISTED = [
    Bad(
        "listed counts for uniform locations",
        const(num_points=[2, 2, 2]),
        "sampling_locations",
        ("sum of num_points", "(2, 5, 2, 3, 2, 2)"),
    ),
    *(
        Bad(name, const(num_points=counts), argument, contains, case="listed_points")  # [3, 6, 3]
        for name, counts, argument, contains in [
            ("sum too small", [3, 6, 2], "sampling_locations", ("11", "(2, 5, 2, 12, 2)")),
            ("sum too large", [3, 6, 4], "sampling_locations", ("13", "(2, 5, 2, 12, 2)")),
            ("negative count", [13, -4, 3], "num_points", ("-4",)),
            ("too few counts", [6, 6], "num_points", ("3 counts", "[6, 6]")),
            ("too many counts", [3, 3, 3, 3], "num_points", ("3 counts", "[3, 3, 3, 3]")),
            ("counts past 2**63", [2**63, 2**63, 2**63], "", ()),
            ("sum wraps to 12", [2**62, 2**62, 2**63 - 1], "", ()),
            ("no counts", [], "num_points", ("3 counts", "[]")),
        ]
    ),
]
# only the Python call takes these: an operator's schema refuses them by itself
PYTHON = [
    Bad("value a list", value(torch.Tensor.tolist), "value", ("tensor", "list"), TypeError),
    Bad("locations None", locations(lambda t: None), "sampling_locations", ("tensor", "NoneType"), TypeError),
    Bad("weights a number", weights(lambda t: 1.0), "attention_weights", ("tensor", "float"), TypeError),
    Bad("shapes a number", const(spatial_shapes=3), "spatial_shapes", ("int",), TypeError),
    Bad("shapes None", const(spatial_shapes=None), "spatial_shapes", ("NoneType",), TypeError),
    Bad("starts a number", const(level_start_index=0), "level_start_index", ("0",), TypeError),
    Bad("starts of float list", const(level_start_index=[0.0, 35.0, 47.0]), "level_start_index", ("0.0",), TypeError),
    Bad("no listed levels", const(spatial_shapes=[], level_start_index=None), "spatial_shapes", ("at least one",)),
    Bad("listed triples", const(spatial_shapes=[(5, 7, 1)] * 3), "spatial_shapes", ("(5, 7, 1)",)),
    Bad("listed fractions", const(spatial_shapes=[(5.5, 7)] * 3), "spatial_shapes", ("5.5",)),
    Bad("listed text", const(spatial_shapes=["57"] * 3), "spatial_shapes", ("'5'",)),
    Bad("listed numbers", const(spatial_shapes=[5, 7, 3]), "spatial_shapes", (), TypeError),
    Bad("one number lost", const(spatial_shapes=[(5, 7), (3,), (2, 1)]), "spatial_shapes", ("(3,)",)),
    Bad("pairs cut elsewhere", const(spatial_shapes=[(5,), (7, 3), (4, 2, 1)]), "spatial_shapes", ("(5,)",)),
    Bad("listed zero", const(spatial_shapes=[(5, 7), (0, 4), (2, 1)]), "spatial_shapes", ("(0, 4)", "level 1")),
    Bad("listed negative", const(spatial_shapes=[(5, 7), (3, 4), (2, -1)]), "spatial_shapes", ("(2, -1)", "level 2")),
    Bad("listed past 2**63", const(spatial_shapes=[(10**30, 1), (3, 4), (2, 1)]), "spatial_shapes", (str(10**30), "level 0")),
    Bad("listed too large", const(spatial_shapes=[(5, 7), (3, 4), (2, 2)], level_start_index=None), "spatial_shapes", ("51", "49", "level 2")),
    Bad("listed starts too few", const(level_start_index=[0, 35]), "level_start_index", ("3", "2")),
    Bad("listed start negative", const(level_start_index=[0, 35, -1]), "level_start_index", ("-1", "level 2")),
    Bad("listed start past 2**63", const(level_start_index=[0, 35, 10**30]), "level_start_index", ("level 2",)),
    Bad("counts a number", const(num_points=2), "num_points", ("list", "2")),
    Bad("counts of floats", const(num_points=[3.0, 6.0, 3.0]), "num_points", ("3.0",), case="listed_points"),
    Bad("value sparse", value(torch.Tensor.to_sparse), "value", ("dense", "torch.sparse_coo", "to_dense()")),
    Bad("weights of rows", weights(lambda t: t.flatten(1).to_sparse_csr()), "attention_weights", ("dense", "torch.sparse_csr")),
    Bad("locations nested", locations(lambda t: torch.nested.nested_tensor(list(t))), "sampling_locations", ("dense", "nested")),
    Bad("value jagged", value(lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged)), "value", ("dense", "nested")),
    Bad("value quantized", value(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)), "value", ("dense", "quantized", "dequantize()")),
    Bad("shapes sparse", lambda i: {"spatial_shapes": i.spatial_shapes.to_sparse()}, "spatial_shapes", ("dense", "sparse")),
    Bad("starts sparse", lambda i: {"level_start_index": i.level_start_index.to_sparse()}, "level_start_index", ("dense", "sparse")),
    Bad("mask sparse", lambda i: {"value_mask": torch.ones(i.value.shape[:2]).bool().to_sparse()}, "value_mask", ("dense", "sparse")),
    Bad("mask of another device", lambda i: {"value_mask": torch.ones(i.value.shape[:2], device="meta").bool()}, "value_mask", ("meta",)),
    Bad("numpy value", value(torch.Tensor.numpy), "value", ("tensor", "ndarray"), TypeError),
]  # fmt: skip


def names(table: list[Bad]) -> Any:
    return pytest.mark.parametrize("bad", table, ids=lambda bad: bad.name.replace(" ", "_"))


@pytest.mark.only(runners=package, dtypes=["f32"])
@names([*TENSORS, *METADATA, *LISTED, *PYTHON])
@pytest.mark.parametrize("with_gradients", [False, True], ids=["", "with_gradients"])
def test_error_names_the_argument(
    runner: Runner, dtypes: Dtypes, bad: Bad, with_gradients: bool
) -> None:
    inputs = CASES[bad.case].make(dtypes, runner.device)
    if with_gradients:
        inputs = inputs.leaves()
        changes = torch.no_grad()(bad.edit)(inputs)
        for name, tensor in changes.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype == dtypes.value:
                changes[name] = tensor.detach().requires_grad_()
    else:
        changes = bad.edit(inputs)
    call = inputs.replace(**changes)
    with pytest.raises(bad.error) as caught:
        runner.call(call)
    message = str(caught.value)
    assert type(caught.value) is bad.error
    assert message.startswith(f"{bad.argument}:" if bad.argument else "")
    for words in bad.contains:
        assert words in message


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offset_scale": "half"}, TypeError, "offset_scale: expected a number, got 'half'"),
        ({"offset_scale": None}, TypeError, "offset_scale: expected a number, got None"),
        ({"offset_scale": math.nan}, ValueError, "offset_scale: expected a finite number, got nan"),
        ({"official_clamp": "yes"}, TypeError, "official_clamp: expected True or False, got 'yes'"),
        (
            {"method": "discrete", "official_clamp": "yes"},
            TypeError,
            "official_clamp: expected True or False, got 'yes'",
        ),
        ({"method": "nearest"}, ValueError, "method: expected 'default' or 'discrete', got 'nea"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_option_of_another_type_is_named(
    options: dict[str, Any], error: type[Exception], message: str, backend: str | None
) -> None:
    fused = FusedInputs.draw(torch.float32, size=4)
    with pytest.raises(error, match=f"^{message}"):
        deform_attn.ms_deform_attn_fused(*fused.arguments, backend=backend, **options)


@pytest.mark.only(runners=package, dtypes=["f32"])
@names([*TENSORS, *METADATA, *LISTED])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_operators_refuse_too(runner: Runner, dtypes: Dtypes, bad: Bad, direction: str) -> None:
    """Called through torch.ops, where nothing was checked before the kernel."""
    inputs = CASES[bad.case].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    inputs = inputs.replace(**bad.edit(inputs))
    forward, backward = operators(runner)
    with pytest.raises((RuntimeError, ValueError, TypeError, OverflowError)) as caught:
        if direction == "forward":
            forward(*inputs.arguments, None, inputs.num_points)
        else:
            backward(grad_output, *inputs.arguments, None, inputs.num_points, False, [True] * 3)
    if runner.backend == "compiled" and bad.argument and str(2**63) not in str(bad.contains):
        assert bad.argument in str(caught.value)


@pytest.mark.only(runners=package, dtypes=["f32"])
@pytest.mark.parametrize(
    "change",
    {
        "shape": lambda g: g[:, :-1],
        "rank": lambda g: g[0],
        "channels": lambda g: g[..., :-1],
        "dtype": torch.Tensor.double,
        "device": lambda g: g.to("meta"),
    }.items(),
    ids=lambda item: item[0],
)
def test_backward_refuses_a_wrong_grad_output(
    runner: Runner, dtypes: Dtypes, change: tuple[str, Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    with pytest.raises((RuntimeError, ValueError), match="grad_output"):
        operators(runner)[1](
            change[1](grad_output_for(inputs)), *inputs.arguments, None, None, False, [True] * 3
        )


@pytest.mark.only(runners=package, dtypes=["f32"])
@pytest.mark.parametrize("flags", [0, 2, 4])
def test_backward_refuses_another_number_of_flags(
    runner: Runner, dtypes: Dtypes, flags: int
) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    grad_output = grad_output_for(inputs)
    with pytest.raises((RuntimeError, ValueError), match=f"expected 3 flags, got {flags}"):
        operators(runner)[1](grad_output, *inputs.arguments, None, None, False, [True] * flags)


@pytest.mark.only(runners=package, dtypes=["f32"])
@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [("tensor", [5, 7, 3, 4, 2, 1]), (None, None), (None, [5, 7, 3, 4, 2]), (None, [])],
    ids=["both", "neither", "odd", "empty"],
)
def test_operators_take_levels_once(
    runner: Runner, dtypes: Dtypes, shapes: str | None, sizes: list[int] | None
) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    if shapes is None:
        inputs = inputs.replace(spatial_shapes=None)
    for op, first, last in zip(
        operators(runner), ((), (grad_output_for(inputs),)), ((), (False, [True] * 3))
    ):
        with pytest.raises((RuntimeError, ValueError)):
            op(*first, *inputs.arguments, sizes, None, *last)


@pytest.mark.only(runners=package, dtypes=["f32"])
def test_metadata_on_another_device_than_value_or_cpu(runner: Runner, dtypes: Dtypes) -> None:
    inputs = CASES["non_square"].make(dtypes, runner.device)
    for name in ("spatial_shapes", "level_start_index"):
        bad = inputs.replace(**{name: getattr(inputs, name).to("meta")})
        with pytest.raises(ValueError, match=f"^{name}: expected on value's device .* got meta"):
            runner.call(bad)


def test_the_good_call_of_the_table_is_good() -> None:
    """Or every error above could come from something else."""
    for case in ("non_square", "listed_points"):
        inputs = CASES[case].make(DTYPES["f32"])
        output = deform_attn.ms_deform_attn(*inputs.arguments, num_points=inputs.num_points)
        assert output.shape == (2, 5, 16)


def test_largest_image_on_a_cpu() -> None:
    """One of 2**31 numbers is refused, a smaller one is read to its end."""
    rows, heads, head_dim = 2**26, 8, 4
    # memory that is taken only where it is written to
    memory = mmap.mmap(-1, 2 * 2**31, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    value = torch.frombuffer(memory, dtype=torch.float16).view(1, rows, heads, head_dim)
    locations, weights = torch.rand(1, 3, heads, 1, 2, 2), torch.rand(1, 3, heads, 1, 2)
    value[:, -5:-1] = pixels = torch.rand(1, 4, heads, head_dim).half()

    def call(value: torch.Tensor, start: int) -> torch.Tensor:
        return deform_attn.ms_deform_attn(
            value, [(2, 2)], [start], locations, weights, backend="compiled"
        )

    refused = pytest.raises(
        RuntimeError, match=r"^value: expected fewer than 2\*\*31 numbers .* 2147483648"
    )
    with refused:
        call(value, rows - 5)
    grad = torch.zeros(1, 3, heads * head_dim).half()
    levels = (None, torch.tensor([rows - 5]))
    sizes = ([2, 2], None)
    points = (torch.rand(1, 3, 1, 2), locations.half(), weights.half())
    ops = torch.ops.deform_attn
    with refused:
        ops.ms_deform_attn(value, *levels, locations, weights, *sizes)
    with refused:
        ops.ms_deform_attn_backward(
            grad, value, *levels, locations, weights, *sizes, False, [True] * 3
        )
    with refused:
        ops.ms_deform_attn_fused(value, *levels, *points, *sizes, 0.5)
    with refused:
        ops.ms_deform_attn_fused_backward(
            grad, value, *levels, *points, *sizes, 0.5, False, [True] * 4
        )
    assert torch.equal(call(value[:, :-1], rows - 5), call(pixels, 0))
