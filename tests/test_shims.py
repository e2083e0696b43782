"""install_shims, with small packages that import a compiled extension as older repositories do.

Each package is written from the signature of the extension that it calls and does not import
deform_attn.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import deform_attn
from deform_attn.integrations import install_shims
from deform_attn.testing import CASES, DTYPES, Dtypes, OpInputs, check_results, grad_output_for
from tests.runners import Runner, package

FUNCTION = """
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

class {name}(Function):
    @staticmethod
    def forward(ctx, value, shapes, start, locations, weights, im2col_step):
        ctx.im2col_step = im2col_step
        output = {extension}.ms_deform_attn_forward({forward})
        ctx.save_for_backward(value, shapes, start, locations, weights)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        value, shapes, start, locations, weights = ctx.saved_tensors
        {backward}
        return grads[0], None, None, grads[1], grads[2], None
"""
POSITIONAL = {
    "forward": "value, shapes, start, locations, weights, ctx.im2col_step",
    "backward": "grads = {extension}.ms_deform_attn_backward("
    "value, shapes, start, locations, weights, grad_output, ctx.im2col_step)",
}
MMCV = {
    "forward": "value, shapes, start, locations, weights, im2col_step=ctx.im2col_step",
    "backward": "grads = [torch.zeros_like(t) for t in (value, locations, weights)]\n        "
    "assert {extension}.ms_deform_attn_backward("
    "value, shapes, start, locations, weights, grad_output.contiguous(), *grads, "
    "im2col_step=ctx.im2col_step) is None",
}
# package: (import of the extension, (its name there, name of the Function, how it is called))
PEERS = {
    "deformable_detr": (
        "import MultiScaleDeformableAttention as MSDA",
        ("MSDA", "MSDeformAttnFunction", POSITIONAL),
    ),
    "groundingdino": (
        "import warnings\n"
        "try:\n"
        "    from groundingdino import _C\n"
        "except:\n"
        "    warnings.warn('no custom ops')",
        ("_C", "MultiScaleDeformableAttnFunction", POSITIONAL),
    ),
    "detrex": (
        "from detrex import _C",
        ("_C", "MultiScaleDeformableAttnFunction", POSITIONAL),
    ),
    "mmcv": (
        "import importlib\n"
        "_ext = importlib.import_module('mmcv.' + '_ext')\n"
        "for name in ('ms_deform_attn_forward', 'ms_deform_attn_backward', 'roi_align_forward'):\n"
        "    assert hasattr(_ext, name), f'{name} miss in module _ext'",
        ("_ext", "MultiScaleDeformableAttnFunction", MMCV),
    ),
}
SHIMS = {
    "deformable_detr": "MultiScaleDeformableAttention",
    "groundingdino": "groundingdino._C",
    "detrex": "detrex._C",
    "mmcv": "mmcv._ext",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path with a package per peer; their imports are undone after the test."""
    for name, (imports, (extension, function, calls)) in PEERS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        calls = {key: call.format(extension=extension) for key, call in calls.items()}
        body = FUNCTION.format(name=function, extension=extension, **calls)
        (folder / "ops.py").write_text(f"{imports}\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in (*PEERS, "MultiScaleDeformableAttention"):
            del sys.modules[name]


def function_of(peer: str) -> Any:
    return getattr(importlib.import_module(f"{peer}.ops"), PEERS[peer][1][1])


@pytest.mark.only(runners=package, dtypes=["f32", "bf16"], cases=["non_square"], slow=None)
@pytest.mark.parametrize("peer", PEERS)
def test_unmodified_checkout(
    runner: Runner, dtypes: Dtypes, case: Any, peer: str, checkout: Path
) -> None:
    """Forward and backward through the repository's autograd Function, against the oracle."""
    with install_shims(override=True) as shims:
        assert SHIMS[peer] in shims.installed
        function = function_of(peer)
        inputs = case.make(dtypes, runner.device).leaves()
        grad_output = grad_output_for(inputs)
        with deform_attn.use_backend(str(runner.backend)):
            output = function.apply(*inputs.arguments, 64)
            output.backward(grad_output)
    assert function.__module__ == f"{peer}.ops"
    found = (output.detach(), *(tensor.grad for tensor in inputs.tensors))
    check_results(found, inputs, grad_output)


@pytest.mark.parametrize("peer", PEERS)
def test_gradcheck_through_the_checkout(peer: str, checkout: Path) -> None:
    inputs = CASES["one_of_each"].make(DTYPES["f64"]).leaves()
    with install_shims(SHIMS[peer], override=True):
        function = function_of(peer)
        assert torch.autograd.gradcheck(
            lambda *tensors: function.apply(*inputs.replace_tensors(*tensors).arguments, 1),
            inputs.tensors,
        )


@pytest.mark.parametrize("name", ["MSDeformAttnFunction", "MultiScaleDeformableAttnFunction"])
def test_function_of_the_extension(name: str) -> None:
    inputs = CASES["non_square"].make(DTYPES["f32"]).leaves()
    with install_shims(override=True):
        function = getattr(importlib.import_module("MultiScaleDeformableAttention"), name)
    output = function.apply(*inputs.arguments, 64)
    assert torch.equal(output, deform_attn.ms_deform_attn(*inputs.arguments))
    assert all(g is not None for g in torch.autograd.grad(output.sum(), inputs.tensors))


def mixed(inputs: OpInputs) -> OpInputs:
    """The dtypes of autocast: value in 16 bits, locations in a wider dtype."""
    return inputs.replace(
        value=inputs.value.bfloat16(), sampling_locations=inputs.sampling_locations.double()
    )


def test_gradients_have_the_dtypes_of_their_tensors() -> None:
    inputs = mixed(CASES["non_square"].make(DTYPES["f32"]))
    with install_shims(override=True):
        extension = importlib.import_module("MultiScaleDeformableAttention")
        output = extension.ms_deform_attn_forward(*inputs.arguments, 64)
        grads = extension.ms_deform_attn_backward(*inputs.arguments, torch.ones_like(output), 64)
    assert isinstance(grads, list)
    for grad, tensor in zip(grads, inputs.tensors):
        assert (grad.dtype, grad.shape) == (tensor.dtype, tensor.shape)


def test_bad_calls_name_the_argument() -> None:
    inputs = CASES["non_square"].make(DTYPES["f32"])
    with install_shims(override=True):
        extension = importlib.import_module("MultiScaleDeformableAttention")
        bad = inputs.replace(attention_weights=inputs.attention_weights[:, :4])
        with pytest.raises(ValueError, match="^attention_weights: expected"):
            extension.ms_deform_attn_forward(*bad.arguments, 64)
        with pytest.raises(ValueError, match="^attention_weights: expected"):
            extension.ms_deform_attn_backward(*bad.arguments, grad_output_for(inputs), 64)
        with pytest.raises((ValueError, RuntimeError), match="grad_output"):
            extension.ms_deform_attn_backward(*inputs.arguments, grad_output_for(inputs)[:, :4], 64)


def test_other_operators_of_mmcv_raise() -> None:
    with install_shims("mmcv._ext", override=True):
        extension = importlib.import_module("mmcv._ext")
        with pytest.raises(NotImplementedError, match=r"mmcv._ext.roi_align_forward"):
            extension.roi_align_forward(1, 2)
        assert not hasattr(extension, "__path__")
    with install_shims("detrex._C", override=True):
        assert not hasattr(importlib.import_module("detrex._C"), "dcn_v3_forward")


@pytest.mark.parametrize("imported", [False, True])
def test_an_installed_extension_is_kept(checkout: Path, imported: bool) -> None:
    """It is found without importing its package; override replaces it until the block ends."""
    for file in ("MultiScaleDeformableAttention.py", "mmcv/_ext.py"):
        (checkout / file).write_text("real = True")
    (checkout / "mmcv" / "__init__.py").write_text("from mmcv import ops")
    (checkout / "mmcv" / "ops.py").write_text("from mmcv import _ext")
    importlib.invalidate_caches()
    if imported:
        importlib.import_module("mmcv")
        importlib.import_module("MultiScaleDeformableAttention")
    with install_shims() as shims:
        assert set(shims.installed) == {"groundingdino._C", "detrex._C"}
        assert set(shims.left) == {"MultiScaleDeformableAttention", "mmcv._ext"}
        for reason in shims.left.values():
            assert "the extension is installed" in reason
            assert str(checkout) in reason
        assert ("mmcv" in sys.modules) is imported
        assert importlib.import_module("mmcv._ext").real
    with install_shims(override=True) as shims:
        assert set(shims.installed) == set(SHIMS.values())
        assert not hasattr(importlib.import_module("MultiScaleDeformableAttention"), "real")
    for name in ("MultiScaleDeformableAttention", "mmcv._ext"):
        assert importlib.import_module(name).real


def test_report_and_removal() -> None:
    before = dict(sys.modules)
    first = install_shims(override=True)
    second = install_shims()
    assert not second.installed
    assert set(second.left.values()) == {"deform_attn is registered already"}
    assert "MultiScaleDeformableAttention: deform_attn" in str(first)
    assert "mmcv._ext: left, deform_attn is registered already" in str(second)
    assert importlib.util.find_spec("MultiScaleDeformableAttention") is not None
    second.remove()
    assert "mmcv._ext" in sys.modules
    first.remove()
    first.remove()
    assert {n for n in set(sys.modules) - set(before) if n in SHIMS.values()} == set()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"names: expected one of .*mmcv._ext.*'mmcv'"):
        install_shims("mmcv")
