"""The systems by name, small enough to be trained on a CPU in minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from deform_attn.detr import models
from deform_attn.detr.encoder import Size
from deform_attn.detr.models import SmallBackbone, System

__all__ = ["RECIPES", "Recipe", "build"]


@dataclass(frozen=True)
class Recipe:
    """A system, and what its training does otherwise than the others'.

    Attributes:
        system: makes it, from a backbone, a number of classes and a size.
        augment: one of AUGMENTATIONS.
        slow: parameters with one of these in their name learn at a tenth of the rate.
        maps: of the backbone, at 1/4, 1/8 and 1/16; dense attention reads the last one.
    """

    system: Callable[..., System]
    augment: str = "flip"
    slow: tuple[str, ...] = ()
    maps: int = 3


SAMPLING = ("sampling_offsets", "queries.points")  # offsets, reference points
TWO_STAGE = partial(models.deformable_detr, two_stage=True)
RECIPES = {
    "stewart": Recipe(models.stewart),
    "detr": Recipe(models.detr, maps=2),
    "dab_detr": Recipe(models.dab_detr, maps=2),
    "deformable_detr": Recipe(partial(models.deformable_detr, refine=True), slow=SAMPLING),
    "deformable_detr_two_stage": Recipe(TWO_STAGE, slow=SAMPLING),
    "dab_deformable_detr": Recipe(models.dab_deformable_detr, slow=SAMPLING),
    "dn_deformable_detr": Recipe(models.dn_deformable_detr, slow=SAMPLING),
    "dino": Recipe(models.dino),
    "rtdetr": Recipe(models.rtdetr),
    "rtdetrv2": Recipe(partial(models.rtdetr, version=2)),
    "dfine": Recipe(models.dfine),
    "deim": Recipe(models.deim, augment="dense"),
    "mr_detr": Recipe(models.mr_detr, slow=SAMPLING),
}


def build(recipe: str, num_classes: int, width: int, layers: int, queries: int) -> System:
    """A small model of a system on `SmallBackbone`, with its criterion and postprocessing.

    Args:
        recipe: one of RECIPES.
        num_classes: number of classes.
        width: channels of queries and memory, a multiple of 32.
        layers: of the decoder; the encoder has one.
        queries: number of them.
    """
    size = Size(
        d=width,
        heads=width // 16,
        levels=3,
        encoder_layers=1,
        decoder_layers=layers,
        hidden=4 * width,
        queries=queries,
        depth=1 / 3,  # as in the smallest models of RT-DETR
        expansion=0.5,
    )
    backbone = SmallBackbone((width // 2, width, width)[: RECIPES[recipe].maps])
    return RECIPES[recipe].system(backbone, num_classes, size)
