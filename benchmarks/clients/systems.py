"""The models that are compared: how each library builds one with random weights.

A builder takes the side of a square image and returns a module that takes the image alone and
returns a flat tuple of tensors. Offsets and weights of the points are drawn at random, because the
default initialisation puts every point on a pixel centre with equal weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES: list[Any] = []


@dataclass(frozen=True)
class System:
    """A model of a library."""

    environment: str  # name of an environment, see environments.py
    module: str  # to import: absent where it cannot be
    build: Callable[[int], nn.Module]
    side: int = 640  # of the image that is timed
    small: int = 256  # of the image that outputs, gradients and exports are compared on


class Flat(nn.Module):
    """A model that takes an image and returns a flat tuple of floating tensors."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.model(image, **self.kwargs)))


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def build(name: str, side: int) -> nn.Module:
    """A system in evaluation mode with points spread at random."""
    torch.manual_seed(0)
    model = SYSTEMS[name].build(side).eval()
    for module in model.modules():
        for projection, std in (("sampling_offsets", 0.02), ("attention_weights", 0.05)):
            linear = getattr(module, projection, None)
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=std)
    return model


def _torchvision() -> None:
    """Let torchvision be imported where its compiled operators cannot be loaded."""
    if importlib.util.find_spec("torchvision") and not _LIBRARIES:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def _mmdet(config: str) -> Callable[[int], nn.Module]:
    def build(side: int) -> nn.Module:
        from deform_attn.integrations import install_shims

        _torchvision()
        install_shims("mmcv._ext")  # mmcv-lite has no extension, which mmdet imports
        mmdet = importlib.import_module("mmdet")
        utils = importlib.import_module("mmdet.utils")
        utils.register_all_modules()
        folder = Path(mmdet.__file__).parent / ".mim" / "configs"
        loaded = importlib.import_module("mmengine.config").Config.fromfile(folder / config)
        loaded.model.backbone.init_cfg = None
        model = importlib.import_module("mmdet.registry").MODELS.build(loaded.model)
        structures = importlib.import_module("mmdet.structures")
        size = (side, side)
        sample = structures.DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size})
        return Flat(model, data_samples=[sample], mode="tensor")

    return build


def _groundingdino(side: int) -> nn.Module:
    _torchvision()
    transformers = importlib.import_module("transformers")
    folder = tempfile.mkdtemp(prefix="bert-")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat", "dog", "remote"]
    vocabulary = Path(folder) / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(vocabulary)).save_pretrained(folder)
    config = transformers.BertConfig(vocab_size=len(words), num_hidden_layers=2)
    transformers.BertModel(config).save_pretrained(folder)
    package = importlib.import_module("groundingdino")
    slconfig = importlib.import_module("groundingdino.util.slconfig")
    swin = Path(package.__file__).parent / "config" / "GroundingDINO_SwinT_OGC.py"
    arguments = slconfig.SLConfig.fromfile(str(swin))
    arguments.device, arguments.text_encoder_type = "cpu", folder
    arguments.use_checkpoint = arguments.use_transformer_ckpt = False
    model = importlib.import_module("groundingdino.models").build_model(arguments)
    return Flat(model, captions=["cat . dog . remote ."])


def _dfine_seg(side: int) -> nn.Module:
    _torchvision()
    module = importlib.import_module("dfine_seg.model.dfine")
    return Flat(module.build_model("s", 80, False, "cpu", img_size=[side, side]))


def _pydfine(side: int) -> nn.Module:
    _torchvision()
    module = importlib.import_module("dfine.model")
    return Flat(module.DFINE("s", backbone_pretrained=False, device="cpu").model)


def _ultralytics(side: int) -> nn.Module:
    _torchvision()
    return Flat(importlib.import_module("ultralytics").RTDETR("rtdetr-l.yaml").model)


def _rfdetr(side: int) -> nn.Module:
    _torchvision()
    module = importlib.import_module("rfdetr")
    return Flat(module.RFDETRNano(pretrain_weights=None, device="cpu").model.model)


def _libreyolo(name: str, size: str) -> Callable[[int], nn.Module]:
    def build(side: int) -> nn.Module:
        _torchvision()
        cls = getattr(importlib.import_module("libreyolo"), name)
        return Flat(cls(None, size, device="cpu").model)

    return build


def _transformers(name: str, **options: Any) -> Callable[[int], nn.Module]:
    def build(side: int) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{name}Config")(**options)
        return Flat(getattr(transformers, f"{name}ForObjectDetection")(config))

    return build


_DEFORMABLE = "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
_DINO = "dino/dino-4scale_r50_8xb2-12e_coco.py"

SYSTEMS = {
    "mmdet Deformable DETR": System("mmdet", "mmdet", _mmdet(_DEFORMABLE)),
    "mmdet DINO": System("mmdet", "mmdet", _mmdet(_DINO)),
    "mmdet Mask2Former": System(
        "mmdet", "mmdet", _mmdet("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py")
    ),
    "onedl Deformable DETR": System("onedl", "mmdet", _mmdet(_DEFORMABLE)),
    "onedl DINO": System("onedl", "mmdet", _mmdet(_DINO)),
    "rf-groundingdino": System("groundingdino", "groundingdino", _groundingdino),
    "groundingdino-py": System("groundingdino-py", "groundingdino", _groundingdino),
    "transformers RT-DETR": System("", "transformers", _transformers("RTDetr")),
    "dfine-seg S": System("dfine", "dfine_seg", _dfine_seg, small=320),
    "pydfine S": System("dfine", "dfine", _pydfine, small=640),
    "ultralytics RT-DETR-L": System("ultralytics", "ultralytics", _ultralytics, small=320),
    "rfdetr Nano": System("rfdetr", "rfdetr", _rfdetr, side=384, small=384),
    "LibreYOLO D-FINE-S": System(
        "libreyolo", "libreyolo", _libreyolo("LibreDFINE", "s"), small=640
    ),
    "LibreYOLO RT-DETRv2-R18": System(
        "libreyolo", "libreyolo", _libreyolo("LibreRTDETRv2", "r18"), small=640
    ),
    "LibreYOLO Deformable DETR": System(
        "libreyolo", "libreyolo", _libreyolo("LibreDeformableDETR", "r50"), small=320
    ),
    "LibreYOLO LW-DETR-T": System(
        "libreyolo", "libreyolo", _libreyolo("LibreLWDETR", "t"), small=640
    ),
    "LibreYOLO GTR-S": System("libreyolo", "libreyolo", _libreyolo("LibreGTR", "s"), small=640),
}
