"""Images of any kind become the same pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deform_attn.detr import files
from deform_attn.detr.coco import image_size
from deform_attn.detr.images import as_tensor, draw, find_images, read_image

GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.stack([GRAY, GRAY.T, 255 - GRAY], -1)


def sixteen(mode: str) -> Image.Image:
    """The gray ramp with 16 bits per pixel."""
    values = GRAY.astype(np.uint16) * 257
    return Image.fromarray(values.astype(np.int32) if mode == "I" else values)


KINDS: dict[str, tuple[Any, np.ndarray]] = {
    "gray": (Image.fromarray(GRAY), GRAY),
    "colour": (Image.fromarray(COLOUR), COLOUR),
    "16 bits": (sixteen("I;16"), GRAY),
    "16 bits stored as 32": (sixteen("I"), GRAY),
    "array": (COLOUR, COLOUR),
    "gray array": (GRAY, GRAY),
    "array of 16 bits": (GRAY.astype(np.uint16) * 257, GRAY),
    "array of floats": (COLOUR / 255, COLOUR),
    "tensor of bfloat16": (torch.from_numpy(GRAY[None] // 128).bfloat16(), GRAY // 128 * 255),
    "tensor": (torch.from_numpy(COLOUR.transpose(2, 0, 1).copy()), COLOUR),
    "gray tensor of floats": (torch.from_numpy(GRAY[None] / 255), GRAY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_kept(kind: str) -> None:
    source, expected = KINDS[kind]
    expected = np.broadcast_to(expected[..., None], (16, 16, 3)) if expected.ndim == 2 else expected
    assert np.array_equal(np.asarray(read_image(source)), expected)


def test_files_of_16_bits_are_scaled(tmp_path: Path) -> None:
    sixteen("I;16").save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], GRAY)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float image": (Image.fromarray(GRAY.astype(np.float32)), ValueError, "got floats; scale them"),
    "32 bits": (
        Image.fromarray(GRAY.astype(np.int32) * 100000),
        ValueError,
        "got integers from 0 to 25500000",
    ),
    "8 bits in 32": (
        Image.fromarray(GRAY.astype(np.int32)),
        ValueError,
        "expected 8 or 16 bits per channel, got 16 bits with values up to 255, almost black",
    ),
    "8 bits in 16": (
        GRAY.astype(np.uint16),
        ValueError,
        "expected 8 or 16 bits per channel, got 16 bits with values up to 255, almost black",
    ),
    "bright floats": (COLOUR * 1.0, ValueError, r"expected floats in \[0, 1\], got 0 to 255"),
    "four channels": (
        np.zeros((4, 4, 4), np.uint8),
        ValueError,
        r"expected an array \[H, W\] or \[H, W, 3\], got \[4, 4, 4\]",
    ),
    "integers": (
        COLOUR.astype(np.int64),
        ValueError,
        "expected bytes or floats, got array of int64",
    ),
    "no pixels": (
        np.zeros((0, 4, 3), np.uint8),
        ValueError,
        r"expected pixels, got .* \[0, 4, 3\]",
    ),
    "number": (7, TypeError, "expected files, PIL images, arrays or tensors, got int"),
    "null byte": ("a\0b", ValueError, r"'a\\x00b': expected an image, got embedded null byte"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_image_is_named(kind: str) -> None:
    source, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        read_image(source)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png': expected an image, got .*truncated"):
        read_image(file)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png': expected an image, got cannot identify"):
        read_image(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")
    (tmp_path / "link.png").symlink_to("none.png")
    with pytest.raises(FileNotFoundError, match=r"link\.png' is a link to 'none\.png', which does"):
        read_image(tmp_path / "link.png")
    Image.fromarray(GRAY).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"half\.png: .*256 pixels.* Raise PIL\.Image\.MAX"):
        read_image(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_in_a_folder_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (file,) = find_images(tmp_path)
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match=r"pipe\.jpg'.*got a pipe"):
            read(file)


@pytest.mark.parametrize(("resize", "shape"), [("stretch", (3, 20, 20)), ("fit", (3, 20, 10))])
def test_sizes(resize: str, shape: tuple[int, ...]) -> None:
    assert as_tensor(Image.new("RGB", (8, 16)), 20, resize).shape == shape


def test_names_with_accents_are_drawn() -> None:
    """A font without these letters has one sign for all of them."""
    box = {"boxes": torch.tensor([[4.0, 20, 30, 40]]), "labels": torch.tensor([0])}
    pictures = {
        draw(
            Image.new("RGB", (64, 48)), {**box, "names": [name], "scores": torch.ones(1)}
        ).tobytes()
        for name in "\u00fc\u00f6\u00f1\u0416"
    }
    assert len(pictures) == 4


def test_files_that_cannot_be_written_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.check_file("sheet", tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        OSError, match=r"sheet: expected a folder to write to, got .*: Permission denied"
    ):
        files.check_file("sheet", tmp_path / "sheet.png")


def test_no_images_to_find_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match="images: expected files, .*, got none"):
        find_images([])
