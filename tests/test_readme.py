"""The README: its commands and snippets run as a reader would run them, its links resolve, its figures are measured."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from PIL import Image

import tpcompress as tp
from tpcompress.cli import commands
from tpcompress.cli.fit_short import fit_model
from tpcompress.cli.main import main
from tpcompress.data.collate import PromptCollator
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.families.catalogue import markdown_table
from tpcompress.models import load_base, load_processor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "scripts/docs_site/guides/results.md").read_text()
GUIDE_OF_COMPARE = ROOT / "scripts/docs_site/guides/compare.md"
GUIDES = sorted((ROOT / "scripts/docs_site/guides").rglob("*.md"))
SHORT = ["--trainer.max_steps", "2", "--data.init_args.batch_size", "2", "--data.init_args.num_val", "0"]


def fences(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def commands_of(text: str) -> list[list[str]]:
    lines = [line for fence in fences("bash", text) for line in fence.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tpcompress ")]


COMMANDS = commands_of(README)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_the_commands_run_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert {command[0] for command in COMMANDS} == {"compress", "rank", "fit", "export", "verify", "compare"}
    for command in COMMANDS:
        if "rows.json" in command:  # run on data of a user by the tests of these commands
            function = fit_model if command[0] == "fit" else commands.COMMANDS[command[0]]
            inspect.signature(function).bind(*positional(command), **options(command))
        elif command[0] == "compare":  # the whole run is tested with the comparison
            assert Comparison.from_file(command[2]).training_aware
        elif "llava15_7b" in " ".join(command):  # two steps of it are tested with the recipes
            with pytest.raises(SystemExit) as stop:
                main([*command, "--print_config"])
            assert stop.value.code in (0, None)
        else:
            assert main([*command, *(SHORT if command[0] == "fit" else [])]) == 0, command


def positional(command: list[str]) -> list[str]:
    return command[1 : next((i for i, word in enumerate(command) if word.startswith("--")), len(command))]


def options(command: list[str]) -> dict[str, str]:
    named = command[1 + len(positional(command)) :]
    return {name[2:].replace("-", "_"): value for name, value in zip(named[::2], named[1::2], strict=True)}


def test_the_table_of_families_is_that_of_the_command() -> None:
    lines = markdown_table().splitlines()
    missing = [line for line in lines if line not in README.splitlines()]
    assert len(missing) <= 3  # a new file alone does not make the README wrong
    first = README.splitlines().index(lines[0])
    shown = README.splitlines()[first : first + len(lines) - len(missing)]
    assert [line for line in shown if line not in lines] == []


def test_the_loading_snippet_loads_the_export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (snippet,) = [code for code in fences("python") if "runs/tiny_llava" in code]
    names: dict[str, Any] = {"tp": tp}
    exec(snippet, names)
    assert tp.plan_of(names["model"]).counts(144) == [16]


def test_the_first_snippet_prunes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the bundled base, which has the class of the model that the snippet names."""
    (snippet,) = [code for code in fences("python") if "tp.attach" in code]
    asked: list[str] = []

    base = load_base("tiny_llava").eval()

    def from_pretrained(name: str, dtype: str) -> Any:
        asked.extend([name, dtype])
        return base

    inputs = inputs_of_an_image()
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    names: dict[str, Any] = {"inputs": inputs}
    exec(snippet, names)
    assert asked == ["llava-hf/llava-1.5-7b-hf", "float16"]
    assert type(names["model"]) is transformers.LlavaForConditionalGeneration
    with tp.record(names["model"]) as trace:
        names["model"](**names["inputs"])
    assert trace.stages[0].vision_out == [64]
    assert "64" in capsys.readouterr().out


def test_the_summary_is_that_of_llava() -> None:
    (printed,) = [text for text in fences("text") if "LlavaForConditionalGeneration" in text]
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig()).half()
        tp.attach(model, "divprune", keep_tokens=64)
        assert str(tp.summary(model)) == printed.rstrip()


def test_what_the_text_says_of_the_interface_holds() -> None:
    for call in ("tp.detach(model)", "tp.disabled(model)", "tp.budgets(model, keep_tokens=32)"):
        assert f"`{call}`" in README or f"`with {call}:`" in README
    inputs, model = inputs_of_an_image(), load_base("tiny_llava").eval()
    with torch.no_grad():
        before = model(**inputs).logits
        tp.attach(model, "divprune", keep_tokens=64)
        with tp.budgets(model, keep_tokens=32), tp.record(model) as trace:
            model(**inputs)
        assert trace.stages[0].vision_out == [32]
        with tp.disabled(model):
            assert torch.equal(model(**inputs).logits, before)
        tp.detach(model)
        assert torch.equal(model(**inputs).logits, before)
    (short,) = re.findall(r'`"(\w+:[^"]+)"`', README)
    stages = tp.PruningPlan.of(short).stages
    assert [(stage.layer, stage.keep_tokens, stage.keep_ratio) for stage in stages] == [(0, None, 0.25), (8, 64, None)]


def inputs_of_an_image() -> dict[str, Any]:
    row = {"images": [Image.new("RGB", (96, 96))], "families": ["x"]}
    row["conversations"] = [[{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]]
    inputs = PromptCollator(load_processor("tiny_llava"))([row])
    inputs.pop("meta")
    return inputs | {"max_new_tokens": 2}


def test_it_is_short_and_counts_what_is_there() -> None:
    assert README.count("\n") <= 185
    families, pruners = map(int, re.search(r"(\d+) model families and (\d+) pruners", README).groups())  # type: ignore[union-attr]
    assert 0 <= len(tp.list_families()) - families <= 3
    assert 0 <= len(tp.list_pruners()) - pruners <= 3  # a new file alone does not make the README wrong


def test_links_resolve_and_paths_exist() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).is_file(), target
        titles = re.findall(r"^#+ (.+)$", (ROOT / file).read_text(), flags=re.M) if file.endswith(".md") else []
        assert not anchor or anchor in {slug(title) for title in titles}, target
    for text in (README, *[guide.read_text() for guide in GUIDES]):
        for path in re.findall(r"`((?:recipes|scripts|tpcompress|tests)/[\w/.-]+\.\w+)`", text):
            assert (ROOT / path).exists() or f"Write `{path}`" in text, path


def slug(title: str) -> str:
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def test_its_five_rows_are_those_of_the_results() -> None:
    (table,) = [text for text in fences("text") if "training-free" in text]
    rows = table.splitlines()[1:]
    assert len(rows) == 5
    for row in rows:
        name = re.match(r"\w+", row)
        assert name
        (line,) = [line for line in RESULTS.splitlines() if line.startswith(f"| `{name[0]}`")]
        assert re.findall(r"\d+\.\d ±\d\.\d", row) == re.findall(r"\d+\.\d ±\d\.\d", line)


def test_every_command_of_the_guides_exists() -> None:
    named = {command[0] for guide in GUIDES for command in commands_of(guide.read_text())}
    named |= {word for guide in GUIDES for word in re.findall(r"`tpcompress ([\w-]+)", guide.read_text())}
    assert len(named) > 6
    assert named <= set(commands.COMMANDS)


def test_the_plan_file_is_a_plan() -> None:
    (text,) = fences("yaml", (ROOT / "scripts/docs_site/guides/prune.md").read_text())
    plan = tp.PruningPlan.from_dict(yaml.safe_load(text))
    assert plan.counts(576) == [144, 64]


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text = (ROOT / "scripts/docs_site/guides/troubleshooting.md").read_text()
    quoted = re.findall(r'^\| "([^"]+)"', text, flags=re.M)
    assert len(quoted) >= 7
    code = "\n".join(path.read_text() for path in sorted((ROOT / "tpcompress").rglob("*.py")))
    assert [message for message in quoted if message not in code] == []


def test_the_comparison_of_the_guide_is_read(tmp_path: Path) -> None:
    files = [text for text in fences("yaml", GUIDE_OF_COMPARE.read_text()) if "base:" in text]
    assert files
    for text in files:
        (tmp_path / "compare.yaml").write_text(text)
        assert Comparison.from_file(tmp_path / "compare.yaml").base
