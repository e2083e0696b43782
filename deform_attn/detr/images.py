"""Images: read from files, arrays and tensors, resized, and padded to a batch."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from deform_attn.checks import as_path
from deform_attn.detr.files import nearby
from deform_attn.extras import needs

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
RESIZE = ("stretch", "fit", "shortest")
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17a2b8", "#b8860b")
_KINDS = "8 or 16 bits per channel"
LARGEST_SIZE = 2**14  # pixels of a side, of what models take
LONGEST = 1333 / 800  # of the longer side to the shorter one
LARGEST_RATIO = 4  # of sides that augmentation keeps, so that 3000 x 2 pixels take little memory


def read_image(source: Any) -> Image.Image:
    """An image as RGB with 8 bits, upright; files are closed.

    Args:
        source: a file; a ``PIL`` image; an array ``[H, W]`` or ``[H, W, 3]`` or a tensor ``[1 or 3,
            H, W]``, of unsigned bytes, or of floats in [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or one whose values have no known range; files are named.
        TypeError: another type.
    """
    if isinstance(source, Image.Image):
        if fault := range_fault(source):
            raise ValueError(f"images: expected {_KINDS}, got {fault}")
        return _rgb(source)
    if isinstance(source, np.ndarray | Tensor):
        return _rgb(Image.fromarray(_bytes(source)))
    if not isinstance(source, str | Path):
        raise TypeError(
            f"images: expected files, PIL images, arrays or tensors, got {type(source).__name__}"
        )
    try:
        with open_image(source) as image:
            if not (fault := range_fault(image)):
                return _rgb(image)
    except FileNotFoundError as error:
        why = nearby(Path(source))
        raise FileNotFoundError(f"images: expected a file, got {str(source)!r}: {why}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{source}: {error} Raise PIL.Image.MAX_IMAGE_PIXELS to allow it"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError(f"{str(source)!r}: expected an image, got {error}") from error
    raise ValueError(f"{str(source)!r}: expected {_KINDS}, got {fault}")


def read_fault(file: Path) -> str:
    """Why :func:`read_image` cannot read a file; else nothing."""
    try:
        read_image(file)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def open_image(file: str | Path) -> Image.Image:
    """As ``PIL.Image.open``, but a pipe, on which that waits for its writer, is an error."""
    if Path(file).is_fifo():
        raise ValueError("a pipe")
    return Image.open(file)


def find_images(names: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files by name, by a pattern such as ``photos/*.jpg``, or all images in a folder.

    Raises:
        TypeError: another type than a name or a list of names.
        FileNotFoundError: no names, or a name has no such file.
    """
    names = [names] if isinstance(names, str | Path) else names
    if not isinstance(names, Sequence) or not all(isinstance(one, str | Path) for one in names):
        raise TypeError(f"images: expected files, folders or patterns, got {names!r}")
    if not names:
        raise FileNotFoundError("images: expected files, folders or patterns, got none")
    found: list[Path] = []
    for name in names:
        path = as_path("images", name)
        if os.path.isdir(path):
            files = sorted(
                f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "."
            )
        else:
            files = (
                [path] if os.path.exists(path) else [Path(f) for f in sorted(glob.glob(str(path)))]
            )
        if not files:
            expected, got = "a file, a folder or a pattern", repr(str(name))
            if not os.path.exists(path) and glob.escape(str(name)) == str(name):
                got += f": {nearby(path)}"
            if os.path.isdir(path):
                expected = f"images ({', '.join(SUFFIXES)})"
                got = f"the folder {got} without any"
            raise FileNotFoundError(f"images: expected {expected}, got {got}")
        found += files
    return found


def draw(image: Image.Image, found: dict[str, Any]) -> Image.Image:
    """A copy of an image with the boxes, names and scores of a detection."""
    picture = image.copy()
    pen = ImageDraw.Draw(picture)
    long = max(picture.size)
    width = max(1, round(long / 300))
    font = ImageFont.truetype(_font(), max(11, round(long / 45)))
    for box, label, name, score in zip(
        found["boxes"].tolist(), found["labels"].tolist(), found["names"], found["scores"].tolist()
    ):
        colour = COLOURS[label % len(COLOURS)]
        pen.rectangle(box, outline=colour, width=width)
        text = f"{name} {score:.2f}"
        _, _, right, bottom = pen.textbbox((0, 0), text, font=font)
        x = max(0, min(box[0], picture.width - right - 2 * width))
        y = max(0, box[1] - bottom - 2 * width)
        pen.rectangle((x, y, x + right + 2 * width, y + bottom + 2 * width), fill=colour)
        pen.text((x + width, y + width), text, fill="white", font=font)
    return picture


def _font() -> str:
    """DejaVu Sans of matplotlib: Pillow's own font has Latin letters without accents only."""
    with needs("detr"):
        import matplotlib
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def range_fault(image: Image.Image) -> str:
    """Why the values of an image have no known range; else nothing.

    Values have 8 bits per channel, or 16 bits, which must be used. Images of 8 bits are not read.
    """
    if image.mode == "F":
        return "floats; scale them to 8 or 16 bits"
    if image.mode.startswith("I"):  # 16 bits, which Pillow also stores as 32
        return _integer_fault(np.asarray(image))
    return ""


def _integer_fault(values: np.ndarray) -> str:
    """As :func:`range_fault`, for values of more than 8 bits."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > 65535:
        return f"integers from {low} to {high}; scale them to 8 or 16 bits"
    if 0 < high < 256:
        return f"16 bits with values up to {high}, almost black; convert them to 8 bits"
    return ""


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, with 8 bits per channel."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """From 16 bits."""
    return (values // 257).astype(np.uint8)


def _bytes(array: np.ndarray | Tensor) -> np.ndarray:
    """Rows, columns and channels of an array, as unsigned bytes."""
    kind = "array"
    if isinstance(array, Tensor):
        kind = "tensor"
        if array.ndim == 3 and array.shape[0] in (1, 3):
            array = array.permute(1, 2, 0)
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has none
        array = np.asarray(array.detach().cpu().numpy())
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        expected = "[H, W] or [H, W, 3]" if kind == "array" else "[3, H, W] or [1, H, W]"
        raise ValueError(f"images: expected an {kind} {expected}, got {list(array.shape)}")
    if array.size == 0:
        raise ValueError(f"images: expected pixels, got an {kind} of {list(array.shape)}")
    if array.dtype == np.uint16:
        if fault := _integer_fault(array):
            raise ValueError(f"images: expected {_KINDS}, got {fault}")
        array = _eight_bits(array)
    if np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():
            low, high = array.min(), array.max()
            raise ValueError(f"images: expected floats in [0, 1], got {low:.4g} to {high:.4g}")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"images: expected bytes or floats, got {kind} of {array.dtype}")
    return np.ascontiguousarray(array)


def as_tensor(image: Image.Image, size: int, resize: str = "stretch") -> Tensor:
    """An RGB image as a tensor ``[3, h, w]`` in [0, 1].

    Args:
        image: as :func:`read_image` gives it.
        size: in pixels, of the sides that ``resize`` names.
        resize: "stretch" to a square; "fit" the longer side, and keep the ratio; or "shortest":
            the shorter side has that size, unless the longer one exceeds 1333/800 of it (DETR).
    """
    width = height = size
    if resize != "stretch":
        long, short = max(image.size), min(image.size)
        scale = size / long if resize == "fit" else min(size / short, LONGEST * size / long)
        width, height = (max(1, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def pad(images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images ``[3, h, w]`` of any sizes as one batch.

    Returns:
        ``[B, 3, H, W]``, padded with zeros on the right and below; and the bool mask ``[B, H, W]``,
        True for padding, or None where all images have one size.
    """
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images):
        return torch.stack(list(images)), None
    batch = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask
