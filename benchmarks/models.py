"""Whole models on a photograph, as they ship and with deform_attn in place of their own op.

The models are Hugging Face's, built from configurations with random weights: nothing is downloaded.
The photograph is one that matplotlib's wheel carries. Random initialisation leaves all attention
weights equal and all offsets the same for every query; both are spread here, so that a wrong order
of points would show in the outputs and memory is read as a trained model reads it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import deform_attn

SIZE = 640  # height and width of the image
LARGEST_DIFFERENCE = 1e-4  # of the outputs, over their largest magnitude
MODELS = ("deformable_detr", "mask2former")


def measure_model(
    name: str,
    device: str = "cpu",
    *,
    rounds: int = 5,
    size: int = SIZE,
    seed: int = 0,
    tick: Callable[..., None] = lambda text=None: None,
) -> dict[str, Any]:
    """Outputs and whole-model times of both, in turn; all threads that PyTorch has."""
    row: dict[str, Any] = {
        "model": f"{name} r50",
        "image": f"{size}x{size}",
        "device": device,
        "threads": torch.get_num_threads(),
    }
    try:
        import transformers
    except ImportError as error:
        return {**row, "status": "missing", "reason": f"transformers is not installed ({error})"}
    row["transformers"] = transformers.__version__
    image = photograph(size).to(device)
    tick("building")
    model = build(name, seed).to(device)
    stock_times: list[float] = []
    ours: list[float] = []
    with torch.inference_mode():
        tick("checking")
        expected = _outputs(model(image))
        with replaced(model):
            got = _outputs(model(image))
        difference = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)
        )
        if not difference <= LARGEST_DIFFERENCE:
            reason = f"outputs differ by {difference:.1e}, more than {LARGEST_DIFFERENCE:.0e}"
            return {**row, "status": "wrong", "difference": difference, "reason": reason}
        tick("timing")
        for _ in range(rounds):
            stock_times.append(_seconds(model, image))
            with replaced(model):
                ours.append(_seconds(model, image))
            tick()
        share = _share_of_op(model, image)
    return {
        **row,
        "status": "ok",
        "difference": difference,
        "share": share,
        "times": {"stock": stock_times, "deform_attn": ours},
    }


def photograph(size: int = SIZE) -> Tensor:
    """[1, 3, size, size]: a photograph, normalised as for ImageNet."""
    from matplotlib import cbook
    from PIL import Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        pixels = np.asarray(Image.open(file).convert("RGB").resize((size, size)))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return (image - mean[:, None, None]) / deviation[:, None, None]


def build(name: str, seed: int = 0) -> nn.Module:
    """A model with a ResNet-50 backbone and random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    if name == "deformable_detr":
        backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
        config = transformers.DeformableDetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone
        )
        model = transformers.DeformableDetrForObjectDetection(config)
    elif name == "mask2former":
        stages = ["stage1", "stage2", "stage3", "stage4"]
        config = transformers.Mask2FormerConfig(
            backbone_config=transformers.ResNetConfig(out_features=stages)
        )
        model = transformers.Mask2FormerModel(config)  # without its loss, which wants scipy
    else:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    for module in model.modules():
        if isinstance(getattr(module, "sampling_offsets", None), nn.Linear):
            nn.init.normal_(module.sampling_offsets.weight, std=0.05)
            nn.init.normal_(module.attention_weights.weight, std=0.05)
    return model.eval()


@contextlib.contextmanager
def replaced(model: nn.Module, op: Callable[..., Tensor] | None = None) -> Iterator[None]:
    """The model with another op inside a `with` block, deform_attn's unless one is given.

    Deformable DETR calls a parameter-free child module, Mask2Former a function of its module.
    """
    call = op or _deform_attn
    name = "MultiScaleDeformableAttention"
    children = [child for child in model.modules() if type(child).__name__ == name]
    if children:

        def forward(
            value: Tensor,
            value_spatial_shapes: Tensor,
            value_spatial_shapes_list: list[tuple[int, int]],
            level_start_index: Tensor,
            sampling_locations: Tensor,
            attention_weights: Tensor,
            im2col_step: int,
        ) -> Tensor:
            return call(value, value_spatial_shapes_list, sampling_locations, attention_weights)

        for child in children:
            child.forward = forward
        try:
            yield
        finally:
            for child in children:
                del child.forward
        return
    from transformers.models.mask2former import modeling_mask2former as module

    stock = module.multi_scale_deformable_attention
    module.multi_scale_deformable_attention = call
    try:
        yield
    finally:
        module.multi_scale_deformable_attention = stock


def _deform_attn(
    value: Tensor, shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    return deform_attn.ms_deform_attn(value, shapes, None, sampling_locations, attention_weights)


def _outputs(output: Any) -> list[Tensor]:
    """Class scores and boxes, or pixel features, query features and masks."""
    names = (
        *("logits", "pred_boxes"),
        *("pixel_decoder_last_hidden_state", "transformer_decoder_last_hidden_state"),
    )
    return [output[name].float() for name in names if name in output]


def _seconds(model: nn.Module, image: Tensor) -> float:
    if image.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(image)
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _share_of_op(model: nn.Module, image: Tensor) -> float:
    """Part of the time of the model as shipped that its own op takes."""
    from transformers.models.mask2former import modeling_mask2former as module

    stock = module.multi_scale_deformable_attention  # Deformable DETR's module computes the same
    spent = 0.0

    def timed(*inputs: Any) -> Tensor:
        nonlocal spent
        if image.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        output: Tensor = stock(*inputs)
        if image.is_cuda:
            torch.cuda.synchronize()
        spent += time.perf_counter() - start
        return output

    with replaced(model, timed):
        whole = _seconds(model, image)
    return spent / whole
