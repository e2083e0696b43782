"""Official models by name: system, backbone, sizes and preprocessing of each configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deform_attn.checks import check_choice, check_integer
from deform_attn.detr import models
from deform_attn.detr.backbones import hgnetv2, resnet, resnet_vd, swin_large
from deform_attn.detr.checkpoints import load_official, renamed
from deform_attn.detr.layers import Size
from deform_attn.detr.models import Builder, System

# The 80 classes of COCO by their category ids, which have gaps.
_COCO = """1 person|2 bicycle|3 car|4 motorcycle|5 airplane|6 bus|7 train|8 truck|9 boat
10 traffic light|11 fire hydrant|13 stop sign|14 parking meter|15 bench|16 bird|17 cat|18 dog
19 horse|20 sheep|21 cow|22 elephant|23 bear|24 zebra|25 giraffe|27 backpack|28 umbrella
31 handbag|32 tie|33 suitcase|34 frisbee|35 skis|36 snowboard|37 sports ball|38 kite
39 baseball bat|40 baseball glove|41 skateboard|42 surfboard|43 tennis racket|44 bottle
46 wine glass|47 cup|48 fork|49 knife|50 spoon|51 bowl|52 banana|53 apple|54 sandwich|55 orange
56 broccoli|57 carrot|58 hot dog|59 pizza|60 donut|61 cake|62 chair|63 couch|64 potted plant
65 bed|67 dining table|70 toilet|72 tv|73 laptop|74 mouse|75 remote|76 keyboard|77 cell phone
78 microwave|79 oven|80 toaster|81 sink|82 refrigerator|84 book|85 clock|86 vase|87 scissors
88 teddy bear|89 hair drier|90 toothbrush"""
_NAMED = [entry.split(" ", 1) for line in _COCO.splitlines() for entry in line.split("|")]
_NAMES = {int(number): name for number, name in _NAMED}
COCO_80 = tuple(_NAMES.values())
COCO_91 = tuple(_NAMES.get(i, f"unused {i}") for i in range(91))  # labels are category ids


@dataclass(frozen=True)
class Configuration:
    """An official model.

    Attributes:
        system: builds it, from a backbone, a number of classes and a size.
        backbone: builds the backbone.
        backbone_rules: one of :data:`~deform_attn.detr.checkpoints.BACKBONES`, for official names.
        size: of the system.
        classes: names of the official weights' classes, by label.
        image_size: of the images, in pixels.
        resize: as :func:`~deform_attn.detr.images.as_tensor` takes it.
        options: further arguments of the system.
    """

    system: Builder
    backbone: Callable[[], Any]
    backbone_rules: str
    size: Size
    classes: tuple[str, ...] = COCO_91
    image_size: int = 800
    resize: str = "shortest"
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, num_classes: int | None = None) -> System:
        """The system with random weights, for another number of classes where given."""
        number = len(self.classes) if num_classes is None else num_classes
        return self.system(self.backbone(), number, self.size, **self.options)


def _detr_line() -> dict[str, Configuration]:
    one = partial(Configuration, backbone_rules="resnet")
    found: dict[str, Configuration] = {}
    detr_size = Size(dim_feedforward=2048, num_queries=100, dropout=0.1)
    for depth in (50, 101):
        for dilated, suffix in ((False, ""), (True, "_dc5")):
            backbone = partial(resnet, depth, 1, dilated=dilated)
            found[f"detr_r{depth}{suffix}"] = one(models.detr, backbone, size=detr_size)
    size = Size(dropout=0.1)
    for suffix, options in (
        ("", {}),
        ("_refine", {"refine": True}),
        ("_two_stage", {"two_stage": True}),
    ):
        found[f"deformable_detr_r50{suffix}"] = one(
            models.deformable_detr, resnet, size=size, options=options
        )
    wide = Size(dim_feedforward=2048)
    found["dab_detr_r50"] = one(models.dab_detr, partial(resnet, maps=1), size=wide)
    found["dn_detr_r50"] = one(models.dn_detr, partial(resnet, maps=1), size=wide)
    found["dab_deformable_detr_r50"] = one(models.dab_deformable_detr, resnet, size=wide)
    found["dn_deformable_detr_r50"] = one(models.dn_deformable_detr, resnet, size=wide)
    dino = replace(wide, num_queries=900)
    found["dino_r50_4scale"] = one(models.dino, resnet, size=dino)
    five = replace(dino, num_levels=5)
    found["dino_r50_5scale"] = one(models.dino, partial(resnet, maps=4), size=five)
    large = partial(one, backbone_rules="swin")
    found["dino_swin_l_4scale"] = large(models.dino, swin_large, size=dino)
    found["dino_swin_l_5scale"] = large(models.dino, partial(swin_large, maps=4), size=five)
    routes = partial(one, backbone_rules="detectron2", classes=COCO_80)
    for queries, suffix in ((900, ""), (300, "_300")):
        size = replace(wide, num_queries=queries)
        found[f"mr_detr_r50{suffix}"] = routes(models.mr_detr, resnet, size=size)
    found["mr_detr_dino_r50"] = routes(models.mr_detr_dino, resnet, size=dino)
    found["mr_detr_align_r50"] = routes(models.mr_detr_align, resnet, size=dino)
    longer = {"temperature": 20.0, "shift": 0.0}
    found["mr_detr_align_r50_24ep"] = routes(
        models.mr_detr_align, resnet, size=dino, options=longer
    )
    routes = partial(large, classes=COCO_80)
    found["mr_detr_align_swin_l"] = routes(models.mr_detr_align, swin_large, size=dino)
    found["mr_detr_align_swin_l_5scale"] = routes(
        models.mr_detr_align, partial(swin_large, maps=4), size=five
    )
    found["stewart_r50"] = one(
        models.stewart, resnet, size=Size(d_model=250, dropout=0.15), classes=("person",)
    )
    return found


def _real_time() -> dict[str, Configuration]:
    one = partial(Configuration, classes=COCO_80, image_size=640, resize="stretch")
    found: dict[str, Configuration] = {}
    base = Size(num_levels=3)
    sizes = {
        "r18": replace(base, decoder_layers=3, expansion=0.5),
        "r34": replace(base, decoder_layers=4, expansion=0.5),
        "r50_m": replace(base, expansion=0.5, eval_layers=3),
        "r50": base,
        "r101": replace(base, encoder_dims=(384, 2048)),
    }
    for name, size in sizes.items():
        depth = int(name[1:].removesuffix("_m"))
        free = partial(resnet_vd, depth)
        backbone = partial(resnet_vd, depth, frozen=depth >= 50)
        vd = partial(one, backbone=backbone, backbone_rules="resnet_vd", size=size)
        found[f"rtdetr_{name}"] = vd(models.rtdetr)
        found[f"rtdetrv2_{name}"] = vd(models.rtdetrv2)
        found[f"rtdetrv2_{name}_discrete"] = vd(models.rtdetrv2, options={"method": "discrete"})
        layers = 3 if name == "r50_m" else size.decoder_layers
        deim_size = replace(size, decoder_layers=layers)
        found[f"deim_rtdetrv2_{name}"] = vd(models.deim_rtdetrv2, backbone=free, size=deim_size)
    for name, size in {"l": base, "x": sizes["r101"]}.items():
        backbone = partial(hgnetv2, {"l": "B4", "x": "B5"}[name], frozen=True)
        hgnet = partial(one, backbone=backbone, backbone_rules="hgnetv2", size=size)
        found[f"rtdetr_hgnetv2_{name}"] = hgnet(models.rtdetr)
        found[f"rtdetrv2_hgnetv2_{name}"] = hgnet(models.rtdetrv2)
    fine = models.DFINE_SIZE
    nano = {"d_model": 128, "dim_feedforward": 512, "num_levels": 2, "num_points": (6, 6)}
    fine_sizes: dict[str, tuple[Any, Size]] = {
        "n": (
            partial(hgnetv2, "B0", 2, affine=True),
            Size(decoder_layers=3, expansion=0.34, depth=0.5, **nano),  # type: ignore[arg-type]
        ),
        "s": (
            partial(hgnetv2, "B0", affine=True),
            replace(fine, decoder_layers=3, depth=0.34, expansion=0.5),
        ),
        "m": (
            partial(hgnetv2, "B2", affine=True),
            replace(fine, decoder_layers=4, depth=0.67),
        ),
        "l": (partial(hgnetv2, "B4"), fine),
        "x": (partial(hgnetv2, "B5"), replace(fine, encoder_dims=(384, 2048))),
    }
    for name, (backbone, size) in fine_sizes.items():
        options = {"scale": 8.0} if name == "x" else {}
        fine_one = partial(one, backbone_rules="hgnetv2", size=size, options=options)
        frozen = partial(backbone, frozen=name in "lx")
        found[f"dfine_{name}"] = fine_one(models.dfine, frozen)
        found[f"deim_dfine_{name}"] = fine_one(models.deim, backbone)
    return found


#: Every official configuration, by the name that :func:`create` takes.
CONFIGURATIONS: dict[str, Configuration] = {**_detr_line(), **_real_time()}


def configuration(name: str) -> Configuration:
    """The configuration of that name.

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    check_choice("name", name, CONFIGURATIONS)
    return CONFIGURATIONS[name]


def create(name: str, num_classes: int | None = None) -> System:
    """An official model with random weights: detector, criterion and postprocessing.

    Args:
        name: one of :data:`CONFIGURATIONS`, such as ``rtdetr_r18``.
        num_classes: number of classes; by default COCO's, as in the official weights.

    Raises:
        ValueError: an unknown name, or a number below 1.
        TypeError: the number is no integer.
        ModuleNotFoundError: transformers, which has the backbones, is not installed.

    Example:
        >>> from deform_attn.detr import create
        >>> model, criterion, postprocess = create("rtdetr_r18", num_classes=3)
        >>> sum(p.numel() for p in model.parameters()) // 1_000_000
        20
    """
    one = configuration(name)
    if num_classes is not None:
        check_integer("num_classes", num_classes, 1)
    return one.build(num_classes)


# Names of official parameters by which each system is recognised.
_SIGNATURES: dict[str, tuple[str, ...]] = {
    "detr": (r"^query_embed\.weight", r"decoder\.layers\.0\.multihead_attn\."),
    "deformable_detr": (r"^transformer\.(?:reference_points|pos_trans)\.",),
    "dab_detr": (r"^refpoint_embed\.", r"decoder\.layers\.0\.sa_qcontent_proj\."),
    "dn_detr": (r"^label_enc\.", r"decoder\.layers\.0\.sa_qcontent_proj\."),
    "dab_deformable_detr": (r"^refpoint_embed\.", r"decoder\.layers\.0\.cross_attn\.sampling"),
    "dn_deformable_detr": (r"^label_enc\.", r"^tgt_embed\.", r"\.cross_attn\.sampling_offsets\."),
    "dino": (r"^transformer\.enc_out_class_embed\.", r"^label_enc\."),
    "mr_detr": (r"\.instruction_o2m",),
    "mr_detr_dino": (r"\.instruction_o2m", r"^label_enc\."),
    "mr_detr_align": (r"\.instruction_o2m", r"^label_enc\."),
    "rtdetr": (r"^decoder\.enc_score_head\.", r"\.cross_attn\.value_proj\."),
    "rtdetrv2": (r"^decoder\.enc_score_head\.", r"\.value_proj\.", r"\.num_points_scale$"),
    "deim_rtdetrv2": (r"\.value_proj\.", r"^decoder\.query_pos_head\.layers\.2\."),
    "dfine": (r"^decoder\.decoder\.lqe_layers\.",),
    "deim": (r"^decoder\.decoder\.lqe_layers\.",),
}


# Words of file names that tell models with the same names and shapes apart.
_HINTS = ("deim", "discrete", "dsp", "dc5", "dino", "align", "24ep")


def identify(state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Which configurations an official state dict fits, and its number of classes.

    Args:
        state: official names to tensors, see :func:`~deform_attn.detr.checkpoints.official_state`.

    Returns:
        Names of :data:`CONFIGURATIONS`, those with fewest parameters first, and numbers of classes.
        Some official models have the same names and shapes: D-FINE and DEIM, or RT-DETRv2 with and
        without discrete sampling.

    Example:
        >>> import torch
        >>> from deform_attn.detr.zoo import identify
        >>> identify({"class_embed.weight": torch.zeros(92, 256)})  # of no whole model
        []
    """
    fitting = []
    for name, one in CONFIGURATIONS.items():
        patterns = _SIGNATURES.get(one.system.__name__)
        if patterns is None or not all(
            any(re.search(pattern, key) for key in state) for pattern in patterns
        ):
            continue
        num_classes = _num_classes(one, state)
        if num_classes is None:
            continue
        with torch.device("meta"):
            model = one.build(num_classes).model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is copied to the device "meta"
            try:
                load_official(model, one.system.__name__, state, one.backbone_rules)
            except RuntimeError:
                continue
        fitting.append((sum(p.numel() for p in model.parameters()), name, num_classes))
    return [(name, num_classes) for _, name, num_classes in sorted(fitting, key=lambda x: x[0])]


def _num_classes(one: Configuration, state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of an official state dict.

    None where its backbone is of another kind, or its decoder has another number of layers.
    """
    layers = one.size.decoder_layers
    names = {renamed(one.system.__name__, key, layers, one.backbone_rules): key for key in state}
    if any(name.startswith("backbone.") and ".body." not in name for name in names):
        return None
    last = f"decoder.layers.{layers - 1}.ffn.linear1.bias"
    bias = names.get("decoder.heads.class_heads.0.bias")
    if bias is None or last not in names or last.replace(str(layers - 1), str(layers)) in names:
        return None
    return len(state[bias]) - (one.system is models.detr)


def from_official(
    state: Mapping[str, Tensor], hint: str = "", name: str | None = None
) -> tuple[str, System, int]:
    """Build the model of an official state dict, and load it.

    Args:
        state: as :func:`identify` takes it.
        hint: such as the file's name, which decides between configurations that fit equally.
        name: one of :data:`CONFIGURATIONS`, instead of finding out.

    Returns:
        The configuration's name, the system, and its number of classes.

    Raises:
        ValueError: no configuration fits.
        RuntimeError: ``name`` does not fit; the message has missing and unexpected names.
    """
    fitting = identify(state) if name is None else []
    if name is None and not fitting:
        systems = [
            system
            for system, patterns in _SIGNATURES.items()
            if all(any(re.search(p, key) for key in state) for p in patterns)
        ]
        looks = (
            f"looks like {' or '.join(systems)} of other sizes" if systems else "is none of them"
        )
        raise ValueError(
            f"expected the weights of {', '.join(CONFIGURATIONS)}; this file {looks}: "
            f"{len(state)} tensors such as {', '.join(list(state)[:3])}"
        )
    if name is None:
        chosen = [name for name, _ in fitting]
        words = [w for w in _HINTS if w in hint.lower()]
        words = ["discrete" if w == "dsp" else w for w in words]
        best = [n for n in chosen if all(w in n for w in words)] or chosen
        named = [n for n in chosen if n in hint.lower()]
        if named and not words:
            best = sorted(named, key=len, reverse=True)
        name = best[0]
        if len(chosen) > 1 and not words and not named:
            others = ", ".join(n for n in chosen if n != name)
            warnings.warn(
                f"the weights fit {name} and {others}, which have the same names and shapes; "
                f"takes {name}, pass model= for another",
                stacklevel=3,
            )
    one = configuration(name)
    num_classes = _num_classes(one, state)
    system = one.build(num_classes)
    load_official(system.model, one.system.__name__, state, one.backbone_rules)
    return name, system, len(one.classes) if num_classes is None else num_classes
