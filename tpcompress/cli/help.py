"""Help texts, from signatures and docstrings of commands; nothing but the standard library and rich is imported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Command = Callable[..., object]

TYPES = {"int": "INT", "float": "FLOAT", "list[int]": "INTS", "dict": "YAML"}
"""What the help writes for the value of an option, by the start of its annotation; other values show the name."""

RECIPE_SETTINGS = """\
data: a file or folder of conversations: LLaVA's JSON or JSON lines, messages (OpenAI, TRL, Qwen), parquet, a folder of
  load_dataset, a saved data set, tar shards, or a hub id; `<image>` marks the places of the images
  --data ChatData --data.train rows.json --data.image_folder images/ --data.val_fraction 0.02
plan: PRUNER:KEEP@LAYER[,...] with KEEP in tokens, as a fraction (1/9) or ratio (0.11); or these fields
  --model.plan '{pruner: divprune, keep_tokens: 64, layer: 0}'
  pruner       name or {type: name, argument: value}; tpcompress pruners
  keep_tokens  tokens per image; or keep_ratio: fraction of the vision tokens
  layer        first decoder layer that sees the retained tokens; 0: before the language model
  stages       list of such mappings, if there are several
  scope        image (default) or prompt: what a budget counts
  positions    original (default) or compact: positions of the retained tokens
other settings that runs change most
  --model.base, --model.train, --model.lora, --model.optimizer.lr, --trainer.max_steps, --trainer.default_root_dir,
  --data.batch_size, --ckpt_path last (resume)
  --model.optimizer.help shows the fields of a setting; tpcompress {name} --help all shows every option."""


def show_usage(groups: Mapping[str, Mapping[str, Command]], console: Console) -> None:
    """Print all commands by their group, with the first line of their docstrings."""
    console.print(escape("usage: tpcompress COMMAND [options] [--traceback] | --version | --help"))
    for heading, commands in groups.items():
        table = Table.grid(padding=(0, 2))
        for name, command in commands.items():
            table.add_row(f"  [bold]{name}[/bold]", escape(summary(command)))
        console.print(f"\n{heading}")
        console.print(table)
    console.print("\ntpcompress COMMAND --help shows the options of a command and an example.")


def show_command(name: str, command: Command, console: Console) -> None:
    """Print usage, examples and options of a command."""
    parameters = inspect.signature(command).parameters
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    usage = " ".join(["usage: tpcompress", name, *map(str.upper, required), "[options]"])
    _lines(console, usage, "", summary(command), "", epilog(command), "")
    console.print(_options(command))
    note = "Values may also be given in this order without their names" if len(parameters) > len(required) else ""
    if note:
        _lines(console, "", f"{note}; options may be written with - or _.")


def show_recipe_command(
    name: str, command: Command, console: Console, short: Callable[..., object] | None = None
) -> None:
    """Print examples, the forms of data and the fields of a plan for `fit` or `validate`.

    Args:
        name: name of the command.
        command: its function.
        console: console to print to.
        short: function of the form without a recipe, if there is one.
    """
    usage = f"usage: tpcompress {name} --config RECIPE [--SECTION.SETTING VALUE ...]"
    _lines(console, usage)
    if short is not None:
        _lines(console, f"       tpcompress {name} MODEL DATA [options] [--SECTION.SETTING VALUE ...]")
    _lines(console, "", summary(command), "", epilog(command))
    if short is not None:
        console.print("\noptions of the form without a recipe, which it writes to the folder of the run")
        console.print(_options(short))
    _lines(console, "", RECIPE_SETTINGS.replace("{name}", name))


def summary(command: Command) -> str:
    """First line of a command's docstring."""
    return (inspect.getdoc(command) or "").partition("\n")[0]


def examples(command: Command) -> list[str]:
    """Example calls in the docstring of a command."""
    return re.findall(r"^Example:\n    (.+)$", inspect.getdoc(command) or "", flags=re.MULTILINE)


def epilog(command: Command) -> str:
    """The examples under a heading."""
    found = examples(command)
    return "\n".join([f"example{'s' if len(found) > 1 else ''}:", *(f"  {line}" for line in found)])


def arguments(command: Callable[..., object]) -> dict[str, str]:
    """Descriptions in the `Args` section of a command's docstring."""
    section = re.search(r"^Args:\n((?:    .*\n?)+)", inspect.getdoc(command) or "", flags=re.MULTILINE)
    found = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _options(command: Callable[..., object]) -> Table:
    about = arguments(command)
    table = Table.grid(padding=(0, 2))
    for key, parameter in inspect.signature(command).parameters.items():
        given = parameter.default
        option = key.upper() if given is parameter.empty else f"--{key}{_value(key, parameter)}"
        default = "" if given in (parameter.empty, None) or given is False else f" (default: {given})"
        table.add_row(f"  [bold]{escape(option)}[/bold]", escape(about.get(key, "").rstrip(".") + default))
    return table


def _value(key: str, parameter: inspect.Parameter) -> str:
    kind = str(parameter.annotation)
    if kind == "bool":
        return ""
    return " " + next((word for start, word in TYPES.items() if kind.startswith(start)), key.upper())


def _lines(console: Console, *lines: Any) -> None:
    console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)
