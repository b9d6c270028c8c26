"""`export_onnx`: writes the image side of an exported folder as one ONNX graph, and checks it with ONNX Runtime."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpcompress.errors import first_line
from tpcompress.export.contents import MANIFEST, read_manifest
from tpcompress.export.folder import ONNX, check_free, file_records, new_folder, write_json
from tpcompress.export.loader import load, load_processor
from tpcompress.export.onnx.check import Checked, check_graph
from tpcompress.export.onnx.graph import ImageGraph
from tpcompress.export.onnx.translate import OPSET, translations
from tpcompress.export.probe import SIDES, default_inputs
from tpcompress.insertion.attach import attachment_of, mode, record
from tpcompress.version import __version__

GRAPH = "vision.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxReport:
    """A written graph.

    Attributes:
        folder: it holds vision.onnx and manifest.json.
        placeholders, retained: tokens of the image before and after.
        checked: comparison with torch.
    """

    folder: Path
    placeholders: int
    retained: int
    checked: Checked

    def __str__(self) -> str:
        return (
            f"{self.folder / GRAPH}: {self.retained} of {self.placeholders} tokens per image, opset {OPSET}; equal to "
            f"torch on {self.checked.images} images (indices equal, features within {self.checked.gap:.1g})."
        )


def export_onnx(
    folder: str | Path, out: str | Path, *, image: str | Path | None = None, overwrite: bool = False
) -> OnnxReport:
    """Write vision tower, projector and pruner of an export as one graph with fixed counts.

    Args:
        folder: exported folder.
        out: folder to write: the graph and a manifest, which appear only after the check.
        image: image file whose size the graph is made for, in families with images of several sizes; default: the
            built-in image.
        overwrite: replace an earlier graph at `out`.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the folder is no export, its plan or family cannot be such a graph, or ONNX Runtime computes
            something else; with the reason.
        FileExistsError: `out` exists.
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    manifest = read_manifest(folder)
    for package in PACKAGES:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    replaced = _check_free(out, overwrite)
    model = load(folder, dtype=torch.float32)
    inputs, arguments = image_inputs(model, load_processor(folder), image)
    graph = ImageGraph(model, arguments).eval()
    check_as_attached(model, graph, inputs, arguments["pixel_values"])
    names = f"{', '.join(stage['pruner'] for stage in manifest['stages'])} on {graph.parts.family.name}"
    with new_folder(out, replaced) as made:
        checked = write_graph(graph, arguments["pixel_values"], made / GRAPH, names)
        sizes = graph.sizes
        about = {
            "format": ONNX,
            "versions": {"tpcompress": __version__, "torch": str(torch.__version__)},
            "opset": OPSET,
            "inputs": {"pixel_values": list(arguments["pixel_values"].shape)},
            "outputs": {"features": [sizes.retained, graph.parts.hidden_size], "indices": [sizes.retained]},
            "fixed": {name: value.tolist() for name, value in sizes.inputs.items()},
            "placeholders": sizes.placeholders,
            "vision_tokens": sizes.total,
            "retained": sizes.counts,
            "positions": manifest["positions"],
            "plan": manifest["plan"],
            "export_files": {n: r["sha256"] for n, r in manifest["files"].items() if n.endswith(".safetensors")},
            "checked": {"images": checked.images, "feature_gap": checked.gap, "indices_equal": checked.indices},
        }
        write_json(made / MANIFEST, about | {"files": file_records(made)})
    return OnnxReport(out, sizes.placeholders, sizes.retained, checked)


def image_inputs(model: Any, processor: Any, image: str | Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs of a prompt with one image, and those that the encoder takes.

    Args:
        model: attached model.
        processor: of the model.
        image: image file; None for the built-in image, which grows until the plan drops a token.
    """
    plan, parts = attachment_of(model).plan, attachment_of(model).parts
    names = inspect.signature(type(parts.core).get_image_features).parameters  # type: ignore[attr-defined]
    for side in SIDES:
        inputs = default_inputs(processor, side) if image is None else _inputs_of(processor, image)
        arguments = {name: value for name, value in inputs.items() if name in names and isinstance(value, Tensor)}
        arguments.pop("input_ids", None)
        if image is not None or plan.stages[0].keep_tokens is None:
            break
        if int((inputs["input_ids"] == parts.placeholder_ids["image"]).sum()) > plan.stages[0].keep_tokens:
            break
    return inputs, arguments


def check_as_attached(model: Any, graph: ImageGraph, inputs: Mapping[str, Any], pixel_values: Tensor) -> None:
    """Check that the graph retains the tokens that the attached model retains in a forward pass.

    Raises:
        ValueError: it retains others.
    """
    with torch.no_grad(), mode(model, "drop"), record(model) as trace:
        model(**inputs)
        indices = graph(pixel_values)[1]
    kept_RV, rows = trace.stages[0].retained_RV.bool(), graph.rows
    wanted = set(rows.index_RV[kept_RV & rows.valid_RV].tolist())
    if wanted != set(indices.tolist()) & set(rows.index_RV[rows.valid_RV].tolist()):
        raise ValueError(
            f"No ONNX graph: outside of a prompt, '{attachment_of(model).plan.stages[0].pruner.name}' retains other "
            f"tokens than in it."
        )


def write_graph(graph: ImageGraph, pixel_values: Tensor, path: Path, names: str) -> Checked:
    """Convert a module, write it and check what was written.

    Args:
        graph: the module.
        pixel_values: of the image at hand.
        path: file to write; weights beyond 2 GB go into a file beside it.
        names: pruner and family, for errors.

    Raises:
        ValueError: it cannot be converted, or ONNX Runtime computes something else.
    """
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                graph, (pixel_values,), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=["pixel_values"], output_names=["features", "indices"],
                custom_translation_table=translations(),
            )  # fmt: skip
        program.save(path)
        checked = check_graph(path, graph, pixel_values)
    except Exception as error:  # torch, onnxscript and ONNX Runtime raise unrelated types
        raise ValueError(f"No ONNX graph of {names}: {_root(error)}.") from error
    if not checked.ok:
        raise ValueError(f"No ONNX graph of {names}: {checked.reason()}.")
    return checked


def _inputs_of(processor: Any, path: str | Path) -> dict[str, Any]:
    from PIL import Image

    if not Path(path).is_file():
        raise ValueError(f"There is no image {path}.")
    with Image.open(path) as image:
        return default_inputs(processor, image=image.convert("RGB"))


def _check_free(out: Path, overwrite: bool) -> bool:
    """Check that `out` may be written; whether it replaces an earlier graph.

    Raises:
        FileExistsError: it exists, and is no earlier graph or may not be replaced.
    """
    check_free(out, overwrite)
    return overwrite and out.is_dir()


def _root(error: BaseException) -> str:
    """The first line of the error that caused the others, at most 160 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:160]


@contextmanager
def _quiet() -> Iterator[None]:
    """Run a block without the progress lines and advice of the exporter."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
