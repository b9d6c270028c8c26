"""Generated stand-ins for the photographs of the photo benchmark: one colour and shape per class."""

from __future__ import annotations

import colorsys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import Dinov2Config, Dinov2Model

from tpcompress.data.photos.catalogue import OBJECTS, PLACES


def cutout(number: int) -> Image.Image:
    """An ellipse or a rectangle in a colour of its own, with a transparent border."""
    image = Image.new("RGBA", (60, 48))
    draw = ImageDraw.Draw(image).ellipse if number % 2 else ImageDraw.Draw(image).rectangle
    draw((4, 4, 55, 43), fill=(*(int(255 * x) for x in colorsys.hsv_to_rgb(number / 17, 0.9, 0.8)), 255))
    return image


def background(number: int) -> Image.Image:
    """A gradient."""
    return Image.linear_gradient("L").convert("RGB").rotate(30 * number).resize((240, 260))


def write_standins(folder: Path) -> Path:
    """A folder as `scripts/build_photos.py` leaves it, with one stand-in per class, place and side."""
    for kind, names, make in (("objects", OBJECTS, cutout), ("places", PLACES, background)):
        for number, name in enumerate(names):
            to = folder / "photographs" / kind / name
            to.mkdir(parents=True)
            for shift, side in enumerate(("train", "test")):
                make(2 * number + shift).save(to / f"{side}-{name}.webp", lossless=True)
    return folder


def tiny_tower(side: int = 280) -> Dinov2Model:
    """A DINOv2 of two layers, of the width that the base expects, trained on larger pictures than scenes."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=side, patch_size=14, mlp_ratio=1
    )
    return Dinov2Model(config).eval()
