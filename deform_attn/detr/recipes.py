"""Recipes: how each system is trained, small enough for minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from deform_attn.checks import check_choice
from deform_attn.detr import models
from deform_attn.detr.backbones import SmallBackbone
from deform_attn.detr.layers import Size
from deform_attn.detr.models import Builder, System


@dataclass(frozen=True)
class Recipe:
    """How a system is trained.

    Attributes:
        system: builds it from a backbone, a number of classes and a size.
        augment: one of AUGMENTATIONS.
        slow: parameters with one of these in their name have a tenth of the learning rate.
        maps: number of the backbone's maps, at 1/4, 1/8 and 1/16 of the image; dense attention uses
            the last one.
        num_points: of :class:`~deform_attn.detr.layers.Size`.
        class_weight: factor of the classification loss. From random weights, dense attention with a
            focal loss learns boxes long before classes.
    """

    system: Builder
    augment: str = "flip"
    slow: tuple[str, ...] = ()
    maps: int = 3
    num_points: int | tuple[int, ...] = 4
    class_weight: float = 1.0


SAMPLING = ("sampling_offsets", "queries.reference_points")
TWO_STAGE = partial(models.deformable_detr, two_stage=True)
RECIPES = {
    "stewart": Recipe(models.stewart),
    "detr": Recipe(models.detr, maps=2),
    "dab_detr": Recipe(models.dab_detr, maps=2, class_weight=8),
    "deformable_detr": Recipe(partial(models.deformable_detr, refine=True), slow=SAMPLING),
    "deformable_detr_two_stage": Recipe(TWO_STAGE, slow=SAMPLING),
    "dab_deformable_detr": Recipe(models.dab_deformable_detr, slow=SAMPLING),
    "dn_deformable_detr": Recipe(models.dn_deformable_detr, slow=SAMPLING),
    "dino": Recipe(models.dino),
    "rtdetr": Recipe(models.rtdetr),
    "rtdetrv2": Recipe(models.rtdetrv2, num_points=models.DFINE_SIZE.num_points),
    "dfine": Recipe(models.dfine, num_points=models.DFINE_SIZE.num_points),
    "deim": Recipe(models.deim, augment="dense", num_points=models.DFINE_SIZE.num_points),
    "mr_detr": Recipe(models.mr_detr, slow=SAMPLING),
}

# The fusion blocks have the sizes of D-FINE-S.
SMALL = Size(num_levels=3, encoder_layers=1, depth=1 / 3, expansion=0.5)


def build(recipe: str, num_classes: int, width: int, layers: int, queries: int) -> System:
    """A small system on :class:`~deform_attn.detr.backbones.SmallBackbone`.

    Args:
        recipe: one of RECIPES.
        num_classes: number of classes.
        width: channels of queries and memory, a multiple of 32.
        layers: of the decoder; the encoder has one.
        queries: number of queries.

    Raises:
        ValueError: an unknown recipe.
    """
    check_choice("recipe", recipe, RECIPES)
    chosen = RECIPES[recipe]
    size = replace(
        SMALL,
        d_model=width,
        num_heads=width // 16,
        dim_feedforward=4 * width,
        decoder_layers=layers,
        num_queries=queries,
        num_points=chosen.num_points,
    )
    backbone = SmallBackbone((width // 2, width, width)[: chosen.maps])
    system = chosen.system(backbone, num_classes, size)
    weights = system.criterion.weights
    system.criterion.weights = {**weights, "class": chosen.class_weight * weights["class"]}
    return system
