"""Serves an export through the server of transformers, in this process, or hands it over to vLLM.

`transformers serve` finds classes by the names in its own tables, so the exported classes are entered there first, as
they are in the Auto classes. The model that it loads is the attached one: the plan prunes every request.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpcompress.errors import first_line
from tpcompress.export.classes import stock_class
from tpcompress.export.contents import check_contents, read_manifest
from tpcompress.export.folder import exported_type
from tpcompress.export.registry import PREFIX, register_model

ENGINES = ("auto", "transformers", "vllm")
PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
"""What transformers' server needs besides transformers."""


def choose_engine(folder: Path, engine: str = "auto") -> str:
    """The engine that serves a folder: vLLM where it is installed and runs the plan, else transformers.

    Args:
        folder: exported folder.
        engine: one of `ENGINES`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, damaged or foreign files, an unknown engine, or a plan that vLLM cannot run.
        ModuleNotFoundError: a package is missing.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    manifest = read_manifest(folder)
    check_contents(folder)
    reason = manifest.get("runtimes", {}).get(
        "vllm", "the export does not say that vLLM runs its plan; export it again"
    )
    if engine == "vllm" and reason is not None:
        raise ValueError(f"vLLM cannot serve {folder}: {reason}. Use --engine transformers.")
    present = vllm_command() is not None
    if engine == "vllm" and not present:
        raise ModuleNotFoundError("vLLM is not installed; install it (pip install vllm), or use --engine transformers.")
    if engine == "vllm" or (engine == "auto" and present and reason is None):
        return "vllm"
    for package in PACKAGES:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    return "transformers"


def serve_transformers(
    folder: str, host: str, port: int, device: str = "auto", dtype: str = "auto", attention: str | None = None
) -> None:
    """Run transformers' server for one export until it is interrupted.

    Args:
        folder: exported folder; also the name of the model in requests.
        host: address to listen on.
        port: port to listen on.
        device: see `transformers serve`.
        dtype: dtype of the weights, or auto.
        attention: attention implementation; None for the default.

    Raises:
        ValueError: a folder whose name the server would misread.
        OSError: the port is taken.
    """
    if "@" in folder:
        raise ValueError(f"transformers serve reads what follows '@' as a revision; rename {folder}.")
    check_port(host, port)
    register_with_server(Path(folder))
    from transformers.cli.serve import Serve

    with suppress(KeyboardInterrupt):  # raised after a clean end
        Serve(
            force_model=folder, host=host, port=port, device=device, dtype=dtype, attn_implementation=attention,
            log_level="error",
        )  # fmt: skip


def unreadable_images() -> str | None:
    """Why transformers' server could not read the images of requests, in one line; None if it can.

    With torchvision installed it reads them with `torchvision.io`, whose binaries must fit the installed torch.
    """
    if find_spec("torchvision") is None:
        return None
    import torch

    try:
        images = import_module("torchvision.io")  # optional, and imported by transformers
        images.decode_image(images.encode_png(torch.zeros(3, 1, 1, dtype=torch.uint8)))
    except (ImportError, RuntimeError) as error:
        return (
            f"Requests with images will fail: torchvision does not fit torch {torch.__version__} "
            f"({first_line(error)}); install the torchvision of the same release and build."
        )
    return None


def serve_vllm(folder: str, host: str, port: int, dtype: str = "auto") -> None:
    """Replace this process by `vllm serve`, which loads our plug-in by itself."""
    command = vllm_command()
    assert command is not None
    os.execv(command, ["vllm", "serve", folder, "--host", host, "--port", str(port), "--dtype", dtype])


def vllm_command() -> str | None:
    """The `vllm` of this Python's environment, which need not be activated, or the first one on the path."""
    return shutil.which("vllm", path=str(Path(sys.executable).parent)) or shutil.which("vllm")


def register_with_server(folder: Path) -> str:
    """Enter the exported class of a folder in the tables by which transformers' server tells models apart.

    Args:
        folder: exported folder.

    Returns:
        The name of the class.
    """
    from transformers.models.auto import modeling_auto as tables

    stock = exported_type(folder).removeprefix(PREFIX)
    made: type[Any] = register_model(stock)
    for name in ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        table = getattr(tables, name)
        if table.get(stock) == stock_class(stock).__name__:
            table[PREFIX + stock] = made.__name__
    return made.__name__


def check_port(host: str, port: int) -> None:
    """Check that a port is free; uvicorn would end the process with a log of several lines.

    Raises:
        OSError: it is taken, or the address is not of this machine.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"Cannot listen on {host}:{port} ({error.strerror}); give another --port.") from error
