"""Damaged, edited and swapped folders: one line, however they are loaded; and no code of a folder runs by itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from export.remote_code.child import answers
from export.remote_code.folders import CHEAP, exported, run_child
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import tpcompress as tp
from tpcompress.export import load_processor, verify, verify_in_fresh_process
from tpcompress.export.folder import file_records
from tpcompress.export.remote_code.folder import code_files

Change = Callable[[Path], None]
WEIGHTS = "tpcompress.safetensors"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values, indent=2))


def edit_plan(change: Callable[[dict[str, Any]], None], manifest: bool = True) -> Change:
    """Change the plan in config.json, and in the manifest, so that both agree."""

    def run(folder: Path) -> None:
        edit(folder, "config.json", lambda values: change(values["token_pruning"]))
        if manifest:
            edit(folder, "manifest.json", lambda values: change(values["plan"]))
            edit(folder, "manifest.json", lambda values: values.update(files=file_records(folder)))

    return run


def add(name: str, text: str = "{}") -> Change:
    def run(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return run


def rename_file(name: str) -> Change:
    """Give the record of the weights another name in the manifest."""

    def change(values: dict[str, Any]) -> None:
        values["files"][name] = values["files"].pop(WEIGHTS)

    return lambda folder: edit(folder, "manifest.json", change)


def of_another_family(folder: Path) -> None:
    edit(folder, "config.json", lambda values: values.update(model_type="tpcompress_qwen2_vl"))
    edit(folder, "manifest.json", lambda values: values["base"].update(model_type="qwen2_vl"))


def swapped(name: str) -> Change:
    """A file of another export."""
    return lambda folder: shutil.copy(exported(*CHEAP[1]).folder / name, folder / name) and None


def truncate(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(5000)


BAD: dict[str, tuple[Change, str]] = {
    "truncated weights": (truncate, r"has 5000 bytes instead of"),
    "missing weights": (lambda f: (f / WEIGHTS).unlink(), r"tpcompress.safetensors is missing; copy or export"),
    "weights of another export": (swapped(WEIGHTS), r"bytes instead of"),
    "manifest of another export": (swapped("manifest.json"), r"is missing|bytes instead of|disagree"),
    "another plan": (
        edit_plan(lambda plan: plan.update(positions="compact"), manifest=False),
        r"manifest.json and config.json disagree: they hold different plans",
    ),
    "another base": (
        lambda f: edit(f, "manifest.json", lambda values: values["base"].update(model_type="qwen2_vl")),
        r"disagree: a base of type 'qwen2_vl' against a 'tpcompress_llava' model",
    ),
    "another family": (of_another_family, r"tpcompress_qwen2_vl|holds weights of \['TPCompressLlava"),
    "newer plan": (
        edit_plan(lambda plan: plan.update(version=3)),
        r"plan has version 3, .* reads 1 and 2",
    ),
    "unknown pruner": (
        edit_plan(lambda plan: plan["stages"][1].update(pruner={"type": "divprunes"})),
        r"No pruner 'divprunes'.*Did you mean divprune",
    ),
    "pruner from outside": (
        edit_plan(lambda plan: plan["stages"][1].update(pruner={"type": "antigravity.Fly"})),
        r"'antigravity.Fly' is outside tpcompress",
    ),
    "no plan": (
        lambda f: edit(f, "config.json", lambda values: values.pop("token_pruning")),
        r"needs a plan under `token_pruning`",
    ),
    "newer manifest": (
        lambda f: edit(f, "manifest.json", lambda values: values.update(schema=99)),
        r"manifest schema 99, this tpcompress reads 1",
    ),
    "damaged manifest": (add("manifest.json", '{"format": '), r"manifest.json is damaged"),
    "a name above the folder": (rename_file("../../etc/passwd"), r"names a file outside of the folder, '../../etc"),
    "an absolute name": (rename_file("/etc/hostname"), r"names a file outside of the folder, '/etc/hostname'"),
    "a name of Windows": (rename_file("C:\\boot.ini"), r"names a file outside of the folder"),
    "a pickle": (add("pytorch_model.bin"), r"pytorch_model.bin may hold code"),
    "training arguments": (add("training_args.bin"), r"training_args.bin may hold code"),
    "an adapter": (add("adapter_config.json", '{"peft_type": "LORA"}'), r"adapter_config.json is an adapter"),
    "more code": (add("modeling_more.py", "x = 1"), r"modeling_more.py would change what is loaded"),
    "more weights": (add("model.safetensors", ""), r"model.safetensors would change what is loaded"),
    "another template": (add("chat_template.json"), r"chat_template.json would change what is loaded"),
    "another tokenizer": (add("added_tokens.json"), r"added_tokens.json would change what is loaded"),
    "more templates": (add("additional_chat_templates/a.jinja"), r"additional_chat_templates would change what is"),
}
"""What is done to a folder, and what its refusal says."""
ALIKE = {
    "a name of Windows", "training arguments", "more weights", "another tokenizer", "missing weights", "newer manifest",
    "weights of another export", "damaged manifest", "more templates",
}  # fmt: skip
"""Refused by the same lines as others: slow tests."""
IN_THE_PROCESSOR = {"another template", "another tokenizer", "more templates", "a pickle", "a name above the folder"}
BY_TRANSFORMERS = {"an adapter": r"adapter"}
"""Where transformers reads the folder before the model class does."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported(*CHEAP[0]).folder, tmp_path / "folder"))


def refusal(function: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        function()
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] if w in ALIKE else []) for w in BAD])
def test_refused_with_the_package(what: str, folder: Path) -> None:
    change, words = BAD[what]
    change(folder)
    assert re.search(words, refusal(lambda: tp.load(folder)))
    words = BY_TRANSFORMERS.get(what, words)
    assert re.search(words, refusal(lambda: AutoModelForImageTextToText.from_pretrained(folder)))
    if what in IN_THE_PROCESSOR:
        assert re.search(words, refusal(lambda: load_processor(folder)))
    assert re.search(words, said_by_verify(folder))


def said_by_verify(folder: Path) -> str:
    """The refusal of `verify`, or its report of what is wrong."""
    with suppress(ValueError):
        report = verify(folder)
        assert not report.ok
        assert "\n" not in str(report)
        return str(report)
    with pytest.raises(ValueError, match="manifest") as caught:
        verify(folder)
    return str(caught.value)


@pytest.mark.slow
def test_refused_without_the_package(tmp_path: Path) -> None:
    """All of them in one process."""
    first = exported(*CHEAP[0])
    folders = {what: Path(shutil.copytree(first.folder, tmp_path / f"f{n}")) for n, what in enumerate(BAD)}
    for what, (change, _) in BAD.items():
        change(folders[what])
    found, _, errors = run_child([(folder, first.inputs) for folder in folders.values()], tmp_path, again=False)
    assert found == [None] * len(BAD)
    for what, (_, words) in BAD.items():
        error = errors[str(folders[what])]
        assert re.search(BY_TRANSFORMERS.get(what, words), error), (what, error)
        assert "\n" not in error.strip(), (what, error)


@pytest.mark.parametrize(
    "name",
    ["NOTES.md", *(pytest.param(n, marks=pytest.mark.slow) for n in ("photo.png", ".gitattributes", "results/a.log"))],
)
def test_other_files_change_nothing(name: str, folder: Path) -> None:
    add(name)(folder)
    export = exported(*CHEAP[0])
    found = answers(tp.load(folder), load_file(export.inputs))
    assert (found["logits"] == export.expected["logits"]).all()
    report = verify(folder)
    assert report.ok == name.startswith(".")
    assert report.ok or f"{name} is not named in the manifest" in str(report)


def test_code_of_a_folder_does_not_run_by_itself(folder: Path, tmp_path: Path) -> None:
    """Poisoned files; with trust_remote_code=True too, the package's classes win where it is imported."""
    mark = tmp_path / "it_ran"
    poison = f"open({str(mark)!r}, 'w').close()\nraise SystemExit('poisoned')\n"
    files = code_files(folder)
    assert len(files) > 20
    for path in files:
        path.write_text(poison)
    edit(folder, "manifest.json", lambda values: values.update(files=file_records(folder)))
    export = exported(*CHEAP[0])
    inputs = load_file(export.inputs)
    for model in (
        tp.load(folder),
        AutoModelForImageTextToText.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True),
    ):
        assert (answers(model, inputs)["logits"] == export.expected["logits"]).all()
    for trust in (None, False, True):
        AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    report = verify(folder)
    assert not report.ok
    assert "modeling_tpcompress.py is not what this tpcompress generates" in str(report)
    assert not mark.exists()


def test_verify_names_the_version_of_other_code(folder: Path) -> None:
    for path in code_files(folder):
        path.write_text(path.read_text().replace("tpcompress 0.", "tpcompress 9.", 1))

    def older(values: dict[str, Any]) -> None:
        values["versions"]["tpcompress"] = "9.9.9"
        values["files"] = file_records(folder)

    edit(folder, "manifest.json", older)
    report = verify(folder)
    assert report.ok
    assert "Its code is of tpcompress 9.9.9" in str(report)


def test_a_manifest_that_boasts_is_found(folder: Path) -> None:
    def boast(values: dict[str, Any]) -> None:
        values["stages"][1]["retained"] = 2
        values["layer_average"] = 1.0

    edit(folder, "manifest.json", boast)
    report = verify(folder)
    assert not report.ok
    assert "manifest.json states layer_average, stages that the model does not have" in str(report)


@pytest.mark.parametrize("given", [1e9, float("inf"), -1, "much", None])
def test_a_folder_does_not_set_its_own_tolerance(given: Any, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["language_model.lm_head.weight"] = tensors["language_model.lm_head.weight"] * 1.5
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    edit(folder, "probe.json", lambda values: values.update(tolerance=given))
    edit(folder, "manifest.json", lambda values: values.update(files=file_records(folder)))
    assert "first after the last stage" in str(verify(folder))


def test_logits_of_a_probe_are_finite(folder: Path) -> None:
    tensors = load_file(folder / "probe.tensors")
    tensors["logits"].fill_(float("inf"))
    save_file(tensors, folder / "probe.tensors")
    edit(folder, "manifest.json", lambda values: values.update(files=file_records(folder)))
    assert "its logits are not finite" in str(verify(folder))


@pytest.mark.slow
def test_verify_imports_nothing_of_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "calendar.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")
    monkeypatch.chdir(folder)
    assert "calendar.py would change what is loaded" in str(verify_in_fresh_process("."))
    assert not (folder / "ran").exists()
