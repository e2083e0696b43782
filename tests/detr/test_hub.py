"""Detectors of transformers, from a folder: the same outputs, with padding where they have it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import nn

from deform_attn.detr import load
from deform_attn.detr.hub import from_transformers
from deform_attn.detr.predict import open_detector

from .official import weight
from .recorded import relative_error

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64]}
THREE = ["stage2", "stage3", "stage4"]


def resnet(*stages: str) -> Any:
    return transformers.ResNetConfig(depths=[1] * 4, out_features=list(stages), **SMALL)


def hybrid(**options: Any) -> dict[str, Any]:
    sizes = {"encoder_hidden_dim": 32, "encoder_in_channels": [32, 48, 64], "encoder_ffn_dim": 64}
    sizes |= {"encoder_attention_heads": 4, "d_model": 32, "num_queries": 20, "num_labels": 5}
    sizes |= {"decoder_in_channels": [32] * 3, "decoder_ffn_dim": 64, "decoder_layers": 3}
    return sizes | {"decoder_attention_heads": 4, "hidden_expansion": 0.5} | options


def line(*stages: str, **options: Any) -> dict[str, Any]:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_queries": 20}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_labels": 5}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "backbone": None}
    sizes |= {"use_timm_backbone": False, "use_pretrained_backbone": False}
    return sizes | {"backbone_config": resnet(*stages)} | options


def made(kind: str) -> Any:
    vd = {"depths": [1] * 4, "layer_type": "basic", "out_features": THREE, **SMALL}
    rtdetr = transformers.RTDetrResNetConfig(**vd)
    hgnet = transformers.HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 32, 48],
        stage_mid_channels=[8] * 4,
        stage_out_channels=[16, 32, 48, 64],
        stage_num_blocks=[1] * 4,
        stage_numb_of_layers=[2] * 4,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1] * 4,
        use_learnable_affine_block=True,
        out_features=THREE,
    )
    two = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 20}
    fine = {"depth_mult": 0.34, "decoder_n_points": [3, 6, 3], "backbone_config": hgnet}
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "rt_detr": ("RTDetr", hybrid(backbone_config=rtdetr)),
        "rt_detr_v2": ("RTDetrV2", hybrid(backbone_config=rtdetr)),
        "rt_detr_v2_discrete": (
            "RTDetrV2",
            hybrid(backbone_config=rtdetr, decoder_method="discrete"),
        ),
        "d_fine": ("DFine", hybrid(**fine)),
        "deformable_detr": ("DeformableDetr", line(*THREE)),
        "deformable_detr_refine": ("DeformableDetr", line(*THREE, with_box_refine=True)),
        "deformable_detr_two_stage": ("DeformableDetr", line(*THREE, **two)),
        "detr": ("Detr", line("stage4")),
        "dab_detr": ("DabDetr", line("stage4", hidden_size=32)),
    }
    name, given = options[kind]
    config = getattr(transformers, name + "Config")(**given)
    return getattr(transformers, name + "ForObjectDetection")(config)


KINDS = ("rt_detr", "rt_detr_v2", "rt_detr_v2_discrete", "d_fine", "deformable_detr")
KINDS += ("deformable_detr_refine", "deformable_detr_two_stage", "detr", "dab_detr")


def draw_weights(model: nn.Module) -> None:
    """Weights that follow from their names; those of norms are near 1."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith("n_points_scale"):
                continue
            value = weight(name, tensor.shape)
            if value is not None:
                one = tensor.dim() == 1 and name.endswith("weight") and value.abs().max() < 0.5
                tensor.copy_(value + one)


def takes_mask(kind: str) -> bool:
    return kind.startswith("d") and kind != "d_fine"


def errors(kind: str, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Relative errors of logits and boxes, from pixels, of a detector saved in this folder."""
    source = made(kind)
    draw_weights(source)
    source.save_pretrained(folder)
    model: Any = from_transformers(folder)[0].model
    padded, options = takes_mask(kind), {}
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 128, 160 if padded else 128, generator=generator).to(dtype)
    mask = torch.zeros(images[:, 0].shape, dtype=torch.bool) if padded else None
    if mask is not None:
        mask[1, 96:], mask[1, :, 128:] = True, True
        options["pixel_mask"] = (~mask).long()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", partial(torch.zeros, dtype=dtype))  # of DAB-DETR
        expected = source.to(dtype).eval()(model.normalize(images, mask), **options)
        found = model.to(dtype).eval()(images, mask)
    assert expected.logits.std() > 0.1
    return (
        relative_error(found["logits"][-1], expected.logits),
        relative_error(found["boxes"][-1], expected.pred_boxes),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """In float64; transformers has constants of float32 in its proposals."""
    assert max(errors(kind, tmp_path, torch.float64)) < 1e-6
    _, classes, size, resize = from_transformers(tmp_path)
    assert (size, resize) == ((800, "shortest") if takes_mask(kind) else (640, "stretch"))
    assert classes == tuple(f"LABEL_{i}" for i in range(5))


def test_a_folder_is_loaded_and_used(tmp_path: Path) -> None:
    made("rt_detr_v2").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "RTDetrImageProcessor", "do_normalize": false, '
        '"size": {"height": 96, "width": 96}}'
    )
    detector = load(tmp_path)
    assert (detector.size, detector.resize) == (96, "stretch")
    assert detector.predict([torch.rand(3, 30, 40)], threshold=0)[0]["boxes"].shape == (20, 4)


def test_another_type_is_named(tmp_path: Path) -> None:
    transformers.ResNetConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model of type detr, .*, got resnet"):
        from_transformers(tmp_path)


def test_a_name_that_is_no_path_and_not_on_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only ORGANIZATION/MODEL asks the hub, with a time limit."""
    asked = Mock(side_effect=TimeoutError("timed out"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/first/model.pt").touch()
    for name, message in (
        ("runs/frist", "'runs' has no 'frist'; similar: 'first'"),
        ("./rnus/first", "'.' has no 'rnus'; similar: 'runs'"),
        ("other/model.pt", "'.' has no 'other'; it has 'runs'"),
        ("other/model/", "'.' has no 'other'; it has 'runs'"),
        ("a/b/c", "'.' has no 'a'; it has 'runs'"),
        ("a\\b", r"'.' has no 'a\\\\b'; it has 'runs'"),
        ("runs/first/model.pt/x", "'runs/first/model.pt' is a file"),
        (str(tmp_path / "rnus"), f"'{tmp_path}' has no 'rnus'; similar: 'runs'"),
        ("digist", "'.' has no 'digist'; similar: 'digits'"),
        ("n" * 300, "'.' has no 'nnn"),
        ("", "got ''$"),
    ):
        with pytest.raises(FileNotFoundError, match=f"^init: expected .*{message}"):
            open_detector("init", name)
    assert asked.call_count == 0
    with pytest.raises(FileNotFoundError, match=r"^init: .* got 'runz/it': .*: 'runs'; .* timed o"):
        open_detector("init", "runz/it")
    assert 0 < asked.call_args.kwargs["timeout"] < 30
    cached = Mock(return_value="config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    read = Mock(side_effect=OSError("not cached"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", read)
    with pytest.raises(OSError, match="not cached"):
        from_transformers("runz/it")
    assert read.call_args.kwargs["local_files_only"]
