"""Official checkpoints: rules that map the names of their tensors to those used here, in order.

A shared tensor (heads of all layers, routes) may have one name in a checkpoint or several. Names of
the backbone, ``backbone.``, stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

Rules = list[tuple[str, Any]]  # pattern, and replacement as re.sub takes it

# Names inside layers.
_LAYERS: Rules = [
    (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.self_attn.attention."),
    (r"^(encoder\.layers\.\d+)\.norm(\d)\.", r"\1.norm\2.norm."),
    (r"^((?:en|de)coder\.layers\.\d+)\.(linear|activation)", r"\1.ffn.\2"),
    (r"^(decoder\.layers\.\d+\.(?:self|cross)_attn)\.", r"\1.attention."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.norm_ffn.norm."),
]
# All other names.
_OTHERS: Rules = [
    (r"^level_embeds?$", "encoder.level_embed"),
    (r"^(?:encoder\.)?input_proj\.", "encoder.input_proj."),
    (r"^decoder\.norm\.", "decoder.heads.norm."),
    (r"^decoder\.(?:ref_point|query_pos)_head\.", "decoder.position.mlp."),
    (r"^decoder\.query_scale\.", "decoder.position.query_scale."),
    (r"^(?:decoder\.)?(?:class_embed|dec_score_head)\.", "decoder.heads.class_heads."),
    (r"^(?:decoder\.)?(?:bbox_embed|dec_bbox_head)\.", "decoder.heads.box_heads."),
    (r"^(query_embed|reference_points|refpoint_embed|tgt_embed)\.", r"queries.\1."),
    (r"^(?:label_enc|decoder\.denoising_class_embed)\.", "denoising.label_embed."),
    (r"^(?:enc_output_norm|decoder\.enc_output\.(?:1|norm))\.", "queries.norm."),
    (r"^(?:enc_output|decoder\.enc_output\.(?:0|proj))\.", "queries.proj."),
    (r"^(?:enc_out_class_embed|decoder\.enc_score_head)\.", "queries.class_head."),
    (r"^(?:enc_out_bbox_embed|decoder\.enc_bbox_head)\.", "queries.box_head."),
    (r"^pos_trans\.", "queries.pos_trans.0."),
    (r"^pos_trans_norm\.", "queries.pos_trans.1."),
]


def _norms(first: str, second: str) -> Rules:
    """Which sub-layers norm1 and norm2 of a decoder layer follow."""
    layer = r"^(decoder\.layers\.\d+)\.norm"
    return [
        (rf"{layer}1\.", rf"\1.norm_{first}.norm."),
        (rf"{layer}2\.", rf"\1.norm_{second}.norm."),
    ]


_DEFORMABLE = _LAYERS + _OTHERS + _norms("cross", "self")

_DETR: Rules = [
    (r"\.multihead_attn\.", ".cross_attn."),
    # One head for all layers, under the name of the first.
    (r"^(class|bbox)_embed\.", r"\1_embed.0."),
    *_LAYERS,
    *_OTHERS,
    *_norms("self", "cross"),
]

_DAB_DETR: Rules = [
    (r"^decoder\.ref_anchor_head\.", "decoder.position.ref_anchor_head."),
    (r"^(?:decoder\.)?(class|bbox)_embed\.", r"\1_embed.0."),
    (r"\.sa_(\w+)_proj\.", r".self_attn.\1."),
    (r"\.ca_(\w+)_proj\.", r".cross_attn.\1."),
    (r"_attn\.qpos_sine\.", "_attn.q_sine."),
    (r"_attn\.([qk])(content|pos)\.", r"_attn.\1_\2."),
    *(rule for rule in _LAYERS if "cross" not in rule[0]),
    *_OTHERS,
    *_norms("self", "cross"),
]

_RTDETR: Rules = [
    (r"^decoder\.decoder\.", "decoder."),
    (r"^decoder\.input_proj\.", "encoder.output_proj."),
    (r"^encoder\.encoder\.0\.", "encoder."),
    *_LAYERS,
    (r"^encoder\.layers\.0\.", "encoder.layer."),
    (r"^(decoder\.layers\.\d+)\.gateway\.", r"\1.norm_cross."),
    *_norms("self", "cross"),
    *_OTHERS,
    (r"^(encoder\.input_proj\.\d+)\.0\.", r"\1.conv."),  # version 1
    (r"^(encoder\.input_proj\.\d+)\.1\.", r"\1.norm."),
]
_DFINE: Rules = [
    *_RTDETR,
    (r"^(encoder\.downsample_convs\.\d+)\.0\.cv1\.", r"\1.0."),
    (r"^(encoder\.downsample_convs\.\d+)\.0\.cv2\.", r"\1.1."),
    (r"^(encoder\.(?:fpn|pan)_blocks\.\d+)\.cv(\d)\.", r"\1.conv\2."),
    (r"^decoder\.up$", "decoder.heads.bins.up"),
    (r"^decoder\.reg_scale$", "decoder.heads.bins.scale"),
    (r"^decoder\.heads\.box_heads\.", "decoder.heads.corner_heads."),
    (r"^decoder\.pre_bbox_head\.", "decoder.heads.pre_box_head."),
    (r"^decoder\.lqe_layers\.(\d+)\.reg_conf\.", r"decoder.heads.quality.\1.mlp."),
]

_MR_DETR: Rules = [
    (r"^query_embedding\.", "queries.tgt_embed."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"^decoder\.class_embed_o2m_encoder\.", "o2m_queries.class_head."),
    (r"^decoder\.bbox_embed_enc_o2m\.", "o2m_queries.box_head."),
    (r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn.attention."),
    (r"^(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1.norm."),
    (r"^(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2.norm."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn.attention."),
    (r"^(decoder\.layers\.\d+)\.attentions\.0\.norm_o2o\.", r"\1.norm_self.norm."),
    (r"^decoder\.(layers\.\d+)\.attentions\.0\.norm_o2m\.", r"o2m_decoder.\1.norm_self.norm."),
    (
        r"^decoder\.(layers\.\d+)\.attentions\.0\.instruction_o2m",
        r"o2m_decoder.\1.self_attn.tokens",
    ),
    (r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn.attention."),
    (r"^(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm_cross.norm."),
    (r"^(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm_ffn.norm."),
    (
        r"^decoder\.(layers\.\d+)\.ffns\.0\.layers\.0\.linear\.linear_sep\.",
        r"sep_decoder.\1.ffn.linear1.",
    ),
    (r"^decoder\.(layers\.\d+)\.ffns\.0\.layers\.1\.linear_sep\.", r"sep_decoder.\1.ffn.linear2."),
    (r"\.ffns\.0\.layers\.0\.(?:0|linear\.linear)\.", ".ffn.linear1."),
    (r"\.ffns\.0\.layers\.1\.(?:linear\.)?", ".ffn.linear2."),
    *_OTHERS,
]

# Names of official backbones, in those of the library.
_NORM = (r"\.(?:norm|bn)\.", ".normalization.")
_CONV = (r"\.conv\.", ".convolution.")


def _detectron_stage(found: re.Match[str]) -> str:
    return f"backbone.body.encoder.stages.{int(found[1]) - 2}.layers.{found[2]}."


BACKBONES: dict[str, Rules] = {
    "resnet": [  # torchvision's, in a body or not
        (r"^backbone\.(?:0\.body\.|0\.)?", "backbone.body."),
        (r"\.body\.conv1\.", ".body.embedder.embedder.convolution."),
        (r"\.body\.bn1\.", ".body.embedder.embedder.normalization."),
        (r"\.layer([1-4])\.(\d+)\.", lambda m: f".encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
        (r"\.conv([1-3])\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn([1-3])\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
    ],
    "detectron2": [
        (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.embedder.embedder.normalization."),
        (r"^backbone\.stem\.conv1\.", "backbone.body.embedder.embedder.convolution."),
        (r"^backbone\.res([2-5])\.(\d+)\.", _detectron_stage),
        (r"\.conv([1-3])\.norm\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (r"\.conv([1-3])\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.shortcut\.norm\.", ".shortcut.normalization."),
        (r"\.shortcut\.(weight|bias)$", r".shortcut.convolution.\1"),
    ],
    "resnet_vd": [  # RT-DETR's
        (
            r"^backbone\.conv1\.conv1_(\d)\.",
            lambda m: f"backbone.body.embedder.embedder.{int(m[1]) - 1}.",
        ),
        (r"^backbone\.res_layers\.(\d)\.blocks\.", r"backbone.body.encoder.stages.\1.layers."),
        (r"\.branch2([a-c])\.", lambda m: f".layer.{'abc'.index(m[1])}."),
        (r"\.short\.conv\.(conv|norm)\.", r".shortcut.1.\1."),
        (r"\.short\.", ".shortcut."),
        _CONV,
        _NORM,
    ],
    "hgnetv2": [  # D-FINE's and RT-DETR's
        (r"^backbone\.stem\.", "backbone.body.embedder."),
        (r"^backbone\.stages\.", "backbone.body.encoder.stages."),
        (r"\.stem2([ab])\.conv\.1\.", r".stem2\1.conv."),
        (r"\.aggregation_squeeze_conv\.", ".aggregation.0."),
        (r"\.aggregation_excitation_conv\.", ".aggregation.1."),
        _CONV,
        _NORM,
    ],
    "swin": [
        (r"^backbone\.(?:0\.)?", "backbone.body."),
        (r"\.body\.norm(\d)\.", lambda m: f".body.hidden_states_norms.stage{int(m[1]) + 1}."),
        (r"\.body\.layers\.", ".body.swin.encoder.layers."),
        (r"\.body\.patch_embed\.proj\.", ".body.swin.embeddings.patch_embeddings.projection."),
        (r"\.body\.patch_embed\.norm\.", ".body.swin.embeddings.norm."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (
            r"\.attn\.relative_position_bias_table$",
            ".attn.relative_position_bias.relative_position_bias_table",
        ),
        (r"\.attn\.proj\.", ".attn.o_proj."),
        (r"\.attn\.", ".attention."),
    ],
}

# Buffers that follow from sizes; here they are computed: RT-DETRv2's and D-FINE's, and Swin's.
_DERIVED = re.compile(r"^decoder\.(?:anchors|valid_mask)$|\.relative_position_index$")

RULES: dict[str, Rules] = {
    "detr": _DETR,
    **dict.fromkeys(("dab_detr", "dn_detr"), _DAB_DETR),
    **dict.fromkeys(("deformable_detr", "dab_deformable_detr"), _DEFORMABLE),
    **dict.fromkeys(("dn_deformable_detr", "dino"), _DEFORMABLE),
    **dict.fromkeys(("rtdetr", "rtdetrv2", "deim_rtdetrv2"), _RTDETR),
    **dict.fromkeys(("dfine", "deim"), _DFINE),
    **dict.fromkeys(("mr_detr", "mr_detr_dino", "mr_detr_align"), _MR_DETR),
}


def renamed(system: str, name: str, layers: int, backbone: str | None = None) -> str:
    """The name used here of an official tensor.

    Args:
        system: name of the system in :mod:`~deform_attn.detr.models`.
        name: of the tensor in the official checkpoint.
        layers: of the decoder: in official two-stage checkpoints, heads with this index are those
            of the encoder.
        backbone: one of BACKBONES; None: the backbone's names stay as they are.

    Example:
        >>> from deform_attn.detr.checkpoints import renamed
        >>> renamed("dino", "transformer.decoder.layers.5.norm3.weight", layers=6)
        'decoder.layers.5.norm_ffn.norm.weight'
    """
    if name.startswith("backbone."):
        rules = [] if backbone is None else BACKBONES[backbone]
    else:
        rules = [(r"^transformer\.", ""), *RULES[system]]
        rules += [
            (rf"^decoder\.heads\.class_heads\.{layers}\.", "queries.class_head."),
            (rf"^decoder\.heads\.box_heads\.{layers}\.", "queries.box_head."),
        ]
    for pattern, ours in rules:
        name = re.sub(pattern, ours, name)
    return name


def load_official(
    model: nn.Module, system: str, state: Mapping[str, Tensor], backbone: str | None = None
) -> None:
    """Load an official state dict into a model of the same system and sizes, strictly.

    Args:
        model: built by a function of :mod:`~deform_attn.detr.models`.
        system: the name of that function.
        state: official names to tensors.
        backbone: one of BACKBONES; None: the backbone's names are those of the file.

    Raises:
        KeyError: there are no rules for this system.
        RuntimeError: names are missing or unexpected, shapes differ, or the file has different
            tensors where the model shares one.

    Example:
        >>> from deform_attn.detr.backbones import SmallBackbone
        >>> from deform_attn.detr.checkpoints import load_official
        >>> from deform_attn.detr.models import Size, rtdetr
        >>> size = Size(32, 4, 3, encoder_layers=1, decoder_layers=2, num_queries=10)
        >>> model = rtdetr(SmallBackbone(), 3, size).model
        >>> state = {  # as the official code names them
        ...     name.replace("attn.attention.", "attn.") if "decoder" in name else name: tensor
        ...     for name, tensor in model.state_dict().items()
        ... }
        >>> load_official(model, "rtdetr", state)
    """
    layers = len(cast(nn.ModuleList, model.get_submodule("decoder.layers")))
    maps = len([name for name in state if re.match(r"neck\.convs\.\d+\.conv\.weight$", name)])

    def joined(found: re.Match[str]) -> str:  # Mr. DETR numbers the further levels from 0
        return f"neck.convs.{maps + int(found[1])}."

    given = {
        renamed(
            system, re.sub(r"^neck\.extra_convs\.(\d+)\.", joined, name), layers, backbone
        ): tensor
        for name, tensor in state.items()
        if not _DERIVED.search(name)
    }
    for name in [name for name in given if ".qkv." in name]:
        for part, rows in zip("qkv", given.pop(name).chunk(3)):
            given[name.replace(".qkv.", f".{part}_proj.")] = rows
    load_renamed(model, given)


def load_renamed(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load tensors under the names used here, strictly; a shared tensor needs one of its names.

    Raises:
        RuntimeError: as :func:`load_official`.
    """
    given = dict(given)
    own = model.state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        present = [name for name in names if name in given]
        for name in present[1:]:
            if not torch.equal(given[name], given[present[0]]):
                raise RuntimeError(f"{name}: expected the same values as {present[0]}")
        if present:
            given |= dict.fromkeys(names, given[present[0]])
    for name, tensor in own.items():  # counters of batch norm, which frozen norms do not have
        if name.endswith(".num_batches_tracked"):
            given.setdefault(name, tensor)
    model.load_state_dict(given, strict=True)


def official_state(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an official checkpoint, whichever layout it has.

    That is ``ema.module``, ``model``, ``state_dict``, or the names themselves; prefixes of wrappers
    are removed.

    Raises:
        ValueError: there are no tensors in these places.
    """
    found: Any = content
    for path in (("ema", "module"), ("ema",), ("model",), ("state_dict",), ("model_state_dict",)):
        inner: Any = content
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(x, Tensor) for x in inner.values()):
            found = inner
            break
    state = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    if not state:
        raise ValueError(f"expected tensors, or a dict of them, got {list(content)[:10]}")
    while all(name.startswith(("module.", "_orig_mod.")) for name in state):
        state = {name.partition(".")[2]: x for name, x in state.items()}
    return state


class _Inert:
    """Stands for an unknown class in a checkpoint, so that none of its code runs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Content of a checkpoint, with the weights on the CPU; code in it is never run.

    Objects of other types than tensors and Python's own, such as settings, become inert.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or not a checkpoint; the message names it.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from deform_attn.detr.checkpoints import read_checkpoint
        >>> with TemporaryDirectory() as folder:
        ...     torch.save({"epoch": 3}, Path(folder, "last.pth"))
        ...     read_checkpoint(Path(folder, "last.pth"))
        {'epoch': 3}
    """
    try:
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (RuntimeError, ValueError):  # not a zip archive: torch before 1.6, or damaged
            unknown = []
        inert: list[Any] = [(type(name, (_Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(inert):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises RuntimeError, EOFError, UnpicklingError, ...
        reason = "a file that torch.load(weights_only=True) cannot read"
        if isinstance(error, EOFError):
            reason = "an empty or cut file"
        elif Path(file).suffix == ".safetensors":
            reason = "safetensors: give the folder, which also has the model's config.json"
        elif isinstance(error, RuntimeError | OSError):  # other messages are of no help to users
            reason = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        raise ValueError(f"{file}: expected a checkpoint, got {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a dict, got {type(content).__name__}")
    return content
