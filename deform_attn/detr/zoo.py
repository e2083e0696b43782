"""Official models by name: system, backbone, sizes and preprocessing of each configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from deform_attn.detr import models
from deform_attn.detr.backbones import hgnetv2, resnet, resnet_vd
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
    found["dino_r50_5scale"] = one(
        models.dino, partial(resnet, maps=4), size=replace(dino, num_levels=5)
    )
    mr_size = Size(num_queries=900, dim_feedforward=2048)
    found["mr_detr_r50"] = Configuration(
        models.mr_detr, resnet, "detectron2", mr_size, classes=COCO_80
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
        backbone = partial(resnet_vd, int(name[1:].removesuffix("_m")))
        vd = partial(one, backbone=backbone, backbone_rules="resnet_vd", size=size)
        found[f"rtdetr_{name}"] = vd(models.rtdetr)
        found[f"rtdetrv2_{name}"] = vd(models.rtdetrv2)
        found[f"rtdetrv2_{name}_discrete"] = vd(models.rtdetrv2, options={"method": "discrete"})
        found[f"deim_rtdetrv2_{name}"] = vd(models.deim_rtdetrv2)
    for name, size in {"l": base, "x": sizes["r101"]}.items():
        backbone = partial(hgnetv2, {"l": "B4", "x": "B5"}[name])
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
        found[f"dfine_{name}"] = fine_one(models.dfine, backbone)
        found[f"deim_dfine_{name}"] = fine_one(models.deim, backbone)
    return found


#: Every official configuration, by the name that :func:`create` takes.
CONFIGURATIONS: dict[str, Configuration] = {**_detr_line(), **_real_time()}


def configuration(name: str) -> Configuration:
    """The configuration of that name.

    Raises:
        ValueError: an unknown name; the message lists all.
    """
    if name not in CONFIGURATIONS:
        raise ValueError(f"name: expected one of {', '.join(CONFIGURATIONS)}; got {name!r}")
    return CONFIGURATIONS[name]


def create(name: str, num_classes: int | None = None) -> System:
    """An official model with random weights: detector, criterion and postprocessing.

    Args:
        name: one of :data:`CONFIGURATIONS`, such as ``rtdetr_r18``.
        num_classes: number of classes; by default COCO's, as in the official weights.

    Raises:
        ValueError: an unknown name.
        ModuleNotFoundError: transformers, which has the backbones, is not installed.

    Example:
        >>> from deform_attn.detr import create
        >>> model, criterion, postprocess = create("rtdetr_r18", num_classes=3)
        >>> sum(p.numel() for p in model.parameters()) // 1_000_000
        20
    """
    return configuration(name).build(num_classes)
