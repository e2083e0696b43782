"""The models that are compared: how each library builds one with random weights.

A builder takes the side of a square image and returns a module that takes the image alone and
returns a flat tuple of tensors. Offsets and weights of the points are drawn at random, because the
default initialisation puts every point on a pixel centre with equal weights.
"""

from __future__ import annotations

import dataclasses
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


class Flat(nn.Module):
    """A model that takes an image and returns a flat tuple of floating tensors.

    Args:
        model: the library's module.
        own: writes an ONNX file by the library's own command, given this object, the side of an
            image and a folder; returns the file's path.
        owner: the library's object that holds ``model``, where the command belongs to it.
        kwargs: further arguments of ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        own: Callable[[Flat, int, Path], Any] | None = None,
        owner: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.own = own
        self.owner = [owner]  # in a list, where it is no submodule
        self.kwargs = kwargs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.model(image, **self.kwargs)))


@dataclass(frozen=True)
class System:
    """A model of a library."""

    environment: str  # name of an environment, see environments.py
    package: str  # distribution whose version the table names
    module: str  # to import: absent where it cannot be
    build: Callable[[int], Flat]
    side: int = 640  # of the image that is timed
    small: int = 256  # of the image that outputs, gradients and exports are compared on


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if dataclasses.is_dataclass(output) and not isinstance(output, dict):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def build(name: str, side: int) -> Flat:
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


def _mmdet(config: str) -> Callable[[int], Flat]:
    def build(side: int) -> Flat:
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
        if hasattr(model, "level_embed"):  # unset memory, and init_weights makes equal boxes
            nn.init.normal_(model.level_embed)
        structures = importlib.import_module("mmdet.structures")
        size = (side, side)
        sample = structures.DetDataSample(metainfo={"batch_input_shape": size, "img_shape": size})
        return Flat(model, data_samples=[sample], mode="tensor")

    return build


def _groundingdino(side: int) -> Flat:
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


def _dfine_seg(side: int) -> Flat:
    _torchvision()
    module = importlib.import_module("dfine_seg.model.dfine")
    return Flat(module.build_model("s", 80, False, "cpu", img_size=[side, side]))


def _pydfine(side: int) -> Flat:
    def export(flat: Flat, side: int, folder: Path) -> Any:
        return flat.owner[0].export(file=folder / "model.onnx", imgsz=side, dynamic=False)

    _torchvision()
    owner = importlib.import_module("dfine.model").DFINE("s", backbone_pretrained=False)
    return Flat(owner.model, export, owner)


def _ultralytics(side: int) -> Flat:
    def export(flat: Flat, side: int, folder: Path) -> Any:
        flat.owner[0].model.pt_path = str(folder / "model.pt")  # the file is written beside it
        return flat.owner[0].export(format="onnx", imgsz=side, simplify=False, device="cpu")

    _torchvision()
    owner = importlib.import_module("ultralytics").RTDETR("rtdetr-l.yaml")
    return Flat(owner.model, export, owner)


def _rfdetr(side: int) -> Flat:
    def export(flat: Flat, side: int, folder: Path) -> Any:
        return flat.owner[0].export(output_dir=str(folder), verbose=False)

    _torchvision()
    owner = importlib.import_module("rfdetr").RFDETRNano(pretrain_weights=None, device="cpu")
    return Flat(owner.model.model, export, owner)


def _libreyolo(name: str, size: str) -> Callable[[int], Flat]:
    def export(flat: Flat, side: int, folder: Path) -> Any:
        return flat.owner[0].export(
            output_path=str(folder / "model.onnx"), imgsz=side, simplify=False, dynamic=False
        )

    def build(side: int) -> Flat:
        _torchvision()
        owner = getattr(importlib.import_module("libreyolo"), name)(None, size, device="cpu")
        return Flat(owner.model, export, owner)

    return build


def _lightly(side: int) -> Flat:
    def export(flat: Flat, side: int, folder: Path) -> Any:
        flat.model.export_onnx(
            folder / "model.onnx", dynamic_batch_size=False, simplify=False, verify=False
        )
        return folder / "model.onnx"

    _torchvision()
    module = importlib.import_module(
        "lightly_train._task_models.ltdetr_object_detection.task_model"
    )
    model = module.LTDETRObjectDetection(
        model_name="dinov3/vitt16-ltdetr",
        classes={index: str(index) for index in range(80)},
        image_size=(side, side),
        load_weights=False,
    )
    return Flat(model, export)


def _transformers(name: str, **options: Any) -> Callable[[int], Flat]:
    def build(side: int) -> Flat:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, f"{name}Config")(**options)
        return Flat(getattr(transformers, f"{name}ForObjectDetection")(config))

    return build


_DEFORMABLE = "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
_DINO = "dino/dino-4scale_r50_8xb2-12e_coco.py"

SYSTEMS = {
    "mmdet Deformable DETR": System("mmdet", "mmdet", "mmdet", _mmdet(_DEFORMABLE)),
    "mmdet DINO": System("mmdet", "mmdet", "mmdet", _mmdet(_DINO)),
    "mmdet Mask2Former": System(
        "mmdet", "mmdet", "mmdet", _mmdet("mask2former/mask2former_r50_8xb2-lsj-50e_coco.py")
    ),
    "onedl Deformable DETR": System("onedl", "onedl-mmdetection", "mmdet", _mmdet(_DEFORMABLE)),
    "onedl DINO": System("onedl", "onedl-mmdetection", "mmdet", _mmdet(_DINO)),
    "rf-groundingdino": System(
        "groundingdino", "rf-groundingdino", "groundingdino", _groundingdino
    ),
    "groundingdino-py": System(
        "groundingdino-py", "groundingdino-py", "groundingdino", _groundingdino
    ),
    "transformers RT-DETR": System("", "transformers", "transformers", _transformers("RTDetr")),
    "dfine-seg S": System("dfine", "dfine-seg", "dfine_seg", _dfine_seg, small=320),
    "pydfine S": System("dfine", "pydfine", "dfine", _pydfine, small=640),
    "ultralytics RT-DETR-L": System(
        "ultralytics", "ultralytics", "ultralytics", _ultralytics, small=320
    ),
    "rfdetr Nano": System("rfdetr", "rfdetr", "rfdetr", _rfdetr, side=384, small=384),
    "LightlyTrain LT-DETR": System(
        "lightly", "lightly-train", "lightly_train", _lightly, small=320
    ),
    "LibreYOLO D-FINE-S": System(
        "libreyolo", "libreyolo", "libreyolo", _libreyolo("LibreDFINE", "s"), small=640
    ),
    "LibreYOLO RT-DETRv2-R18": System(
        "libreyolo", "libreyolo", "libreyolo", _libreyolo("LibreRTDETRv2", "r18"), small=640
    ),
    "LibreYOLO Deformable DETR": System(
        "libreyolo", "libreyolo", "libreyolo", _libreyolo("LibreDeformableDETR", "r50"), small=320
    ),
    "LibreYOLO LW-DETR-T": System(
        "libreyolo", "libreyolo", "libreyolo", _libreyolo("LibreLWDETR", "t"), small=640
    ),
    "LibreYOLO GTR-S": System(
        "libreyolo", "libreyolo", "libreyolo", _libreyolo("LibreGTR", "s"), small=640
    ),
}
