import datasets
import numpy as np
import pytest

from tpcompress.data import ChatCollator, load_chat
from tpcompress.data.lengths import Rates, count_characters, estimate_lengths, measure_rates

TEXTS = ["a cat", "a woman in space suit " * 6, "red " * 50, "what is this ? " * 15]


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory, photo_folder, record):
    """Rows with none to two images and texts of several lengths, in a format."""
    folder = tmp_path_factory.mktemp("lengths")
    cases = [(i % 3, TEXTS[i % 4]) for i in range(24)]

    def make(kind: str) -> datasets.Dataset:
        pictures = [[str(photo_folder / "chelsea.jpg")] * images for images, _ in cases]
        talks = [
            [{"role": "user", "content": "<image>" * images + " what ?"}, {"role": "assistant", "content": text}]
            for images, text in cases
        ]
        table = datasets.Dataset.from_dict({"images": pictures, "messages": talks})
        if kind == "pictures inside":
            table = table.cast_column("images", datasets.List(datasets.Image()))
        if kind == "several conversations":
            table = table.remove_columns("messages").add_column("conversations", [[talk] for talk in talks])
        table.save_to_disk(folder / kind)
        return load_chat(folder / kind, photo_folder, cache_dir=folder)[0]

    return make


@pytest.mark.parametrize("kind", ["paths", "pictures inside", "several conversations"])
def test_estimates_follow_the_tokens(kind, rows_of, processor_of):
    rows, collator = rows_of(kind), ChatCollator(processor_of("byte"))
    lengths = estimate_lengths(rows, collator.encoder)
    tokens = np.array([len(collator.encode(row)[0].input_ids) for row in rows])
    assert len(lengths) == len(rows) == 24
    assert np.corrcoef(lengths, tokens)[0, 1] > 0.95
    assert np.abs(lengths / tokens - 1).max() < 0.5
    chosen = rows.select([5, 2, 7])  # an index on top of the table
    assert np.argsort(estimate_lengths(chosen, collator.encoder)).tolist() == np.argsort(tokens[[5, 2, 7]]).tolist()


def test_a_stream_and_a_table_count_the_same_characters(rows_of, processor_of):
    rows, encoder = rows_of("paths"), ChatCollator(processor_of("byte")).encoder
    rates = measure_rates(rows, encoder)
    assert rates.per_image == 16
    assert 0 < rates.per_character < 1
    streamed = [rates.length(count_characters(row["conversations"]), len(row["images"])) for row in rows]
    np.testing.assert_allclose(streamed, estimate_lengths(rows, encoder))


def test_rates_leave_out_broken_rows(rows_of, processor_of, tmp_path):
    encoder = ChatCollator(processor_of("byte")).encoder
    gone = {"images": [str(tmp_path / "gone.jpg")], "conversations": [[{"role": "user", "content": "x" * 999}]]}
    rows = list(rows_of("paths"))[:6]
    assert measure_rates([gone, *rows], encoder) == measure_rates(rows, encoder)
    assert measure_rates([gone], encoder) == Rates()
