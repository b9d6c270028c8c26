"""Command-line options: `--kebab-case` and `--snake_case`, flags without a value, values that start with `-`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from tpcompress.errors import did_you_mean

LITERALS = ("true", "false", "yes", "no")
HELP = ("-h", "--help")


def underscored(argument: str) -> str:
    """An option with underscores in its name: `--allow-unfinished=true` -> `--allow_unfinished=true`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def normalized(command: Callable[..., object], name: str, arguments: Sequence[str]) -> list[str]:
    """Options of a command as `--name=value`.

    Arguments before the first option are values of the command's parameters in order, as are those after `--`. A flag
    needs no value; `--no-flag` is false.

    Args:
        command: function whose parameters are the options.
        name: name of the command, for errors.
        arguments: arguments after the name.

    Raises:
        ValueError: an unknown option, an option without its value, or too many values.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    flags = {key for key, parameter in parameters.items() if parameter.annotation is bool}
    unnamed, rest = list(parameters), list(arguments)
    found: list[str] = []
    while rest:
        argument = rest.pop(0)
        if argument in HELP:
            return [*found, "--help"]
        if argument == "--":
            found += [_positional(unnamed, name, value) for value in rest]
            break
        if not argument.startswith("--"):
            found.append(_positional(unnamed, name, argument))
            continue
        option, equals, value = underscored(argument).partition("=")
        key = option[2:]
        if key.startswith("no_") and key[3:] in flags and not equals:
            key, equals, value = key[3:], "=", "false"
        if key not in parameters:
            raise ValueError(_unknown(argument.partition("=")[0], name, list(parameters)))
        if not equals and key in flags:
            value = rest.pop(0) if rest and rest[0].lower() in LITERALS else "true"
        elif not equals:
            if not rest or _is_option(rest[0], parameters):
                raise ValueError(f"Option {argument} of {name} needs a value; see tpcompress {name} --help.")
            value = rest.pop(0)
        if key in unnamed:
            unnamed.remove(key)
        found.append(f"--{key}={value}")
    return found


def _positional(unnamed: list[str], name: str, value: str) -> str:
    if not unnamed:
        raise ValueError(f"'{value}' is one value too many for {name}; see tpcompress {name} --help.")
    return f"--{unnamed.pop(0)}={value}"


def _is_option(argument: str, parameters: object) -> bool:
    """Whether an argument is one of the options, and not a value that starts with `-`."""
    key = underscored(argument).partition("=")[0]
    return argument in HELP or (key.startswith("--") and key[2:].removeprefix("no_") in parameters)  # type: ignore[operator]


def _unknown(option: str, name: str, known: list[str]) -> str:
    options = [f"--{key}" for key in known]
    hint = did_you_mean(underscored(option), options)
    return f"{name} has no option {option}; options: {', '.join(options)}.{hint}"
