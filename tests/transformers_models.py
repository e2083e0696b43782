"""A small model of every type of transformers that has the operator, built without a download.

The default initialisation would hide a wrong operator: in some models it contributes 1e-12 of the
output, all attention weights are equal and all points lie on pixel centres, where gradients jump.
`build` draws weights that keep the scale of the signal and spread the points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HEIGHT, WIDTH = 64, 96
BATCH, LABELS = 2, 5


@dataclass(frozen=True)
class Small:
    """A model type: how to build it, and its inputs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    # its training loss creates float32 tensors, so float64 gradients are taken in evaluation mode
    float32_training: bool = False

    @property
    def model_type(self) -> str:
        return self.name.removesuffix("_discrete")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype, for the tensors that models create."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(small: Small, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in evaluation mode, with the same random weights each time."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with default_dtype(dtype):
        model = small.build()
        for name, module in model.named_modules():
            _draw(name, module)
        with torch.no_grad():
            model.train()(**without_labels(inputs_of(small, dtype)))
    return model.eval()


def _draw(name: str, module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        points = name.endswith(("sampling_offsets", "attention_weights"))
        gain = 1.0 if isinstance(module, nn.Linear) else 2.0**0.5
        nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            with torch.no_grad():
                module.bias += (0.5 if points else 0.1) * torch.randn_like(module.bias)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
        nn.init.ones_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics are those of the last batch


def inputs_of(small: Small, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(1)
    with default_dtype(dtype):
        return small.inputs()


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if "labels" not in name}


def loss_of(output: Any) -> Tensor:
    """The model's own loss; otherwise its floating outputs weighted by fixed random numbers."""
    loss = output.get("loss")
    if loss is not None:
        return loss.sum()
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(())
    for tensor in tensors_of(output):
        weights = torch.randn(tensor.shape, generator=generator)
        total = total + (tensor * weights).sum() / max(tensor.numel(), 1) ** 0.5
    return total


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order; masking values (>= 1e3) become 0."""
    if isinstance(output, Tensor):
        if not output.is_floating_point():
            return []
        return [torch.where(output.abs() < 1e3, output, 0)]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


# Inputs --------------------------------------------------------------------------------------


def _image(height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, height, width)}


def _boxes() -> list[dict[str, Tensor]]:
    def boxes(count: int) -> Tensor:
        return torch.cat((0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)), -1)

    return [
        {"class_labels": torch.randint(LABELS, (count,)), "boxes": boxes(count)} for count in (3, 2)
    ]


def _detection(height: int = HEIGHT, width: int = WIDTH) -> dict[str, Any]:
    return _image(height, width) | {"labels": _boxes()}


def _padded() -> dict[str, Any]:
    """The second image is smaller, so that the mask and its polarity matter."""
    mask = torch.ones(BATCH, HEIGHT, WIDTH, dtype=torch.long)
    mask[1, 48:] = 0
    mask[1, :, 64:] = 0
    return _detection() | {"pixel_mask": mask}


def _text() -> dict[str, Any]:
    """Two phrases of two tokens each, between the separators of BERT's vocabulary."""
    tokens = torch.tensor([[101, 7, 8, 1012, 9, 10, 1012, 102]]).expand(BATCH, -1)
    ones = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": ones, "token_type_ids": 0 * ones}


def _grounding() -> dict[str, Any]:
    labels = [
        {"class_labels": each["class_labels"] % 2, "boxes": each["boxes"]} for each in _boxes()
    ]
    return _image() | _text() | {"labels": labels}


def _omdet() -> dict[str, Any]:
    classes = torch.randint(3, 90, (4, 6))
    tasks = torch.randint(3, 90, (BATCH, 6))
    classes[:, -1] = tasks[:, -1] = 99  # the end-of-text token
    return {
        "pixel_values": torch.randn(BATCH, 3, HEIGHT, HEIGHT),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }


def _segmentation() -> dict[str, Any]:
    masks = [torch.rand(count, HEIGHT, WIDTH).round() for count in (3, 2)]
    return _image() | {
        "mask_labels": masks,
        "class_labels": [torch.randint(LABELS, (len(mask),)) for mask in masks],
    }


def _oneformer() -> dict[str, Any]:
    return _segmentation() | {"task_inputs": torch.randint(90, (BATCH, 8))}


# Configurations ------------------------------------------------------------------------------


def _resnet(stages: tuple[int, ...]) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=[f"stage{stage}" for stage in stages],
    )


def _swin(stages: tuple[int, ...]) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        drop_path_rate=0.0,
        out_features=[f"stage{stage}" for stage in stages],
    )


def _hgnet(stages: tuple[int, ...]) -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 24, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 24, 32, 40],
        hidden_sizes=[16, 24, 32, 40],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, False, False],
        stage_kernel_size=[3, 3, 3, 3],
        out_features=[f"stage{stage}" for stage in stages],
    )


_WIDE = 32
_DETR = {
    "d_model": _WIDE,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
}
_RT_DETR = {
    **_DETR,
    "encoder_layers": 1,
    "encoder_hidden_dim": _WIDE,
    "decoder_in_channels": [_WIDE] * 3,
    "num_denoising": 4,
    "num_labels": LABELS,
    "freeze_backbone_batch_norms": False,
}


def _rt_resnet() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _deformable_detr() -> nn.Module:
    config = transformers.DeformableDetrConfig(
        **_DETR,
        backbone_config=_resnet((2, 3, 4)),
        num_labels=LABELS,
        two_stage=True,
        two_stage_num_proposals=12,
        with_box_refine=True,
        auxiliary_loss=True,
    )
    return transformers.DeformableDetrForObjectDetection(config)


def _rt_detr() -> nn.Module:
    config = transformers.RTDetrConfig(
        **_RT_DETR, backbone_config=_rt_resnet(), encoder_in_channels=[16, 24, 32]
    )
    return transformers.RTDetrForObjectDetection(config)


def _rt_detr_v2(method: str = "default") -> nn.Module:
    config = transformers.RTDetrV2Config(
        **_RT_DETR,
        backbone_config=_rt_resnet(),
        encoder_in_channels=[16, 24, 32],
        decoder_offset_scale=0.7,
        decoder_method=method,
    )
    return transformers.RTDetrV2ForObjectDetection(config)


def _d_fine(method: str = "default") -> nn.Module:
    config = transformers.DFineConfig(
        **_RT_DETR,
        backbone_config=_hgnet((2, 3, 4)),
        encoder_in_channels=[24, 32, 40],
        decoder_n_points=[3, 6, 3],
        decoder_method=method,
    )
    return transformers.DFineForObjectDetection(config)


def _deimv2() -> nn.Module:
    config = transformers.Deimv2Config(
        **_RT_DETR,
        backbone_config=_hgnet((2, 3, 4)),
        encoder_in_channels=[24, 32, 40],
        decoder_n_points=[3, 6, 3],
    )
    return transformers.Deimv2ForObjectDetection(config)


def _lw_detr() -> nn.Module:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    config = transformers.LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=[1.0, 2.0],
        d_model=_WIDE,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=12,
        group_detr=2,
        num_labels=LABELS,
    )
    return transformers.LwDetrForObjectDetection(config)


def _rf_detr() -> nn.Module:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        num_register_tokens=0,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=_WIDE,
        decoder_layers=2,
        decoder_ffn_dim=48,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=12,
        group_detr=2,
        num_labels=LABELS,
        dropout=0.0,
    )
    return transformers.RfDetrForObjectDetection(config)


def _bert() -> Any:
    return transformers.BertConfig(
        vocab_size=1024,
        hidden_size=_WIDE,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )


def _grounding_dino(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        **_DETR,
        backbone_config=_swin((2, 3, 4)),
        text_config=_bert(),
        max_text_len=16,
        auxiliary_loss=True,
        decoder_bbox_embed_share=False,
    )
    return getattr(transformers, f"{kind}ForObjectDetection")(config)


def _omdet_turbo() -> nn.Module:
    text = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        projection_dim=40,
        eos_token_id=99,
    )
    config = transformers.OmDetTurboConfig(
        backbone_config=_swin((2, 3, 4)),
        text_config=text,
        image_size=HEIGHT,
        apply_layernorm_after_vision_backbone=False,
        text_projection_in_dim=40,
        text_projection_out_dim=40,
        class_embed_dim=40,
        task_encoder_hidden_dim=48,
        num_queries=12,
        encoder_hidden_dim=_WIDE,
        vision_features_channels=[_WIDE] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=4,
        encoder_dim_feedforward=48,
        decoder_hidden_dim=_WIDE,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=48,
    )
    return transformers.OmDetTurboForObjectDetection(config)


def _pp_doclayout_v2() -> nn.Module:
    reading = {
        "hidden_size": _WIDE,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_classes": LABELS,
        "coordinate_size": 6,
        "shape_size": 4,
        "max_position_embeddings": 32,
    }
    config = transformers.PPDocLayoutV2Config(
        **_RT_DETR,
        backbone_config=_hgnet((2, 3, 4)),
        encoder_in_channels=[24, 32, 40],
        reading_order_config=reading,
        class_thresholds=[0.0] * LABELS,
        class_order=list(range(LABELS)),
    )
    return transformers.PPDocLayoutV2ForObjectDetection(config)


def _pp_doclayout_v3() -> nn.Module:
    config = transformers.PPDocLayoutV3Config(
        **_RT_DETR,
        backbone_config=_hgnet((1, 2, 3, 4)),
        encoder_in_channels=[24, 32, 40],
        mask_feature_channels=[16, 16],
        x4_feat_dim=16,
        num_prototypes=8,
    )
    return transformers.PPDocLayoutV3ForObjectDetection(config)


def _pp_doclayout_v4() -> nn.Module:
    config = transformers.PPDocLayoutV4Config(
        **{name: value for name, value in _RT_DETR.items() if name != "d_model"},
        hidden_size=_WIDE,
        backbone_config=_hgnet((2, 3, 4)),
        encoder_in_channels=[24, 32, 40],
    )
    return transformers.PPDocLayoutV4ForObjectDetection(config)


_SEGMENTER = {
    "num_labels": LABELS,
    "hidden_dim": _WIDE,
    "mask_dim": _WIDE,
    "num_attention_heads": 4,
    "encoder_layers": 2,
    "encoder_feedforward_dim": 48,
    "dim_feedforward": 48,
    "num_queries": 10,
    "train_num_points": 64,
}


def _mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(
        **_SEGMENTER,
        backbone_config=_resnet((1, 2, 3, 4)),
        feature_size=_WIDE,
        decoder_layers=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _oneformer_model() -> nn.Module:
    config = transformers.OneFormerConfig(
        **_SEGMENTER,
        backbone_config=_swin((1, 2, 3, 4)),
        conv_dim=_WIDE,
        decoder_layers=3,
        is_training=False,  # no text inputs: their loss is always float32
        task_seq_len=8,
    )
    model = transformers.OneFormerForUniversalSegmentation(config)
    model.criterion.loss_contrastive = _no_loss  # older versions compute it without texts too
    return model


def _no_loss(*inputs: Any) -> dict[str, Tensor]:
    return {"loss_contrastive": torch.zeros(())}


SMALL = {
    small.name: small
    for small in (
        Small("deformable_detr", _deformable_detr, _padded),
        Small("rt_detr", _rt_detr, _detection),
        Small("lw_detr", _lw_detr, lambda: _detection(HEIGHT, HEIGHT)),
        Small("rf_detr", _rf_detr, lambda: _detection(HEIGHT, HEIGHT)),
        Small("grounding_dino", lambda: _grounding_dino("GroundingDino"), _grounding),
        Small("mm_grounding_dino", lambda: _grounding_dino("MMGroundingDino"), _grounding),
        Small("omdet_turbo", _omdet_turbo, _omdet),
        Small("pp_doclayout_v2", _pp_doclayout_v2, _image),
        Small("pp_doclayout_v3", _pp_doclayout_v3, _image),
        Small("pp_doclayout_v4", _pp_doclayout_v4, _image),
        Small("rt_detr_v2", _rt_detr_v2, _detection),
        Small("rt_detr_v2_discrete", lambda: _rt_detr_v2("discrete"), _detection),
        Small("d_fine", _d_fine, _detection, float32_training=True),
        Small("d_fine_discrete", lambda: _d_fine("discrete"), _detection, float32_training=True),
        Small("deimv2", _deimv2, _detection, float32_training=True),
        Small("mask2former", _mask2former, _segmentation),
        Small("oneformer", _oneformer_model, _oneformer),
    )
}
