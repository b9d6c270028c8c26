"""From a recipe to a cache of its teacher's answers, and a run that reads them instead of asking."""

import io

import pytest
from rich.console import Console
from training.helpers import weights

from tpcompress.training.cache_run import cache_of_recipe

KL = {"losses": ["Label", "KL"]}


def answers(folder):
    return {"class_path": "Cached", "init_args": {"folder": str(folder)}}


def test_a_run_with_the_cache_equals_one_that_asks(work):
    folder, said = work.folder / "answers", Console(file=io.StringIO())
    recipe = str(work.recipe("plain"))
    assert cache_of_recipe(recipe, folder, 399, said) == 5  # ten records, of which five are equal; 399 of 400 words
    assert cache_of_recipe(recipe, folder, 399, said) == 0, "what is there is not asked again"
    asked = work.fit("asked", model={"teacher": "Copy", **KL})
    read = work.fit("read", model={"teacher": answers(folder), **KL})
    gap = max((value - weights(read)[name]).abs().max() for name, value in weights(asked).items())
    moved = work.fit("other", model={"losses": ["Label"]})
    far = max((value - weights(moved)[name]).abs().max() for name, value in weights(asked).items())
    assert gap < 0.1 * far, "fp16 on disk, no more"


def test_data_that_the_cache_has_not_seen(work):
    folder = work.folder / "answers"
    cache_of_recipe(
        str(work.recipe("plain", data={"train": str(work.chat / "text.json")})), folder, 8, Console(quiet=True)
    )
    with pytest.raises(ValueError, match=r"^[^\n]*write[^\n]*$"):
        work.fit("unseen", model={"teacher": answers(folder), **KL})
