"""The systems by name, small enough to be trained on a CPU in minutes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from deform_attn.detr import models
from deform_attn.detr.encoder import Size
from deform_attn.detr.models import Builder, SmallBackbone, System


@dataclass(frozen=True)
class Recipe:
    """A system, and what its training does otherwise than the others'.

    Attributes:
        system: makes it, from a backbone, a number of classes and a size.
        augment: one of AUGMENTATIONS.
        slow: parameters with one of these in their name learn at a tenth of the rate.
        maps: of the backbone, at 1/4, 1/8 and 1/16; dense attention reads the last one.
        points: samples of a query, head and level.
        classes: factor of the classification's loss. From scratch, dense attention with a focal
            loss finds boxes long before it tells their classes apart.
    """

    system: Builder
    augment: str = "flip"
    slow: tuple[str, ...] = ()
    maps: int = 3
    points: int | tuple[int, ...] = 4
    classes: float = 1.0


SAMPLING = ("sampling_offsets", "queries.points")  # offsets, reference points
TWO_STAGE = partial(models.deformable_detr, two_stage=True)
RECIPES = {
    "stewart": Recipe(models.stewart),
    "detr": Recipe(models.detr, maps=2),
    "dab_detr": Recipe(models.dab_detr, maps=2, classes=8),
    "deformable_detr": Recipe(partial(models.deformable_detr, refine=True), slow=SAMPLING),
    "deformable_detr_two_stage": Recipe(TWO_STAGE, slow=SAMPLING),
    "dab_deformable_detr": Recipe(models.dab_deformable_detr, slow=SAMPLING),
    "dn_deformable_detr": Recipe(models.dn_deformable_detr, slow=SAMPLING),
    "dino": Recipe(models.dino),
    "rtdetr": Recipe(models.rtdetr),
    "rtdetrv2": Recipe(partial(models.rtdetr, version=2), points=models.FINE.points),
    "dfine": Recipe(models.dfine, points=models.FINE.points),
    "deim": Recipe(models.deim, augment="dense", points=models.FINE.points),
    "mr_detr": Recipe(models.mr_detr, slow=SAMPLING),
}

# The blocks that fuse maps are as in D-FINE-S.
SMALL = Size(levels=3, encoder_layers=1, depth=1 / 3, expansion=0.5)


def build(recipe: str, num_classes: int, width: int, layers: int, queries: int) -> System:
    """A small model of a system on `SmallBackbone`, with its criterion and postprocessing.

    Args:
        recipe: one of RECIPES.
        num_classes: number of classes.
        width: channels of queries and memory, a multiple of 32.
        layers: of the decoder; the encoder has one.
        queries: number of them.
    """
    how = RECIPES[recipe]
    size = replace(SMALL, d=width, heads=width // 16, hidden=4 * width, decoder_layers=layers)
    size = replace(size, queries=queries, points=how.points)
    backbone = SmallBackbone((width // 2, width, width)[: how.maps])
    system = how.system(backbone, num_classes, size)
    weights = system.criterion.weights
    system.criterion.weights = {**weights, "class": how.classes * weights["class"]}
    return system
