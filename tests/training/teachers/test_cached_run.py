"""From a recipe to a cache of its teacher's answers, and a run that reads them instead of asking."""

import io

import pytest
from rich.console import Console

from tpcompress.cli.cache_teacher import cache_of_recipe

KL = {"losses": ["Label", "KL"]}


def answers(folder):
    return {"class_path": "Cached", "init_args": {"folder": str(folder)}}


def test_a_run_with_the_cache_equals_one_that_asks(work):
    folder, said = work.folder / "answers", Console(file=io.StringIO())
    recipe = str(work.recipe("plain"))
    assert cache_of_recipe(recipe, folder, 399, said) == 5  # ten records, of which five are equal; 399 of 400 words
    assert cache_of_recipe(recipe, folder, 399, said) == 0, "what is there is not asked again"
    asked, read, other = (
        float(work.fit(name, trainer={"max_steps": 2}, model=how | KL).trainer.callback_metrics["loss/kl"])
        for name, how in {
            "asked": {"teacher": "FrozenCopy"},
            "read": {"teacher": answers(folder)},
            "other": {"teacher": {"class_path": "LargerBudget", "init_args": {"nested": False}}},
        }.items()
    )
    assert read == pytest.approx(asked, rel=0.02), "fp16 on disk, no more"
    assert other != pytest.approx(asked, rel=0.2), "control: another teacher says something else"


def test_data_that_the_cache_has_not_seen(work):
    folder = work.folder / "answers"
    cache_of_recipe(
        str(work.recipe("plain", data={"train": str(work.chat / "text.json")})), folder, 8, Console(quiet=True)
    )
    with pytest.raises(ValueError, match=r"^[^\n]*write[^\n]*$"):
        work.fit("unseen", model={"teacher": answers(folder), **KL})
