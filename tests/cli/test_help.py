"""Help of a command: positional values, options with their meaning, and one screen for `fit`."""

from __future__ import annotations

import inspect
import re

import pytest

from tpcompress.cli.commands import COMMANDS, RECIPE_COMMANDS
from tpcompress.cli.fit_short import fit_model
from tpcompress.cli.help import arguments
from tpcompress.cli.main import main

OTHERS = [name for name in COMMANDS if name not in RECIPE_COMMANDS]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The help of a command on a terminal of 120 columns."""
    monkeypatch.setattr("tpcompress.cli.main.console._width", 120)

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*args])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_is_explained(name: str, shown) -> None:
    parameters = inspect.signature(COMMANDS[name]).parameters
    assert set(arguments(COMMANDS[name])) == set(parameters)
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    text = shown(name, "--help")
    assert text.splitlines()[0] == " ".join(["usage: tpcompress", name, *map(str.upper, required), "[options]"])
    for key in parameters:
        assert re.search(rf"^  {key.upper() if key in required else f'--{key}'}\b", text, flags=re.MULTILINE), key


def test_help_of_fit_fits_on_a_screen(shown) -> None:
    text = shown("fit", "--help")
    assert len(text.splitlines()) <= 50
    assert all(len(line) <= 125 for line in text.splitlines())
    for word in ("MODEL DATA", "--config RECIPE", "--data.train", "keep_tokens", "scope", "positions", "--help all"):
        assert word in text, word
    assert all(f"--{key}" in text for key, value in inspect.signature(fit_model).parameters.items() if value.default)
    assert "--trainer.accelerator" not in text


def test_all_options_are_shown_on_request(shown) -> None:
    text = shown("fit", "--help", "all")
    assert "--trainer.accelerator" in text
    assert "--model.optimizer" in text


def test_options_have_values_and_defaults(shown) -> None:
    text = shown("find-layer", "--help")
    assert re.search(r"--num_samples INT +images, with one question each \(default: 32\)", text)
    assert re.search(r"--threshold FLOAT +KL in nats .* \(default: 0.01\)", text)
    assert "--overwrite  " in shown("export", "--help")
