"""Build the benchmark as rows: `{"images": [image], "conversations": [[question, answer], ...], "families": [...]}`.

Nothing is downloaded. Image `index` of a split depends on (split, seed, index) alone, so splits can have any size, and
a larger split starts with the images of a smaller one.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import datasets
from PIL import Image

from tpcompress.data.benchmark.digits import SPLITS
from tpcompress.data.benchmark.render import render
from tpcompress.data.benchmark.symbolic import draw_image_spec

_FEATURES = datasets.Features(
    {
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List(
            datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
        ),
        "families": datasets.List(datasets.Value("string")),
    }
)


def make_row(split: str, seed: int, index: int) -> dict[str, Any]:
    """Generate one image with its questions.

    Args:
        split: `train`, `validation` or `test`.
        seed: seed of a series of images within the split.
        index: index in that series, unbounded.

    Returns:
        row with one PIL image of 96x96 pixels.

    Raises:
        ValueError: there is no such split.
    """
    rng = image_rng(split, seed, index)
    spec = draw_image_spec(rng)
    return {
        "images": [Image.fromarray(render(spec, rng, split))],
        "conversations": [
            [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
            for question in spec.questions
        ],
        "families": [question.family for question in spec.questions],
    }


def load_benchmark(split: str, num_images: int, seed: int = 0) -> datasets.Dataset:
    """Generate the first `num_images` rows of a split and hold them in memory.

    Raises:
        ValueError: there is no such split, or `num_images` is not positive.
    """
    _check_request(split, num_images)
    columns = _columns(_rows(split, seed, num_images))
    # Encoded here with little compression; `datasets` would encode every image several times.
    columns["images"] = [[{"bytes": _png(image), "path": None} for image in images] for images in columns["images"]]
    return datasets.Dataset.from_dict(columns, features=_FEATURES, split=datasets.NamedSplit(split))


def draw_benchmark(split: str, num_images: int, seed: int = 0) -> datasets.Dataset:
    """The same rows as `load_benchmark`, each generated on access: for training in any order.

    Raises:
        ValueError: there is no such split, or `num_images` is not positive.
    """
    _check_request(split, num_images)
    index = datasets.Dataset.from_dict({"index": list(range(num_images))}, split=datasets.NamedSplit(split))
    return index.with_transform(partial(_drawn, split, seed))


def stream_benchmark(split: str, num_images: int, seed: int = 0) -> datasets.IterableDataset:
    """The same rows as `load_benchmark`, generated sequentially and never stored: for long training runs.

    Raises:
        ValueError: there is no such split.
    """
    _check_split(split)
    arguments = {"split": split, "seed": seed, "num_images": num_images}
    return datasets.IterableDataset.from_generator(_rows, features=_FEATURES, gen_kwargs=arguments)


def image_rng(split: str, seed: int, index: int) -> Random:
    """The random generator of one image.

    The seed is a string, which `random.Random` hashes with SHA-512, so that different splits and seeds never share an
    image.
    """
    _check_split(split)
    return Random(f"{split}/{seed}/{index}")


@dataclass
class TinyVQAConfig(datasets.BuilderConfig):
    """Number of images per split, and the seed."""

    train: int = 4096
    validation: int = 512
    test: int = 1024
    seed: int = 0


class TinyVQA(datasets.GeneratorBasedBuilder):
    """The benchmark as a `datasets` builder, cached on disk: `TinyVQA(train=100).download_and_prepare()`.

    The cache key covers the configuration.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = TinyVQAConfig
    config: TinyVQAConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Procedural visual question answering for vision-token pruning.",
            features=_FEATURES,
            license="CC BY 4.0 (handwritten digits: Alpaydin and Kaynak, UCI Machine Learning Repository)",
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(split, gen_kwargs={"split": split, "num_images": getattr(self.config, split)})
            for split in SPLITS
        ]

    def _generate_examples(self, split: str, num_images: int) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate(_rows(split, self.config.seed, num_images))


def _rows(split: str, seed: int, num_images: int) -> Iterator[dict[str, Any]]:
    for index in range(num_images):
        yield make_row(split, seed, index)


def _drawn(split: str, seed: int, batch: dict[str, list]) -> dict[str, list]:
    return _columns(make_row(split, seed, index) for index in batch["index"])


def _columns(rows: Iterable[dict[str, Any]]) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    for row in rows:
        for name, column in columns.items():
            column.append(row[name])
    return columns


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _check_request(split: str, num_images: int) -> None:
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; it must be at least 1.")
    _check_split(split)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} in the benchmark; choose one of {', '.join(SPLITS)}.")
