"""Packages outside the core that the processor of a family needs, from the tables of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

from tpcompress.errors import install_command


class Requiring(Protocol):
    """What is needed of a `Family` here."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def requires(self) -> tuple[str, ...]:
        """Packages outside the core that its processor needs."""


def takes_videos(model_types: Sequence[str]) -> bool:
    """Whether the processor of a model type has a video processor."""
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    return any(VIDEO_PROCESSOR_MAPPING_NAMES.get(name) for name in model_types)


def of_processor(model_types: Sequence[str]) -> tuple[str, ...]:
    """Packages of the image and video processors of model types: torchvision where there is no other backend."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    images = [IMAGE_PROCESSOR_MAPPING_NAMES[name] for name in model_types if IMAGE_PROCESSOR_MAPPING_NAMES.get(name)]
    needed = takes_videos(model_types) or any("pil" not in backends for backends in images)
    return ("torchvision",) if needed else ()


def missing_packages(family: Requiring) -> list[str]:
    """The packages of `family.requires` that are not installed."""
    return [name for name in family.requires if find_spec(name) is None]


def missing_line(family: Requiring) -> str | None:
    """One line that names the missing packages of a family and how to install them; None if none is missing."""
    missing = missing_packages(family)
    if not missing:
        return None
    names, command = " and ".join(missing), install_command(missing)
    return f"the processor of {family.name} needs {names}, not installed here; run: {command}"
