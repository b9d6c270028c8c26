"""Verification finds what was broken, and names the first stage that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import make_inputs, two_stages
from safetensors import safe_open
from safetensors.torch import save_file

import tpcompress as tp
from tpcompress.export import VerifyReport, load, load_processor, verify, verify_in_fresh_process
from tpcompress.export.folder import file_records
from tpcompress.export.replay import check
from tpcompress.export.verifier import main

WEIGHTS = "tpcompress.safetensors"


def edit_plan(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the stages in config.json, and nothing else."""
    config = json.loads((folder / "config.json").read_text())
    change(config["token_pruning"]["stages"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change stored tensors."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def forget(folder: Path) -> None:
    """Let the manifest agree with the files as they are now, so that only the replay can tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = file_records(folder)
    with suppress(ValueError, FileNotFoundError):
        manifest["plan"] = json.loads((folder / "config.json").read_text()).get("token_pruning")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def one_line(report: VerifyReport) -> str:
    """The report's line, which must be one."""
    assert not report.ok
    assert "\n" not in str(report)
    return str(report)


def test_good_folder(exported: Path) -> None:
    report = verify(exported)
    assert report.ok
    assert report.replay is not None
    assert report.replay.logit_gap <= 1e-6  # the alignment of loaded weights decides the last bit
    assert [(stage.retained, stage.agree) for stage in report.replay.stages] == [(32, 32), (8, 8)]
    assert "same vision tokens (32 of 64, then 8 of 64 in the probe)" in str(report)


def test_fresh_process(folder: Path) -> None:
    edit_plan(folder, lambda stages: stages[1].update(keep_tokens=7))
    assert "manifest.json and config.json disagree: they hold different plans" in one_line(verify(folder))
    forget(folder)
    report = verify_in_fresh_process(folder)
    assert "first at stage 1 (layer 3): 7 vision tokens retained instead of 8" in one_line(report)
    assert report == verify(folder)


def test_exit_codes(exported: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").unlink()
    assert [main([str(exported)]), main([str(folder)]), main(["nowhere"]), main([])] == [0, 1, 1, 2]
    out, err = capsys.readouterr()
    assert [line.rpartition(";")[2] for line in out.splitlines()][1:] == [
        " copy or export the folder again.",
        " give one that tpcompress.export wrote.",
    ]
    assert err.startswith("usage: python -m tpcompress.export FOLDER")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s[0].update(keep_tokens=30), "first at stage 0 (layer 0): 30 vision tokens retained instead of 32"),
        (lambda s: s[1].update(keep_tokens=7), "first at stage 1 (layer 3): 7 vision tokens retained instead of 8"),
        (lambda s: s[1].update(layer=4), "first at stage 1 (layer 4): recorded at layer 3"),
        (lambda s: s[1].update(pruner={"type": "random", "seed": 0}), r"first at stage 1 (layer 3): "),
        (lambda s: s.pop(1), "first at stage 1 (layer 3): it is missing"),
        (lambda s: s.append({"pruner": {"type": "uniform"}, "layer": 5, "keep_tokens": 4}), "had no such stage"),
    ],
    ids=["tokens0", "tokens1", "layer", "pruner", "missing", "more"],
)
def test_changed_plan(change: Callable[[list[dict[str, Any]]], None], words: str, folder: Path) -> None:
    edit_plan(folder, change)
    forget(folder)
    assert words in one_line(verify(folder))


def test_positions_policy(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["token_pruning"]["positions"] = "compact"
    (folder / "config.json").write_text(json.dumps(config))
    forget(folder)
    assert "first at stage 1" in one_line(verify(folder)) or "after the last stage" in str(verify(folder))


def test_changed_scorer(folder: Path) -> None:
    def perturb(tensors: dict[str, torch.Tensor]) -> None:
        tensors["token_pruners.0.scorer.start.weight"].neg_()

    edit_weights(folder, perturb)
    line = one_line(verify(folder))
    assert "first at stage 0 (layer 0): " in line
    assert "of 32 retained positions agree; max logit gap" in line
    assert f"Likely: changed files ({WEIGHTS})." in line
    forget(folder)
    assert "first at stage 0 (layer 0): " in one_line(verify(folder))


def test_changed_head_shows_after_the_stages(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors["language_model.lm_head.weight"].mul_(1.5))
    forget(folder)
    assert "first after the last stage: all retained positions agree; max logit gap" in one_line(verify(folder))


def test_harmless_change_is_still_named(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(path.read_text().replace("{", "{ ", 1)[:-1])
    line = one_line(verify(folder))
    assert "behaves as the exported model on its probe, but files were changed: " in line
    assert "generation_config.json has another sha256." in line


def test_dtype_is_suspected(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"Likely: dtype \(recorded float32, loaded bfloat16\)\.$"):
        load(folder, verify=True, dtype=torch.bfloat16)
    assert load(folder, verify=True) is not None


def test_attention_is_suspected(exported: Path) -> None:
    report = check(load(exported, attn_implementation="eager"), exported)
    assert report.ok
    assert report.suspects == ("attention implementation (recorded sdpa, loaded eager)",)


# ---------------------------------------------------------------------------------------------------- damaged folders


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "probe.json", "probe.tensors", "tokenizer.json"])
def test_missing_file(name: str, folder: Path) -> None:
    (folder / name).unlink()
    line = one_line(verify(folder))
    assert line == f"{folder / name} is missing; copy or export the folder again."
    if name in ("config.json", WEIGHTS):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name} is missing; copy or export"):
            load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, "probe.tensors"])
def test_truncated_tensors(name: str, folder: Path) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(5000)
    assert f"{name} has 5000 bytes instead of" in one_line(verify(folder))
    forget(folder)
    assert "cannot be replayed: " in one_line(verify(folder))
    assert "damaged" in str(verify(folder))


def test_truncated_weights_do_not_load(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="has 5000 bytes instead of"):
        load(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="are damaged .*; copy or export them again") as caught:
        load(folder)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "probe.json"])
def test_damaged_json(name: str, folder: Path) -> None:
    (folder / name).write_text('{"model_type": ')
    if name == "manifest.json":
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            verify(folder)
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            verify_in_fresh_process(folder)
    else:
        assert f"{name} is damaged (" in one_line(verify(folder))
        forget(folder)
        assert f"{name} is damaged (" in one_line(verify(folder))
    if name != "probe.json":
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("token_pruners.0.scorer.score.bias"), "1 missing, token_pruners.0.scorer.score.bias"),
        (lambda t: t.update(odd=torch.zeros(1)), "1 unexpected, odd first"),
        (
            lambda t: t.update({"token_pruners.0.scorer.score.bias": torch.zeros(2)}),
            "1 of another shape, token_pruners.0.scorer.score.bias first",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_of_another_model(change: Callable[[dict[str, torch.Tensor]], None], words: str, folder: Path) -> None:
    edit_weights(folder, change)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"do not fit its config.json .*{words}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_unreadable_plan(folder: Path) -> None:
    edit_plan(folder, lambda stages: stages[0].update(pruner={"type": "learned_gates"}))
    forget(folder)
    with pytest.raises(ValueError, match="Did you mean learned_gate"):
        load(folder)
    assert "cannot be replayed: No pruner 'learned_gates'" in one_line(verify(folder))


def test_no_plan(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["token_pruning"]
    (folder / "config.json").write_text(json.dumps(config))
    forget(folder)
    with pytest.raises(ValueError, match="needs a plan under `token_pruning`"):
        load(folder)


def test_newer_schema(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text()) | {"schema": 99}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest schema 99, this tpcompress reads 1; update tpcompress"):
        verify(folder)


def test_not_an_export(tmp_path: Path, base: Any) -> None:
    for function in (load, verify, verify_in_fresh_process):
        with pytest.raises(FileNotFoundError, match="^No folder "):
            function(tmp_path / "nowhere")
    base.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="holds a 'llava' model, not an export"):
        load(tmp_path / "stock")
    with pytest.raises(ValueError, match="has no manifest.json"):
        verify(tmp_path / "stock")
    with pytest.raises(ValueError, match="^No processor in "):
        load_processor(tmp_path / "stock")


# -------------------------------------------------------------------------------------------------------- the probe


def test_own_probe(base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, two_stages())
    out = tp.export(model, processor, tmp_path / "out", probe_inputs=make_inputs(3) | {"labels": torch.zeros(3, 76)})
    report = verify(out)
    assert report.ok
    assert report.replay is not None
    assert report.replay.stages[0].trained == 3 * 32


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "have no image"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32)}, "input_ids are missing"),
        ({"input_ids": [[1, 2]]}, "'input_ids' is a list"),
    ],
)
def test_unusable_probe(probe: dict[str, Any], words: str, base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, two_stages())
    with pytest.raises(ValueError, match=words):
        tp.export(model, processor, tmp_path / "out", probe_inputs=probe)
    assert list(tmp_path.iterdir()) == []


def test_chat_template(base: Any, tmp_path: Path) -> None:
    from export.helpers import make_processor

    processor = make_processor()
    processor.chat_template = (
        "{% for m in messages %}USER: {% for c in m['content'] %}"
        "{{ ' <image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %} ASSISTANT:"
    )
    out = tp.export(tp.attach(base, two_stages()), processor, tmp_path / "out")
    assert verify(out).ok
    assert tp.load_processor(out).chat_template == processor.chat_template


@pytest.mark.parametrize(("facts", "model"), [(None, "the exported model"), ({"steps": 3}, "the trained model")])
def test_only_a_trained_model_is_called_so(exported: Path, folder: Path, facts: Any, model: str) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    values["trained_with"] = facts or {}
    (folder / "manifest.json").write_text(json.dumps(values))
    report = verify(folder)
    assert report.ok
    assert f"behaves as {model}: its stages retain the same vision tokens" in str(report)
    assert ("the trained model" in str(report)) == (facts is not None)


def test_an_export_that_prunes_nothing_is_refused(base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, "divprune:1.0")
    with pytest.raises(ValueError, match="The plan prunes nothing: it retains all 64 vision tokens of the probe"):
        tp.export(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_says_that_a_plan_prunes_nothing(exported: Path) -> None:
    """Folders of earlier versions may hold such plans."""
    report = verify(exported)
    replay = report.replay
    assert replay is not None
    stages = tuple(replace(s, retained=s.total, trained=s.total, agree=s.total) for s in replay.stages)
    report = replace(report, replay=replace(replay, stages=stages))
    assert "prunes nothing: its stages retain all 64 vision tokens of the probe" in one_line(report)
