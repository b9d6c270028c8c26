"""`tpcompress serve`: an OpenAI-compatible server for an exported folder."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from tpcompress.cli.console import console


def serve(
    folder: str,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    attention: str | None = None,
) -> int:
    """Serve an exported folder with an OpenAI-compatible API, through transformers or vLLM.

    Example:
        tpcompress serve exported --port 8000

    Args:
        folder: exported folder; requests name it as their model.
        engine: transformers, vllm, or auto: vLLM if it is installed and can run the plan.
        host: address to listen on.
        port: port to listen on.
        device: device of transformers, e.g. cpu or cuda:0.
        dtype: weight dtype: auto, float32, bfloat16 or float16.
        attention: attention implementation of transformers.
    """
    from tpcompress.export.contents import read_manifest
    from tpcompress.export.serve import choose_engine, serve_transformers, serve_vllm, unreadable_images

    path = Path(folder).expanduser()
    chosen = choose_engine(path, engine)
    manifest = read_manifest(path)
    kept = manifest["stages"][-1]["retained"]
    console.print(
        escape(
            f"Serving {path} with {chosen} at http://{host}:{port}/v1, model '{path}': {kept} of "
            f"{manifest['vision_tokens']} vision tokens per {manifest['scope']} after the last stage. Ctrl-C stops it."
        ),
        soft_wrap=True,
        highlight=False,
    )
    if chosen == "vllm":
        serve_vllm(str(path), host, port, dtype)
    problem = unreadable_images()
    if problem is not None:
        console.print(escape(f"warning: {problem}"), soft_wrap=True, highlight=False)
    serve_transformers(str(path), host, port, device, dtype, attention)
    return 0
