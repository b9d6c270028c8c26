"""`tpcompress onnx`: vision tower, projector and pruner of an exported folder as one ONNX graph."""

from __future__ import annotations

from rich.markup import escape

from tpcompress.cli.console import console


def onnx(folder: str, out: str, image: str | None = None, overwrite: bool = False) -> int:
    """Write the image side of an exported folder as one ONNX graph with fixed counts, checked with ONNX Runtime.

    Example:
        tpcompress onnx exported exported_onnx

    Args:
        folder: exported folder.
        out: folder to write; it appears only if ONNX Runtime computes what torch does.
        image: image whose size the graph is made for, where a family has several; default: the built-in image.
        overwrite: replace an earlier graph at `out`.
    """
    from tpcompress.export.onnx import export_onnx

    report = export_onnx(folder, out, image=image, overwrite=overwrite)
    console.print(escape(str(report)), soft_wrap=True, highlight=False)
    return 0
