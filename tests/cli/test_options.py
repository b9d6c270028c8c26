"""Options and help of the command: examples that parse, both spellings, flags, values that look like options, lists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpcompress.bundled import find_config
from tpcompress.cli.commands import COMMANDS, GROUPS, RECIPE_COMMANDS
from tpcompress.cli.fit_short import fit_model, is_short, split_options
from tpcompress.cli.help import examples
from tpcompress.cli.lists import COUNTED
from tpcompress.cli.main import main, parse, parse_for
from tpcompress.cli.options import normalized, underscored
from tpcompress.training.recipe.run import RecipeCLI
from tpcompress.version import __version__

ROOT = Path(__file__).parents[2]
EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line in examples(command)]


def test_every_command_has_an_example_of_itself() -> None:
    assert {name for name, _ in EXAMPLES} == set(COMMANDS)
    assert all(line.startswith(f"tpcompress {name}") for name, line in EXAMPLES)
    assert sum(map(len, GROUPS.values())) == len(COMMANDS)


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=lambda value: str(value)[:40])
def test_every_example_parses(name: str, line: str) -> None:
    args = shlex.split(line)[2:]
    for word in args:
        if word.startswith("recipes/"):
            assert Path(find_config(word)).is_file()
    if name not in RECIPE_COMMANDS:
        assert parse(name, args)
        return
    if is_short(args):
        own, others = split_options(fit_model, args)
        assert parse_for(fit_model, name, own)["model"] == args[0]
        assert others == []
        return
    args = [underscored(word) for word in args]
    if "--ckpt_path" in args:  # an option of the run, not of the recipe
        place = args.index("--ckpt_path")
        del args[place : place + 2]
    assert RecipeCLI(args, progress=False, run=False).model is not None


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert all(line in text for line in examples(COMMANDS[name]))


def test_the_usage_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [lines.index(heading) for heading in GROUPS]
    assert places == sorted(places)
    for (_, commands), start, end in zip(GROUPS.items(), places, [*places[1:], len(lines)], strict=True):
        listed = [line.split()[0] for line in lines[start + 1 : end] if re.match(r"  \S", line)]
        assert listed == list(commands)


EXPORT = {
    "ckpt": "run",
    "base": None,
    "plan": None,
    "allow_unfinished": False,
    "budgets": None,
    "task": None,
    "stock": None,
    "max_shard_size": "5GB",
    "onnx": None,
}


@pytest.mark.parametrize(
    ("args", "overwrite"),
    [
        (["out", "--ckpt", "run", "--overwrite"], True),
        (["--overwrite", "out", "--ckpt", "run"], True),
        (["out", "--overwrite", "--ckpt", "run"], True),
        (["out", "--overwrite", "true", "--ckpt=run"], True),
        (["out", "--overwrite", "false", "--ckpt=run"], False),
        (["out", "--overwrite=false", "--ckpt=run"], False),
        (["out", "--no-overwrite", "--ckpt=run"], False),
        (["--out=out", "--ckpt=run"], False),
        (["out", "run"], False),
    ],
)
def test_flags_need_no_value(args: list[str], overwrite: bool) -> None:
    assert parse("export", args) == {**EXPORT, "out": "out", "overwrite": overwrite}


def test_both_spellings() -> None:
    for flag in ("--allow-unfinished", "--allow_unfinished", "--allow-unfinished=true"):
        assert parse("export", ["out", "--ckpt", "run", flag])["allow_unfinished"] is True
    found = parse("find-layer", ["tiny_llava", "--num-samples", "4", "--image_folder=a-b", "--layers", "[1,2]"])
    assert (found["num_samples"], found["image_folder"], found["layers"]) == (4, "a-b", [1, 2])
    assert underscored("--model.optimizer.weight-decay=a-b") == "--model.optimizer.weight_decay=a-b"
    assert underscored("a-b") == "a-b"


def test_values_that_look_like_options() -> None:
    given = ["tiny_llava", "--image", "-odd-.png", "--prompt", "--what is left?", "--plan", "divprune:9"]
    found = parse("inspect", given)
    assert (found["image"], found["prompt"]) == ("-odd-.png", "--what is left?")
    assert parse("verify", ["--", "--folder"])["folder"] == "--folder"
    assert parse("verify", ["--folder=-run"])["folder"] == "-run"
    assert parse("verify", ["-run"])["folder"] == "-run"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["export", "out", "--ovrwrite"], "export has no option --ovrwrite; .* Did you mean --overwrite?"),
        (["export", "out", "--ckpt"], "Option --ckpt of export needs a value; see tpcompress export --help."),
        (["export", "out", "--ckpt", "--overwrite"], "Option --ckpt of export needs a value"),
        (["verify", "a", "b"], "'b' is one value too many for verify; see tpcompress verify --help."),
        (["verify"], "the following arguments are required: folder; see tpcompress verify --help."),
        (["export", "out", "--overwrite=maybe"], "Parser key \"overwrite\".* see tpcompress export --help."),
        (["--verify", "x"], "No command '--verify'. Commands: compress, fit, .* Did you mean verify?"),
        (["find_layer", "x"], "No command 'find_layer'. .* Did you mean find-layer?"),
        (["list", "loses"], "No kind 'loses' to list; known: pruners, .* Did you mean losses?"),
        (["list", "schedules", "Linaer"], "No 'Linaer' in schedules; known: .* Did you mean Linear?"),
        (["list", "pruners", "divprun"], "No pruner 'divprun'. .* Did you mean divprune?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(f"error: {message}", err)


def test_version_and_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tpcompress {__version__}"
    done = subprocess.run([sys.executable, "-m", "tpcompress", "--version"], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, f"tpcompress {__version__}")


def test_every_kind_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    counts = dict(re.findall(r"^(\w+) +(\d+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert set(counts) == set(COUNTED)
    assert all(int(count) > 1 for count in counts.values())
    for kind, names in {
        "losses": ("KL", "Label"), "teachers": ("FrozenCopy",), "schedules": ("Linear", "Sandwich"),
        "scorers": ("mlp",), "selectors": ("topk",), "appliers": ("scale",), "tasks": ("benchmark",),
        "metrics": ("exact_match",), "recipes": ("tiny_llava/compare.yaml",), "pruners": ("dart",),
        "families": ("llava",),
    }.items():  # fmt: skip
        for name in names:
            assert main(["list", kind]) == 0
            assert name in capsys.readouterr().out
            assert main(["list", kind, name]) == 0
            assert len(capsys.readouterr().out) > 60


def test_arguments_are_normalized_without_a_parser() -> None:
    def command(out: str, keep: int = 1, fast: bool = False) -> int:
        raise AssertionError("only its signature is read")

    given: dict[tuple[str, ...], list[str]] = {
        ("a", "2", "--fast"): ["--out=a", "--keep=2", "--fast=true"],
        ("--keep", "2", "a"): ["--keep=2", "--out=a"],
        ("a", "--help"): ["--out=a", "--help"],
    }
    for arguments, expected in given.items():
        found: Any = normalized(command, "command", arguments)
        assert found == expected
