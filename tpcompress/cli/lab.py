"""Commands of controlled experiments: study, estimators, cache-teacher."""

from __future__ import annotations

from tpcompress.cli.console import console


def study(config: str, out: str | None = None, tables: bool = False, into: str | None = None) -> int:
    """Compare pruners, budgets, training recipes and seeds in resumable cells, which several processes can share.

    Example:
        tpcompress study recipes/studies/training_aware.yaml --tables

    Args:
        config: study file.
        out: output folder; default: that of the file.
        tables: only make the tables of finished cells.
        into: document whose tables, between two markers, are replaced.
    """
    from tpcompress.lab.study.run import run_study

    run_study(config, out, console, tables, into)
    return 0


def estimators(config: str, out: str | None = None, marks: str | None = None) -> int:
    """Test which gradient estimators train a scorer, on a task of 24 tokens and on a frozen base.

    Example:
        tpcompress estimators recipes/tiny_llava/estimators.yaml

    Args:
        config: file of estimators.
        out: output folder; default: that of the file.
        marks: file that receives the result of each estimator, for the warning of `fit`.
    """
    from tpcompress.lab.estimators.run import run_estimators

    run_estimators(config, out, marks, console)
    return 0


def cache_teacher(config: str, out: str, top: int = 64) -> int:
    """Store the unpruned base's answers to a recipe's training data, for the teacher Cached; resumes if interrupted.

    Example:
        tpcompress cache-teacher recipes/tiny_llava/pool_full.yaml --out runs/teacher

    Args:
        config: recipe.
        out: folder of the cache.
        top: most likely tokens kept per answer position.
    """
    from tpcompress.cli.cache_teacher import cache_of_recipe

    written = cache_of_recipe(config, out, top, console)
    console.print(
        f"{written} sequences written to {out}. Next: model.teacher: Cached with folder: {out}.", soft_wrap=True
    )
    return 0
