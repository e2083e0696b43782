"""Loading official state dicts: strictly. That the names are right, test_parity.py shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deform_attn.detr import models
from deform_attn.detr.checkpoints import load_official

from .recorded import Golden
from .systems import Maps, projection, size_of


@pytest.fixture
def official(goldens: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """DETR, and all of its official tensors."""
    golden = Golden("detr", goldens)
    model = models.detr(Maps(8), golden.config["classes"], size_of(golden)).model
    queries = {"query_embed.weight": golden["in/query_pos"]}
    return model, golden.state() | projection(golden) | queries


def test_one_name_for_all_layers(official: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, state = official
    load_official(model, "detr", state)
    for i in range(3):
        loaded = model.get_parameter(f"decoder.heads.class_heads.{i}.weight")
        assert torch.equal(loaded, state["class_embed.weight"])


def test_nothing_is_missing_or_left_over(official: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, state = official
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        load_official(model, "detr", state | {"other.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_official(model, "detr", state | {"class_embed.bias": torch.zeros(1)})
    del state["transformer.decoder.layers.1.norm2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.norm_cross\.norm\.weight"):
        load_official(model, "detr", state)
    with pytest.raises(KeyError, match="dter"):
        load_official(model, "dter", state)
