"""Gradient checkpointing: less memory for activations, for a second forward pass of each block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from deform_attn.detr.decoder import DecoderLayer
from deform_attn.detr.encoder import EncoderLayer
from deform_attn.detr.hybrid import GELAN, CSPRep

LAYERS = (EncoderLayer, DecoderLayer, CSPRep, GELAN)
LISTS = (nn.ModuleList, nn.Sequential)  # not their subclasses
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recompute(model: nn.Module) -> list[nn.Module]:
    """Let a detector keep only the inputs of its blocks and compute them again for the gradients.

    The gradients are the same to the bit where the kernels are deterministic: the second pass has
    the random numbers of the first one, and batch norms count each batch once. Names of parameters
    do not change. A copy of the model made before is not affected; do not copy it afterwards.

    Args:
        model: of :class:`~deform_attn.detr.models.System`, changed in place.

    Returns:
        The blocks: those of the backbone, encoder and decoder layers, and the fusion blocks of
        RT-DETR and D-FINE.
    """
    found: list[nn.Module] = [one for one in model.modules() if isinstance(one, LAYERS)]
    found += _blocks(model.get_submodule("backbone"))
    for block in found:
        block.forward = _recomputed(block, block.forward)
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The stem of a backbone, and the blocks of its stages; a stage without a list is one."""
    for child in module.children():
        if type(child) in LISTS:
            for stage in child.children():
                within = [one for one in stage.children() if type(one) in LISTS]
                yield from [block for one in within for block in one.children()] or [stage]
        elif any(isinstance(one, nn.ModuleList) for one in child.modules()):
            yield from _blocks(child)
        elif not isinstance(child, nn.ModuleDict):
            yield child


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(block)

    def run(*args: Any, **options: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)

    return run


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their statistics."""
    kept = []
    for norm in block.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            kept.append((norm, {name: getattr(norm, name) for name in STATISTICS}))
    try:
        for norm, statistics in kept:
            for name, value in statistics.items():
                setattr(norm, name, value.clone())
        yield
    finally:
        for norm, statistics in kept:
            for name, value in statistics.items():
                setattr(norm, name, value)
