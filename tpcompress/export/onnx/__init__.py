"""ONNX: vision tower, projector and pruner of an export as one graph with fixed counts (see README.md)."""

from tpcompress.export.onnx.write import OnnxReport, export_onnx

__all__ = ["OnnxReport", "export_onnx"]
