"""Procedural visual-question-answering benchmark whose question families stress different aspects of token pruning."""

from tpcompress.data.benchmark.builder import (
    TinyVQA,
    TinyVQAConfig,
    draw_benchmark,
    load_benchmark,
    make_row,
    stream_benchmark,
)
from tpcompress.data.benchmark.vocabulary import FAMILIES

__all__ = ["FAMILIES", "TinyVQA", "TinyVQAConfig", "draw_benchmark", "load_benchmark", "make_row", "stream_benchmark"]
