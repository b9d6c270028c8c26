"""The commands that a compression prints at its end exist, with these options."""

from __future__ import annotations

import shlex
from pathlib import Path

from tpcompress.cli.main import parse
from tpcompress.compress.summary import next_commands


def test_next_commands_parse() -> None:
    heading, *lines = next_commands(Path("runs/my model"), Path("runs/my model/export"))
    found = {line.split()[0]: shlex.split(line)[1:] for line in lines}
    assert heading == "next:"
    assert {"serve", "evaluate", "push"} <= set(found)
    for program, command, *arguments in found.values():
        assert program == "tpcompress"
        if command != "fit":  # which the recipe parses
            parse(command, arguments)
