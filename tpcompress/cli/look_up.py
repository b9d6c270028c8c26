"""`tpcompress list`, `pruners` and `families`: what there is."""

from __future__ import annotations

from rich.console import Console

from tpcompress.cli.console import console
from tpcompress.cli.list_cache import print_kept


def show_list(kind: str = "kinds", name: str | None = None) -> int:
    """List pruners, families, losses, teachers, schedules, scorers, selectors, appliers, tasks, metrics or recipes.

    Example:
        tpcompress list pruners

    Example:
        tpcompress list losses KL

    Args:
        kind: what to list; default: the kinds with their sizes.
        name: one member, which is shown in full.
    """

    def write(to: Console) -> None:
        from tpcompress.cli.lists import print_list

        print_list(kind, name, to)

    print_kept(console, ["list", kind, name or ""], write)
    return 0


def pruners(name: str | None = None, plan: bool = False) -> int:
    """List the pruners and the components of learned ones, or show one in full: short for `list pruners`.

    Example:
        tpcompress pruners dart --plan

    Args:
        name: pruner, scorer, selector or applier, or the dotted path of a pruner outside the package.
        plan: print the pruner's plan with the settings of its paper, as YAML.

    Raises:
        ValueError: plan without a name, or a pruner without such a plan.
    """
    if not plan:
        return show_list("pruners", name)

    def write(to: Console) -> None:
        from tpcompress.cli.lists import paper_plan

        to.file.write(paper_plan(name))

    print_kept(console, ["plan", name or ""], write)
    return 0


def families(name: str | None = None) -> int:
    """List the model families, their limits and refused ones, or show one in full: short for `list families`.

    Example:
        tpcompress families llava

    Args:
        name: family, or model type.
    """
    return show_list("families", name)
