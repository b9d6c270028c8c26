"""A teacher's answers on disk: the most likely tokens of every answer position, keyed by the content of the sequence.

A folder contains `manifest.json` and shards `answers-<rank>-<number>.safetensors`, which are written atomically. The
metadata of a shard lists its sequences, so an interrupted writer resumes where it stopped.

A answer tokens, T tokens stored per answer token, C vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tpcompress.data import GoodRows
from tpcompress.files import atomic_path, write_atomic
from tpcompress.inference import inference
from tpcompress.models import load_base, load_processor
from tpcompress.training.passes import Pass, run_pass

VERSION = 1
MANIFEST = "manifest.json"
LEAST = -1e4
"""Replaces a log probability of -inf; representable in fp16."""


def cache_teacher(
    base: str,
    data: Any,
    folder: str,
    top: int = 64,
    per_shard: int = 1024,
    dtype: str = "bfloat16",
    attention: str | None = None,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    shown: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> int:
    """Run the unpruned base once over the training rows of a data module and store its answers.

    About 6 bytes per stored token: 400 MB per million answer tokens at `top` 64. Several processes may share the work.

    Args:
        base: folder or hub id of the model, as in recipes.
        data: a data module with a countable data set; its batch size, max_length and packing are used.
        folder: output folder; a folder with a part of the same cache is completed.
        top: tokens stored per answer position.
        per_shard: sequences per file, which is also the most that an interruption loses.
        dtype: weight dtype.
        attention: attention implementation; None for the default of transformers.
        device: device of the model.
        rank: rank of this process.
        world_size: number of processes that share the rows.
        shown: wraps the batches, to show progress.

    Returns:
        Sequences written by this call.

    Raises:
        ValueError: the folder contains another cache, or `top` is not below the vocabulary size.
    """
    model = load_base(base, dtype, attention).to(device)
    collator = data.make_collator(load_processor(base))
    rows = GoodRows(data.load_rows()[0], collator.encode, data.on_bad_row)
    part = Subset(rows, range(rank, len(rows), world_size))
    batches = DataLoader(part, data.batch_size, collate_fn=collator.pad, num_workers=data.num_workers)
    return write_answers(model, shown(batches), folder, top, per_shard, rank)


def write_answers(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], folder: str | Path, top: int = 64, per_shard: int = 1024,
    rank: int = 0,
) -> int:  # fmt: skip
    """Write the answers of a model to batches with `meta`. Sequences that are already cached are skipped.

    Args:
        model: model without a plan, on its device.
        batches: output of a collator; `meta.ids` identifies the sequences.
        folder: see `cache_teacher`.
        top: tokens stored per answer position.
        per_shard: sequences per file.
        rank: rank of this process among those that write to the folder.

    Returns:
        Sequences written.

    Raises:
        ValueError: see `cache_teacher`.
    """
    folder = Path(folder)
    _check_manifest(folder, model, top)
    known, number, written = set(read_index(folder)), _next_number(folder, rank), 0
    held: list[tuple[str, dict[str, Tensor]]] = []
    for batch in batches:
        if all(name in known for name in batch["meta"].ids):
            continue
        with inference(model):
            answers = _sequences(run_pass(model, _moved(batch, model)), batch["meta"].ids, top)
        held += [(name, kept) for name, kept in answers.items() if name not in known]
        known |= answers.keys()
        while len(held) >= per_shard:
            _write_shard(folder, rank, number, held[:per_shard])
            held, number, written = held[per_shard:], number + 1, written + per_shard
    if held:
        _write_shard(folder, rank, number, held)
    return written + len(held)


def read_index(folder: Path) -> dict[str, tuple[str, int, int]]:
    """File, first answer token and number of answer tokens of each sequence in a cache.

    Raises:
        ValueError: a file that is not a shard.
    """
    found: dict[str, tuple[str, int, int]] = {}
    for path in _shards(folder):
        try:
            with safe_open(path, "pt") as shard:
                entries = json.loads(shard.metadata()["entries"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of cached answers; delete it and write the cache again.") from error
        found |= {name: (path.name, start, count) for name, start, count in entries}
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache: version, fingerprint of the base, vocabulary size and `top`.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: it has another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"No cached answers in {folder}; write them with `tpcompress cache-teacher`.")
    manifest: dict[str, Any] = json.loads(path.read_text())
    if manifest.get("version") != VERSION:
        raise ValueError(f"The cache {folder} has version {manifest.get('version')!r}, not {VERSION}; write it again.")
    return manifest


def fingerprint(model: nn.Module) -> str | None:
    """A hash of the shapes and first values of all weights, equal in every dtype.

    None for weights that are sharded or on the meta device, which cannot be compared.
    """
    digest = blake2b(digest_size=8)
    for _, value in sorted(model.named_parameters()):
        if value.is_meta or not value.numel():
            return None
        first = value.detach().flatten()[:8].to("cpu", torch.bfloat16)
        digest.update(f"{tuple(value.shape)}".encode() + first.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _check_manifest(folder: Path, model: nn.Module, top: int) -> None:
    """Write the manifest, or check that the existing one is equal."""
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    if not 1 <= top < vocabulary:
        raise ValueError(f"top must be at least 1 and below the vocabulary of {vocabulary}, got {top}.")
    wanted = {"version": VERSION, "base": fingerprint(model), "vocabulary": vocabulary, "top": top}
    path = folder / MANIFEST
    if path.exists():
        found = read_manifest(folder)
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            raise ValueError(f"{folder} contains a cache with another {', '.join(other)}; choose another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(wanted))


def _sequences(teacher: Pass, names: list[str], top: int) -> dict[str, dict[str, Tensor]]:
    """The stored tensors of each sequence of a batch."""
    log_p_AC = teacher.logits_AC.float().log_softmax(-1)
    best_AT, index_AT = log_p_AC.topk(top)
    tail_A = log_p_AC.scatter(1, index_AT, -torch.inf).logsumexp(1)
    counts = teacher.sample_A.bincount(minlength=len(names)).tolist()
    kept = {
        "indices": index_AT.int().cpu(),
        "log_probs": best_AT.clamp(min=LEAST).half().cpu(),
        "tail": tail_A.clamp(min=LEAST).half().cpu(),
    }
    parts = {field: value.split(counts) for field, value in kept.items()}
    return {name: {field: parts[field][i] for field in kept} for i, name in enumerate(names)}


def _write_shard(folder: Path, rank: int, number: int, held: list[tuple[str, dict[str, Tensor]]]) -> None:
    entries, start = [], 0
    for name, kept in held:
        entries.append((name, start, len(kept["tail"])))
        start += len(kept["tail"])
    tensors = {field: torch.cat([kept[field] for _, kept in held]) for field in held[0][1]}
    path = folder / f"answers-{rank:03d}-{number:06d}.safetensors"
    with atomic_path(path) as part:
        save_file(tensors, part, {"entries": json.dumps(entries)})


def _next_number(folder: Path, rank: int) -> int:
    return len(_shards(folder, f"{rank:03d}"))


def _shards(folder: Path, rank: str = "*") -> list[Path]:
    """Finished shards; a killed writer may leave a partial file beside them."""
    return [path for path in sorted(folder.glob(f"answers-{rank}-*.safetensors")) if ".part." not in path.name]


def _moved(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
