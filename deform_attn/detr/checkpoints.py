"""Official checkpoints: from the names of their tensors to ours, rules that apply in order.

Shared tensors (heads of all layers, routes) have one name in a checkpoint or many; all are read.
A backbone's names are its own: ``backbone.`` passes through.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

Rules = list[tuple[str, str]]

# Names in layers, and all others, of whichever systems have them.
_LAYERS: Rules = [
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention.attention."),
    (r"^(encoder\.layers\.\d+)\.norm(\d)\.", r"\1.join\2.norm."),
    (r"^((?:en|de)coder\.layers\.\d+)\.linear", r"\1.ffn.linear"),
    (r"^((?:en|de)coder\.layers\.\d+)\.activation\.", r"\1.ffn.act."),
    (r"^(decoder\.layers\.\d+\.(?:self|cross)_attn)\.", r"\1.attention."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.join_ffn.norm."),
]
_OTHERS: Rules = [
    (r"^level_embeds?$", "encoder.level_embed"),
    (r"^(?:encoder\.)?input_proj\.", "encoder.project."),
    (r"^decoder\.norm\.", "decoder.heads.norm."),
    (r"^decoder\.(?:ref_point|query_pos)_head\.", "decoder.position.mlp."),
    (r"^decoder\.query_scale\.", "decoder.position.scale."),
    (r"^(?:decoder\.)?(?:class_embed|dec_score_head)\.", "decoder.heads.classes."),
    (r"^(?:decoder\.)?(?:bbox_embed|dec_bbox_head)\.", "decoder.heads.boxes."),
    (r"^query_embed\.", "queries.embed."),
    (r"^reference_points\.", "queries.points."),
    (r"^refpoint_embed\.", "queries.boxes."),
    (r"^tgt_embed\.", "queries.content."),
    (r"^(?:label_enc|decoder\.denoising_class_embed)\.", "denoising.embed."),
    (r"^(?:enc_output_norm|decoder\.enc_output\.(?:1|norm))\.", "queries.norm."),
    (r"^(?:enc_output|decoder\.enc_output\.(?:0|proj))\.", "queries.project."),
    (r"^(?:enc_out_class_embed|decoder\.enc_score_head)\.", "queries.classes."),
    (r"^(?:enc_out_bbox_embed|decoder\.enc_bbox_head)\.", "queries.box."),
    (r"^pos_trans\.", "queries.sines.0."),
    (r"^pos_trans_norm\.", "queries.sines.1."),
]


def _norms(first: str, second: str) -> Rules:
    """What the norms of a decoder's layer follow, by their numbers."""
    layer = r"^(decoder\.layers\.\d+)\.norm"
    return [
        (rf"{layer}1\.", rf"\1.join_{first}.norm."),
        (rf"{layer}2\.", rf"\1.join_{second}.norm."),
    ]


_DEFORMABLE = _LAYERS + _OTHERS + _norms("cross", "self")

_DETR: Rules = [
    (r"\.multihead_attn\.", ".cross_attn."),
    # one head for all layers: the first one's name
    (r"^(class|bbox)_embed\.", r"\1_embed.0."),
    *_LAYERS,
    *_OTHERS,
    *_norms("self", "cross"),
]

_DAB_DETR: Rules = [
    (r"^encoder\.query_scale\.", "encoder.scale."),
    (r"^decoder\.ref_anchor_head\.", "decoder.position.size."),
    (r"^(?:decoder\.)?(class|bbox)_embed\.", r"\1_embed.0."),
    (r"\.sa_(\w+)_proj\.", r".self_attn.\1."),
    (r"\.ca_(\w+)_proj\.", r".cross_attn.\1."),
    (r"_attn\.([qk])(content|pos)", r"_attn.\1_\2"),
    (r"_attn\.q_pos_sine\.", "_attn.q_sine."),
    (r"_attn\.([qk])_pos\.", r"_attn.\1_position."),
    (r"^(decoder\..*_attn)\.out_proj\.", r"\1.output."),
    *(rule for rule in _LAYERS if "cross" not in rule[0]),
    *_OTHERS,
    *_norms("self", "cross"),
]

_RTDETR: Rules = [
    (r"^decoder\.decoder\.", "decoder."),
    (r"^decoder\.input_proj\.", "encoder.output."),
    (r"^encoder\.lateral_convs\.", "encoder.lateral."),
    (r"^encoder\.downsample_convs\.", "encoder.down."),
    (r"^encoder\.fpn_blocks\.", "encoder.fuse_up."),
    (r"^encoder\.pan_blocks\.", "encoder.fuse_down."),
    (r"^encoder\.encoder\.0\.", "encoder."),
    *_LAYERS,
    (r"^encoder\.layers\.0\.", "encoder.attention."),
    (r"^(decoder\.layers\.\d+)\.gateway\.", r"\1.join_cross."),
    *_norms("self", "cross"),
    *_OTHERS,
    (r"^(encoder\.project\.\d+)\.0\.", r"\1.conv."),  # v1
    (r"^(encoder\.project\.\d+)\.1\.", r"\1.norm."),
]
_DFINE: Rules = [
    *_RTDETR,
    (r"^(encoder\.down\.\d+)\.0\.cv1\.", r"\1.0."),
    (r"^(encoder\.down\.\d+)\.0\.cv2\.", r"\1.1."),
    (r"^(encoder\.fuse_\w+\.\d+)\.cv(\d)\.", r"\1.conv\2."),
    (r"^decoder\.up$", "decoder.heads.bins.up"),
    (r"^decoder\.reg_scale$", "decoder.heads.bins.scale"),
    (r"^decoder\.heads\.boxes\.", "decoder.heads.corners."),
    (r"^decoder\.pre_bbox_head\.", "decoder.heads.first_box."),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.heads.quality.\1.mlp."),
]

_MR_DETR: Rules = [
    (r"^query_embedding\.", "queries.content."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"encoder.project.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"encoder.project.\1.1."),
    (r"^decoder\.class_embed_o2m_encoder\.", "o2m.0.classes."),
    (r"^decoder\.bbox_embed_enc_o2m\.", "o2m.0.box."),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.attention.attention."),
    (r"^(encoder\.layers\.\d+)\.norms\.0\.", r"\1.join1.norm."),
    (r"^(encoder\.layers\.\d+)\.norms\.1\.", r"\1.join2.norm."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn.attention."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.norm_o2o\.", r"\1.join_self.norm."),
    (r"^decoder\.(layers\.\d+)\.attentions\.0\.norm_o2m\.", r"o2m.1.\1.join_self.norm."),
    (r"^decoder\.(layers\.\d+)\.attentions\.0\.instruction_o2m", r"o2m.1.\1.self_attn.tokens"),
    (r"\.tokens_pos\.", ".positions."),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn.attention."),
    (r"^(decoder\.layers\.\d+)\.norms\.0\.", r"\1.join_cross.norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.1\.", r"\1.join_ffn.norm."),
    (r"^decoder\.(layers\.\d+)\.ffns\.0\.layers\.0\.linear\.linear_sep\.", r"sep.\1.ffn.linear1."),
    (r"^decoder\.(layers\.\d+)\.ffns\.0\.layers\.1\.linear_sep\.", r"sep.\1.ffn.linear2."),
    (r"\.ffns\.0\.layers\.0\.(?:0|linear\.linear)\.", ".ffn.linear1."),
    (r"\.ffns\.0\.layers\.1\.(?:linear\.)?", ".ffn.linear2."),
    *_OTHERS,
]

# Buffers of RT-DETRv2 and D-FINE for images of one size, which are made anew here.
_DERIVED = ("decoder.anchors", "decoder.valid_mask")

RULES: dict[str, Rules] = {
    "detr": _DETR,
    **dict.fromkeys(("dab_detr", "dn_detr"), _DAB_DETR),
    **dict.fromkeys(("deformable_detr", "dab_deformable_detr"), _DEFORMABLE),
    **dict.fromkeys(("dn_deformable_detr", "dino"), _DEFORMABLE),
    "rtdetr": _RTDETR,
    **dict.fromkeys(("dfine", "deim"), _DFINE),
    "mr_detr": _MR_DETR,
}


def renamed(system: str, name: str, layers: int) -> str:
    """Our name of an official tensor.

    Args:
        system: the name of the recipe in :mod:`~deform_attn.detr.models`.
        name: the tensor's in the official checkpoint.
        layers: of the decoder; in two stages the encoder's heads are one more in its lists.
    """
    for pattern, ours in [(r"^transformer\.", ""), *RULES[system]]:
        name = re.sub(pattern, ours, name)
    name = re.sub(rf"^decoder\.heads\.classes\.{layers}\.", "queries.classes.", name)
    return re.sub(rf"^decoder\.heads\.boxes\.{layers}\.", "queries.box.", name)


def load_official(model: nn.Module, system: str, state: Mapping[str, Tensor]) -> None:
    """Load an official state dict into a model of the same system and sizes, strictly.

    Args:
        model: of a recipe in :mod:`~deform_attn.detr.models`.
        system: the name of that recipe.
        state: official names to tensors.

    Raises:
        KeyError: there are no rules for this system.
        RuntimeError: names are missing or left over, or shapes differ.
    """
    layers = len(cast(nn.ModuleList, model.get_submodule("decoder.layers")))
    given = {renamed(system, n, layers): t for n, t in state.items() if n not in _DERIVED}
    own = model.state_dict(keep_vars=True)
    named = {id(own[name]): name for name in given if name in own}
    for name, tensor in own.items():
        if name not in given and id(tensor) in named:  # shared with one that was named
            given[name] = given[named[id(tensor)]]
    model.load_state_dict(given, strict=True)
