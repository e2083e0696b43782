"""Whole models on a photograph, as shipped and with deform_attn's operator.

The models are those of transformers, built from configurations with random weights; nothing is
downloaded. The photograph comes with matplotlib. The initial weights of these models make all
attention weights equal and all offsets the same for every query. They are drawn at random here, so
that a wrong order of points changes the outputs and memory is accessed as in a trained model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from deform_attn.integrations import accelerate, adapters, restore

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
    """Compare the outputs of both, and time both in turn, with all of PyTorch's threads."""
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
        with accelerated(model):
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
            with accelerated(model):
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
        model = transformers.Mask2FormerModel(
            config
        )  # not the class with a loss, which needs scipy
    else:
        raise ValueError(f"name: expected one of {', '.join(MODELS)}, got {name!r}")
    for module in model.modules():
        if isinstance(getattr(module, "sampling_offsets", None), nn.Linear):
            nn.init.normal_(module.sampling_offsets.weight, std=0.05)
            nn.init.normal_(module.attention_weights.weight, std=0.05)
    return model.eval()


@contextlib.contextmanager
def accelerated(model: nn.Module) -> Iterator[None]:
    """The model with deform_attn's operator inside a `with` block."""
    _, report = accelerate(model)
    if not report.replaced or report.left:
        raise RuntimeError(str(report))
    try:
        yield
    finally:
        restore(model)


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
    """The op's share of the time of the model as shipped."""
    from transformers.models.mask2former import modeling_mask2former as module

    spent = 0.0

    def timed(
        value: Tensor, shapes: Any, _: None, locations: Tensor, weights: Tensor, **options: Any
    ) -> Tensor:
        nonlocal spent
        if image.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        # Deformable DETR's module computes the same
        output: Tensor = module.multi_scale_deformable_attention(value, shapes, locations, weights)
        if image.is_cuda:
            torch.cuda.synchronize()
        spent += time.perf_counter() - start
        return output

    with accelerated(model), mock.patch.object(adapters, "ms_deform_attn", timed):
        whole = _seconds(model, image)
    return spent / whole
