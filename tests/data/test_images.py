"""Every kind of image file and of reference becomes an upright RGB image or a bad row."""

from __future__ import annotations

import base64
import io
import warnings
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.images import located, open_image, reference

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def encoded(image: Image.Image, kind: str, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": f"x.{kind}"}


DEEP = {
    "12 bits in 16": (np.uint16, 4095, "png"),
    "14 bits in 16": (np.uint16, 16383, "tiff"),
    "16 bits": (np.uint16, 65535, "png"),
    "8 bits in 16": (np.uint16, 255, "png"),
    "32 bits": (np.int32, 2**31 - 1, "tiff"),
    "float to 1": (np.float32, 1, "tiff"),
    "float to 255": (np.float32, 255, "tiff"),
    "float to 7000": (np.float32, 7000, "tiff"),
}


@pytest.mark.parametrize("name", DEEP)
def test_values_of_more_than_eight_bits_are_scaled(name):
    kind, high, suffix = DEEP[name]
    pixels = np.asarray(open_image(encoded(Image.fromarray((RAMP * high).astype(kind)), suffix)))
    scale = 255 / 2**32 * 2**31 if kind is np.int32 else 255
    np.testing.assert_allclose(pixels[..., 0], RAMP * scale, atol=1.01)
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_negative_values_are_scaled_from_their_minimum(kind):
    values = (RAMP * 4000 - 1000).astype(kind)  # as computed tomography has them
    if kind is np.float32:
        values[0, 1] = np.nan
    pixels = np.asarray(open_image(encoded(Image.fromarray(values), "tiff")))[..., 0]
    assert (pixels[0, 0], pixels[0, 2] < 12, pixels[-1, -1] > 100) == (0, True, True)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "gif"), ("P", "png")]
)
def test_transparent_pixels_are_white(mode, kind):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((4, 4, 11, 11), fill=(0, 0, 0, 255))
    image = image.convert(mode)
    options = {"lossless": True} if kind == "webp" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(open_image(encoded(image, kind, **options)))
    assert (pixels[0, 0] == 255).all()
    assert (pixels[7, 7] == 0).all()


def test_a_transparent_colour_of_rgb_and_of_a_palette_in_bytes_is_white():
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (0, 0, 0))
    assert open_image(encoded(image, "png", transparency=(1, 2, 3))).getpixel((1, 1)) == (255, 255, 255)
    palette = image.quantize(2)
    index = palette.getpixel((1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_image(encoded(palette, "png", transparency=bytes(0 if i == index else 255 for i in range(2))))
    assert (found.getpixel((1, 1)), found.getpixel((0, 0))) == ((255, 255, 255), (0, 0, 0))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "avif", "dds", "ico", "ppm", "tga"])
def test_damaged_files_are_bad_rows(kind):
    noise = np.random.default_rng(0)
    image = Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    whole = bytearray(encoded(image, kind)["bytes"])
    for _ in range(60):
        torn = bytearray(whole)
        for at in noise.integers(0, len(torn), 8):
            torn[at] = noise.integers(256)
        with suppress(BadRow):  # any other exception would end a run
            open_image({"bytes": bytes(torn[: noise.integers(1, len(torn))]), "path": f"torn.{kind}"})


def test_extreme_shapes_are_refused_before_they_are_decoded(monkeypatch, tmp_path):
    Image.new("1", (60_000, 1)).save(tmp_path / "line.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for decode in (True, False):
        with pytest.raises(BadRow, match=r"^extreme aspect ratio: .*line.png has 60000 x 1 pixels"):
            open_image(tmp_path / "line.png", decode)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadRow, match=r"^too large image: .*line.png; resize it"):
        open_image(tmp_path / "line.png")


PIXELS = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)), "png")["bytes"]
TEXT = base64.b64encode(PIXELS).decode()
SAME = {
    "bytes": PIXELS,
    "bytearray": bytearray(PIXELS),
    "dict of bytes": {"bytes": PIXELS},
    "dict of bytes and no path": {"bytes": PIXELS, "path": None},
    "data URL": f"data:image/png;base64,{TEXT}",
    "base64": TEXT,
    "base64 of the URL alphabet": base64.urlsafe_b64encode(PIXELS).decode().rstrip("="),
    "dict of base64": {"base64": TEXT},
    "source": {"source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
    "url of a dict": {"url": f"data:image/png;base64,{TEXT}"},
    "url in a dict": {"image_url": {"url": f"data:image/png;base64,{TEXT}"}},
    "path": "x y.png",
    "dict of a path": {"path": "x y.png", "bytes": None},
    "image of a dict": {"image": "x y.png"},
    "open image": Image.open(io.BytesIO(PIXELS)),
}


@pytest.mark.parametrize("name", SAME)
def test_every_reference_opens(name, tmp_path):
    (tmp_path / "x y.png").write_bytes(PIXELS)
    found = reference(SAME[name])
    assert found is not None
    assert open_image(located(found, str(tmp_path))).size == (7, 9)


def test_a_file_address_opens(tmp_path):
    (tmp_path / "x y.png").write_bytes(PIXELS)
    found = reference((tmp_path / "x y.png").as_uri())
    assert open_image(located(found, "/elsewhere")).size == (7, 9)


@pytest.mark.parametrize("empty", [None, "", " ", b"", float("nan"), {"bytes": None, "path": None}, {"path": ""}])
def test_empty_entries_are_no_image(empty):
    assert reference(empty) is None


WRONG = {
    "remote image: https addresses are not read": "https://example.com/b0.png",
    "remote image: s3 addresses": {"url": "s3://bucket/b0.png"},
    "not an image: 7 .int": 7,
    "not an image: True .bool": True,
    "not an image: a dict with width, height": {"width": 3, "height": 4},
    "broken base64": {"base64": "???"},
    "broken data URL": "data:image/png",
    "corrupt image: no bytes": "data:image/png;base64,",
    "not an image: .* .list": ["a.png"],
    "not an image: text with a NUL": "a\0.png",
}


@pytest.mark.parametrize("reason", WRONG)
def test_anything_else_is_a_bad_row(reason):
    with pytest.raises(BadRow, match=f"^{reason}"):
        reference(WRONG[reason])


@pytest.mark.parametrize(
    "image", ["x" * 100_000 + ".png", "A" * 99_999, "https://a.b/" + "x" * 10_000, {"x" * 5000: 1}]
)
def test_messages_are_short(image):
    with pytest.raises(BadRow) as caught:
        open_image(image)
    assert len(str(caught.value)) <= 200
