"""Detectors of the library transformers: the same models here, with the same weights."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deform_attn.checks import as_path
from deform_attn.detr import models
from deform_attn.detr.backbones import LibraryBackbone
from deform_attn.detr.checkpoints import Rules, load_renamed
from deform_attn.detr.files import nearby
from deform_attn.detr.layers import Size
from deform_attn.detr.models import System
from deform_attn.extras import needs_transformers

TIME_LIMIT = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", "5"))  # seconds until the hub answers
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}

# Names of transformers 5, in those used here.
_RULES: Rules = [
    (r"^model\.", ""),
    (r"^encoder\.aifi\.0\.layers\.0\.", "encoder.layer."),
    (r"^(encoder\.layer(?:s\.\d+)?)\.self_attn_layer_norm\.", r"\1.norm1.norm."),
    (r"^(encoder\.layer(?:s\.\d+)?)\.final_layer_norm\.", r"\1.norm2.norm."),
    (r"^(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm_self.norm."),
    (r"^(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm_cross.norm."),
    (r"^(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm_ffn.norm."),
    (r"^(decoder\.layers\.\d+)\.gateway\.", r"\1.norm_cross."),
    (r"\.encoder_attn\.n_points_scale$", ".encoder_attn.num_points_scale"),
    (r"\.encoder_attn\.", ".cross_attn.attention."),
    (r"\.self_attn\.", ".self_attn.attention."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(?:fc1|layers\.0)\.", ".ffn.linear1."),
    (r"\.mlp\.(?:fc2|layers\.1)\.", ".ffn.linear2."),
    (r"^encoder_input_proj\.(\d+)\.0\.", r"encoder.input_proj.\1.conv."),
    (r"^encoder_input_proj\.(\d+)\.1\.", r"encoder.input_proj.\1.norm."),
    (r"^decoder_input_proj\.(\d+)\.0\.", r"encoder.output_proj.\1.conv."),
    (r"^decoder_input_proj\.(\d+)\.1\.", r"encoder.output_proj.\1.norm."),
    (r"^input_proj(?:ection)?\.", "encoder.input_proj."),
    (r"^level_embed$", "encoder.level_embed"),
    (r"^query_position_embeddings\.", "queries.query_embed."),
    (r"^reference_points\.", "queries.reference_points."),
    (r"^enc_output\.0\.", "queries.proj."),
    (r"^(?:enc_output\.1|enc_output_norm)\.", "queries.norm."),
    (r"^enc_output\.", "queries.proj."),
    (r"^enc_score_head\.", "queries.class_head."),
    (r"^enc_bbox_head\.", "queries.box_head."),
    (r"^pos_trans\.", "queries.pos_trans.0."),
    (r"^pos_trans_norm\.", "queries.pos_trans.1."),
    (r"^denoising_class_embed\.", "denoising.label_embed."),
    (r"^decoder\.query_pos_head\.", "decoder.position.mlp."),
    (r"^decoder\.layernorm\.", "decoder.heads.norm."),
    (r"^class_labels_classifier\.", "decoder.heads.class_heads.0."),
    (r"^bbox_predictor\.", "decoder.heads.box_heads.0."),
    (r"^(?:decoder\.)?class_embed\.", "decoder.heads.class_heads."),
    (r"^(?:decoder\.)?bbox_embed\.", "decoder.heads.box_heads."),
]
_FINE: Rules = [
    *_RULES,
    (r"^(encoder\.\w+_blocks\.\d+)\.conv([23])\.", r"\1.conv\2.1."),
    (r"\.csp_rep1\.", ".conv2.0."),
    (r"\.csp_rep2\.", ".conv3.0."),
    (r"^(encoder\.downsample_convs\.\d+)\.conv1\.", r"\1.0."),
    (r"^(encoder\.downsample_convs\.\d+)\.conv2\.", r"\1.1."),
    (r"^decoder\.reg_scale$", "decoder.heads.bins.scale"),
    (r"^decoder\.up$", "decoder.heads.bins.up"),
    (r"^decoder\.pre_bbox_head\.", "decoder.heads.pre_box_head."),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.heads.quality.\1.mlp."),
    (r"^decoder\.heads\.box_heads\.", "decoder.heads.corner_heads."),
]
_DAB: Rules = [
    (r"^class_embed\.", "decoder.heads.class_heads.0."),
    (r"^(?:model\.decoder\.bbox_embed|bbox_predictor)\.", "decoder.heads.box_heads.0."),
    (r"^model\.", ""),
    (r"^query_refpoint_embeddings\.", "queries.refpoint_embed."),
    (r"^input_projection\.", "encoder.input_proj."),
    (r"^decoder\.layernorm\.", "decoder.heads.norm."),
    (r"^decoder\.ref_point_head\.", "decoder.position.mlp."),
    (r"^decoder\.(query_scale|ref_anchor_head)\.", r"decoder.position.\1."),
    (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1.norm."),
    (r"^(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2.norm."),
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.self_attn.attention."),
    (r"\.self_attn\.self_attn_layer_norm\.", ".norm_self.norm."),
    (r"\.cross_attn\.cross_attn_layer_norm\.", ".norm_cross.norm."),
    (r"\.mlp\.final_layer_norm\.", ".norm_ffn.norm."),
    (r"\.(self|cross)_attn\.\1_attn\.output_proj\.", r".\1_attn.out_proj."),
    (r"\.(self|cross)_attn\.\1_attn_query_pos_sine_proj\.", r".\1_attn.q_sine."),
    (r"\.(self|cross)_attn\.\1_attn_value_proj\.", r".\1_attn.v."),
    (r"\.(self|cross)_attn\.\1_attn_(q|k)(?:uery|ey)_(content|pos)_proj\.", r".\1_attn.\2_\3."),
    (r"^((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?fc(\d)\.", r"\1.ffn.linear\2."),
    (r"^((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?activation_fn\.", r"\1.ffn.activation."),
]


def from_transformers(
    name_or_folder: str | Path, **options: Any
) -> tuple[System, tuple[str, ...], int, str]:
    """A detector of transformers, with its weights and preprocessing.

    Args:
        name_or_folder: a folder that ``save_pretrained`` wrote, or a name on the Hugging Face hub,
            of a detr, deformable_detr, dab-detr, rt_detr, rt_detr_v2 or d_fine.
        options: of ``from_pretrained``, such as ``revision``.

    Returns:
        The system, the names of its classes, and the size and the kind of resizing of its images,
        as :func:`~deform_attn.detr.images.as_tensor` takes them.

    Raises:
        TypeError: no name or path.
        ModuleNotFoundError: transformers is not installed.
        FileNotFoundError: no such folder, and the hub has no such model or cannot be reached.
        ValueError: a model of another type, or with options that the system here does not have.

    Example:
        >>> import tempfile
        >>> import transformers
        >>> from deform_attn.detr.hub import from_transformers
        >>> sizes = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4}
        >>> backbone = transformers.ResNetConfig(**sizes, out_features=["stage4"])
        >>> config = transformers.DetrConfig(backbone_config=backbone, d_model=32, num_queries=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.DetrForObjectDetection(config).save_pretrained(folder)
        ...     system, classes, size, resize = from_transformers(folder)
        >>> classes, size, resize
        (('LABEL_0', 'LABEL_1'), 800, 'shortest')
    """
    with needs_transformers():
        from transformers import AutoConfig, AutoModelForObjectDetection
        from transformers.image_processing_base import ImageProcessingMixin

    folder = as_path("name_or_folder", name_or_folder)
    name = str(folder if folder.is_dir() else name_or_folder)
    if not folder.is_dir() and not options.get("local_files_only"):
        options["local_files_only"] = not _find_on_hub(name, options)
    config = AutoConfig.from_pretrained(name, **options)
    if config.model_type not in _SYSTEMS:
        known = ", ".join(_SYSTEMS)
        raise ValueError(f"{name}: expected a model of type {known}, got {config.model_type}")
    source = AutoModelForObjectDetection.from_pretrained(name, dtype=torch.float32, **options)
    try:
        image, _ = ImageProcessingMixin.get_image_processor_dict(name, **options)
    except OSError:  # a folder without preprocessor_config.json
        image = {}
    mean_and_std: dict[str, Any] = {}
    line = config.model_type in ("detr", "deformable_detr", "dab-detr")
    if image.get("do_normalize", line):
        mean_and_std["mean"] = image.get("image_mean", (0.485, 0.456, 0.406))
        mean_and_std["std"] = image.get("image_std", (0.229, 0.224, 0.225))
    convolutions = getattr(source.model.backbone, "conv_encoder", source.model.backbone)
    backbone = LibraryBackbone(convolutions.model, **mean_and_std)
    system = _SYSTEMS[config.model_type](config, backbone)
    load_renamed(system.model, _renamed(source.state_dict(), config, system.model))
    classes = tuple(config.id2label[i] for i in range(config.num_labels))
    size = image.get("size", {})
    if "shortest_edge" in size or (line and not size):
        return system, classes, size.get("shortest_edge", 800), "shortest"
    return system, classes, size.get("height", 640), "stretch"


def _find_on_hub(name: str, options: dict[str, Any]) -> bool:
    """Whether the hub has a model, asked with a time limit; False: only the local cache has it.

    Without this, transformers repeats its requests for minutes where there is no network.

    Raises:
        FileNotFoundError: the hub has none, or it cannot be reached and the cache has none.
    """
    import huggingface_hub as hub

    place = {key: options[key] for key in ("revision", "subfolder") if key in options}
    try:
        url = hub.hf_hub_url(name, "config.json", **place)
        hub.get_hf_file_metadata(url, token=options.get("token"), timeout=TIME_LIMIT)
    except Exception as error:  # of huggingface_hub, of its HTTP client, or of the system
        cache = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
        file = str(Path(options.get("subfolder", "")) / "config.json")
        with suppress(ValueError):  # no valid name
            if isinstance(hub.try_to_load_from_cache(name, file, **cache), str):
                return False
        raise FileNotFoundError(
            f"expected a folder, or the name of a model on the hub, got {name!r}: "
            f"{nearby(Path(name))}; the hub, which has {TIME_LIMIT:g} s to answer "
            f"(HF_HUB_ETAG_TIMEOUT): {' '.join(str(error).split())[:300] or type(error).__name__}"
        ) from error
    return True


def _renamed(state: dict[str, Tensor], config: Any, model: nn.Module) -> dict[str, Tensor]:
    """Tensors under the names used here, with the projections of attention joined."""
    rules = {"d_fine": _FINE, "dab-detr": _DAB}.get(config.model_type, _RULES)
    layers = config.decoder_layers
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("model.backbone."):
            name = re.sub(r"^model\.backbone\.(?:conv_encoder\.)?model\.", "backbone.body.", name)
        else:
            for pattern, ours in rules:
                name = re.sub(pattern, ours, name)
            name = re.sub(rf"^decoder\.heads\.class_heads\.{layers}\.", "queries.class_head.", name)
            name = re.sub(rf"^decoder\.heads\.box_heads\.{layers}\.", "queries.box_head.", name)
        found[name] = tensor
    own = model.state_dict()
    for name in own:
        if ".attention.in_proj_" in name:
            kind = name.rpartition("_")[2]
            parts = [name.replace(f"in_proj_{kind}", f"{x}_proj.{kind}") for x in "qkv"]
            found[name] = torch.cat([found.pop(part) for part in parts])
    if "denoising.label_embed.weight" in own:  # not in models without denoising
        found.setdefault("denoising.label_embed.weight", own["denoising.label_embed.weight"])
    return found


def _size(config: Any) -> Size:
    points = getattr(config, "decoder_n_points", 4)
    return Size(
        d_model=config.d_model,
        num_heads=config.decoder_attention_heads,
        num_levels=getattr(config, "num_feature_levels", 1),
        num_points=points if isinstance(points, int) else tuple(points),
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        dim_feedforward=config.decoder_ffn_dim,
        num_queries=config.num_queries,
        dropout=config.dropout,
    )


def _require(config: Any, **expected: Any) -> None:
    for name, value in expected.items():
        if (got := getattr(config, name, value)) != value:
            raise ValueError(f"{name}: expected {value!r}, got {got!r} in {config.model_type}")


def _detr(config: Any, backbone: LibraryBackbone) -> System:
    _require(config, position_embedding_type="sine", encoder_ffn_dim=config.decoder_ffn_dim)
    size = replace(_size(config), activation=ACTIVATIONS[config.activation_function])
    return models.detr(backbone, config.num_labels, size)


def _dab_detr(config: Any, backbone: LibraryBackbone) -> System:
    _require(config, encoder_ffn_dim=config.decoder_ffn_dim, activation_function="prelu")
    _require(config, temperature_height=20, temperature_width=20, num_patterns=0, query_dim=4)
    _require(config, keep_query_pos=False, sine_position_embedding_scale=None)
    return models.dab_detr(backbone, config.num_labels, _size(config))


def _deformable_detr(config: Any, backbone: LibraryBackbone) -> System:
    _require(config, position_embedding_type="sine", encoder_ffn_dim=config.decoder_ffn_dim)
    _require(config, encoder_n_points=config.decoder_n_points, activation_function="relu")
    size = _size(config)
    if config.two_stage:
        size = replace(size, num_queries=config.two_stage_num_proposals)
    options = {"refine": config.with_box_refine, "two_stage": config.two_stage}
    return models.deformable_detr(backbone, config.num_labels, size, **options)


def _hybrid_size(config: Any) -> Size:
    _require(config, encoder_layers=1, normalize_before=False, learn_initial_query=False)
    _require(config, encoder_activation_function="gelu", activation_function="silu")
    _require(config, encode_proj_layers=[len(config.encoder_in_channels) - 1])
    _require(config, encoder_attention_heads=config.decoder_attention_heads)
    return replace(
        _size(config),
        activation=ACTIVATIONS[config.decoder_activation_function],
        expansion=config.hidden_expansion,
        depth=getattr(config, "depth_mult", 1.0),
        encoder_dims=(config.encoder_hidden_dim, config.encoder_ffn_dim),
    )


def _rtdetr(config: Any, backbone: LibraryBackbone) -> System:
    return models.rtdetr(backbone, config.num_labels, _hybrid_size(config))


def _rtdetrv2(config: Any, backbone: LibraryBackbone) -> System:
    _require(config, decoder_offset_scale=0.5)
    options = {"method": config.decoder_method}
    return models.rtdetrv2(backbone, config.num_labels, _hybrid_size(config), **options)


def _dfine(config: Any, backbone: LibraryBackbone) -> System:
    _require(config, decoder_offset_scale=0.5, layer_scale=1.0, max_num_bins=32)
    _require(config, top_prob_values=4, lqe_hidden_dim=64, lqe_layers=2)
    size = _hybrid_size(config)
    layers = config.eval_idx + 1 if config.eval_idx >= 0 else None
    size = replace(size, eval_layers=layers)
    return models.dfine(backbone, config.num_labels, size, scale=float(config.reg_scale))


_SYSTEMS: dict[str, Any] = {
    "detr": _detr,
    "deformable_detr": _deformable_detr,
    "dab-detr": _dab_detr,
    "rt_detr": _rtdetr,
    "rt_detr_v2": _rtdetrv2,
    "d_fine": _dfine,
}
