"""Images of a row: what may stand for an image in a record, and how it is opened.

A *reference* is an image that is not opened yet: `{"path", "bytes"}` with one of them None, or a PIL image. Records
give a path, a `file:` or `data:` URL, base64 text, bytes, a dict with one of these, or a PIL image.
"""

import base64
import binascii
import re
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tpcompress.data.bad_rows import BadRow, shown

Reference = dict[str, Any] | Image.Image

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif", "jp2", "ppm", "pgm", "tga",
    "dds", "ico", "apng", "jfif", "qoi",
)  # fmt: skip
MAX_ASPECT_RATIO = 200
"""Longer side by shorter side. Processors that resize the shorter side would need gigabytes beyond."""
SOURCE_KEYS = ("bytes", "path", "url", "image_url", "video_url", "image", "video", "base64", "data", "source")
"""Keys of a dict that may hold an image or a video, in order of preference."""
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{100,}={0,2}")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112
"""Key of the orientation in EXIF data."""
BIT_DEPTHS = (8, 10, 12, 14, 16, 32)


def reference(value: Any, kind: str = "image") -> Reference | None:
    """What a record gives for an image or a video, as a reference.

    Args:
        value: entry of a record.
        kind: `image` or `video`, for messages.

    Returns:
        the reference, or None for an empty entry (None, "", nan).

    Raises:
        BadRow: the value is not an image or video, or lies on a remote host.
    """
    if value is None or isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return {"path": None, "bytes": bytes(value)} if len(value) else None
    if isinstance(value, Path):
        return {"path": str(value), "bytes": None}
    if isinstance(value, str):
        return _of_text(value.strip(), kind)
    if isinstance(value, dict):
        return _of_dict(value, kind)
    if isinstance(value, float) and value != value:
        return None
    raise BadRow(f"not {_an(kind)}: {shown(value)} ({type(value).__name__}); give a path or the bytes of a file")


def located(image: Reference, base: str) -> Any:
    """A reference with its relative path joined to a folder: `{"bytes", "path"}`, a path, or a PIL image."""
    if not isinstance(image, dict):
        return image
    return image if image["bytes"] is not None else str(Path(base, Path(image["path"]).expanduser()))


def open_image(image: Any, decode: bool = True) -> Image.Image:
    """Open one image of a row, by default decoded to upright RGB; a PIL image that is both is returned as it is.

    Transparent pixels are composited on white. Values of more than 8 bits are scaled: integers by the smallest bit
    depth (8, 10, 12, 14, 16, 32) that holds the largest value, floats in [0, 1] by 255, other values from minimum and
    maximum.

    Args:
        image: PIL image, path, or the `{"bytes", "path"}` dict of an undecoded `datasets.Image`.
        decode: decode the pixels; if False, only the header is read.

    Raises:
        BadRow: the reason is `missing image`, `corrupt image`, `too large image` or `extreme aspect ratio`, with the
            file name.
    """
    name, source = _source(image)
    try:
        opened = source if isinstance(source, Image.Image) else Image.open(source)
        _check_shape(name, opened)
        return to_rgb(_upright(opened)) if decode else opened
    except BadRow:
        raise
    except FileNotFoundError:
        raise BadRow(f"missing image: {name}") from None
    except Image.DecompressionBombError:
        raise BadRow(f"too large image: {name}; resize it, or raise PIL.Image.MAX_IMAGE_PIXELS") from None
    except UnidentifiedImageError as error:
        heic = "; Pillow reads no HEIC, convert it" if name.lower().endswith((".heic", ".heif")) else ""
        raise BadRow(f"corrupt image: {name} ({type(error).__name__}{heic})") from None
    except Exception as error:  # Pillow's decoders raise about any type for damaged files: RuntimeError, KeyError, ...
        raise BadRow(f"corrupt image: {name} ({type(error).__name__})") from None


def check_image(image: Any) -> None:
    """Read the header of one image of a row.

    Raises:
        BadRow: as `open_image`.
    """
    opened = open_image(image, decode=False)
    if opened is not image:
        opened.close()


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, see `open_image`."""
    if image.mode in DEEP_MODES:
        return Image.fromarray(_scaled(np.asarray(image))).convert("RGB")
    if image.mode in TRANSPARENT_MODES or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A decoded image as its orientation has it; the image itself if it is upright, which saves a copy."""
    image.load()
    return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)


def _scaled(values: np.ndarray) -> np.ndarray:
    """Values of any range as uint8."""
    finite = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = float(finite.min()), float(finite.max())
    if low < 0:
        finite, high = finite - low, high - low
    elif values.dtype.kind == "f":
        high = 1.0 if high <= 1 else max(high, 255.0)
    else:
        high = next(2.0**bits - 1 for bits in BIT_DEPTHS if high <= 2.0**bits - 1)
    return np.round(finite * (255 / high if high else 0)).astype(np.uint8)


def _check_shape(name: str, image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRow(f"extreme aspect ratio: {name} has {width} x {height} pixels; crop or split it")


def _source(image: Any) -> tuple[str, Any]:
    """A name for error messages, and the argument for `Image.open`."""
    if isinstance(image, Image.Image):
        return shown(getattr(image, "filename", "") or "image in memory"), image
    found = reference(image)
    if not isinstance(found, dict):
        raise BadRow(f"missing image: neither path nor bytes ({type(image).__name__})")
    if found["bytes"] is not None:
        return shown(found["path"] or "image bytes in the data set"), BytesIO(found["bytes"])
    return shown(found["path"]), found["path"]


def _of_text(text: str, kind: str) -> dict[str, Any] | None:
    if not text:
        return None
    if text[:5].lower() == "data:":
        header, comma, content = text.partition(",")
        if not comma:
            raise BadRow(f"broken data URL: {shown(text)}")
        return _of_bytes(_decoded(content) if header.endswith(";base64") else unquote_to_bytes(content), kind)
    if text[:7].lower() == "file://":
        return {"path": url2pathname(urlsplit(text).path), "bytes": None}
    if found := SCHEME.match(text):
        raise BadRow(f"remote {kind}: {found[1]} addresses are not read: {shown(text)}; download it and give its path")
    if BASE64.fullmatch(text[:200]) and (len(text) > 200 or len(text) % 4 == 0) and BASE64.fullmatch(text):
        return _of_bytes(_decoded(text), kind)
    if "\0" in text:
        raise BadRow(f"not {_an(kind)}: text with a NUL character")
    return {"path": text, "bytes": None}


def _of_dict(value: dict, kind: str) -> Reference | None:
    given = next((value[key] for key in SOURCE_KEYS if value.get(key) is not None), None)
    if isinstance(given, str) and any(value.get(key) is given for key in ("bytes", "base64", "data")):
        text = given.strip()
        return _of_text(text, kind) if text[:5].lower() == "data:" else _of_bytes(_decoded(text), kind)
    found = reference(given, kind)
    if isinstance(found, dict) and found["bytes"] is not None and isinstance(value.get("path"), str):
        return {"path": value["path"], "bytes": found["bytes"]}
    if found is None and not any(key in value for key in SOURCE_KEYS):
        raise BadRow(f"not {_an(kind)}: a dict with {shown(', '.join(map(str, value)) or 'no keys')}")
    return found


def _of_bytes(content: bytes, kind: str) -> dict[str, Any]:
    if not content:
        raise BadRow(f"corrupt {kind}: no bytes")
    return {"path": None, "bytes": content}


def _decoded(text: str) -> bytes:
    """The bytes of base64 text, in the standard or the URL alphabet."""
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRow(f"broken base64: {shown(text)}") from None


def _an(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
