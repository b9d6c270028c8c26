"""The README's commands and snippets, run in order as a reader would, with runs of a few steps."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import tpcompress as tp
from tpcompress.cli import commands
from tpcompress.cli.main import main
from tpcompress.data.collate import PromptCollator
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.pruners import list_pruners
from tpcompress.pruners.gate_components import KINDS, list_parts
from tpcompress.training import schedules
from tpcompress.training.losses import list_losses
from tpcompress.training.module import load_base, load_processor
from tpcompress.training.teachers import list_teachers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = ["--trainer.max_steps", "2", "--data.init_args.batch_size", "2", "--data.init_args.num_val", "0"]


def fences(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for fence in fences("bash")
    for line in fence.splitlines()
    if line.startswith("tpcompress ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("reader")


def test_the_commands_run_in_order(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    assert {command[0] for command in COMMANDS} == {"fit", "export", "verify", "compare"}
    for command in COMMANDS:
        if command[0] == "compare":  # the whole run is tests/evaluation/compare/test_compare.py
            assert Comparison.from_file(command[2]).training_aware
            continue
        if "llava15_7b" in " ".join(command):  # two steps of it are tests/training/recipe/test_recipes.py
            with pytest.raises(SystemExit) as stop:
                main([*command, "--print_config"])
            assert stop.value.code in (0, None)
            continue
        assert main([*command, *(SHORT if command[0] == "fit" else [])]) == 0, command


def test_the_loading_snippet_answers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (snippet,) = [code for code in fences("python") if "tp.load(" in code]
    names = {"tp": tp}
    exec(snippet, names)
    assert tp.plan_of(names["model"]).counts(144) == [9]


def test_the_three_lines():
    (snippet,) = [code for code in fences("python") if "tp.detach" in code]
    model, processor = load_base("tiny_llava").eval(), load_processor("tiny_llava")
    row = {"images": [Image.new("RGB", (96, 96))], "families": ["x"]}
    row["conversations"] = [[{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red"}]]
    inputs = PromptCollator(processor)([row])
    inputs.pop("meta")
    before = model(**inputs).logits
    seen = []
    snippet = snippet.replace("model.generate(**inputs)", "seen.append(look(model, inputs))")

    def look(model, inputs):
        with tp.record(model) as trace:
            model.generate(**inputs, max_new_tokens=2)
        return trace.stages[0].vision_out

    exec(snippet, {"tp": tp, "model": model, "inputs": inputs, "seen": seen, "look": look})
    assert seen == [[64]]
    assert torch.equal(model(**inputs).logits, before)


def test_the_plan_file_is_a_plan():
    (text,) = [code for code in fences("yaml") if "plan.yaml" in code]
    plan = tp.PruningPlan.from_dict(yaml.safe_load(text))
    assert plan.counts(576) == [144, 64]


def test_the_example_pruner_keeps_exact_counts():
    (code,) = [code for code in fences("python") if "class Norm" in code]
    names: dict = {}
    exec(code, names)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    view = tp.TokenView.of(torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)))
    keep = names["Norm"]()(view, torch.tensor([5, 1])).keep_BV
    assert keep.sum(1).tolist() == [5, 1]


def test_what_it_names_exists():
    listed = README.partition("| rules | pruners |")[2].partition("\n\n")[0]
    named = {word for cell in re.findall(r"\|([^|]*)\|$", listed, flags=re.M) for word in re.findall(r"`(\w+)`", cell)}
    assert named == set(list_pruners())
    for path in re.findall(r"`((?:recipes|scripts|tpcompress)/[\w/.{},]+)`", README):
        for one in _braces(path):
            assert one.endswith("mine.py") or (ROOT / one).exists(), one
    tree = README.partition("## Files")[2].partition("```\n")[2].partition("```")[0]
    files = {path.name for folder in ("tpcompress", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\b(\w+\.py)\b", tree)) <= files
    assert "quickstart" in commands.COMMANDS


def _braces(path: str) -> list[str]:
    match = re.search(r"\{(.*?)\}", path)
    return [path] if not match else [path.replace(match.group(0), one, 1) for one in match.group(1).split(",")]


def test_the_notes_on_training_list_every_part():
    text = (ROOT / "tpcompress/training/README.md").read_text()
    rows = dict(re.findall(r"\| (\w+) \(`[\w/]+`\) \| (.*?) \|\n", text))
    listed = {kind: set(re.findall(r"`(\w+)`", row)) for kind, row in rows.items()}
    for kind in KINDS:
        assert listed[f"{kind}s"] == set(list_parts(kind)), kind
    assert listed["losses"] == {cls.__name__ for cls in list_losses().values()}
    assert listed["teachers"] == set(list_teachers())
    assert listed["schedules"] == {name for name in schedules.__all__ if name[0].isupper()} - {"Schedule"}
