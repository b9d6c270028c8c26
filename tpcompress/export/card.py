"""Model card of an export (README.md), rendered from the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from tpcompress.export.license import KEYS
from tpcompress.export.runtimes import report
from tpcompress.insertion.budget import amount_text

CARD = "README.md"
HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [tpcompress, token-pruning]
"""

WITHOUT = """Without tpcompress, transformers runs the Python files of this folder, which tpcompress generated:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```"""


def card(manifest: dict[str, Any], name: str) -> str:
    """Render the model card.

    Args:
        manifest: manifest of the export.
        name: name of the folder.
    """
    base = manifest["base"]["model"]
    known = {"base_model": base} if base and "/" in base else {}
    known |= {key: manifest["base"][key] for key in KEYS if key in manifest["base"]}
    head = HEAD + "".join(yaml.safe_dump({key: value}) for key, value in known.items()) + "---\n"
    parts = [_title(manifest, name), _usage(manifest, name), _plan(manifest), _curve(manifest), _training(manifest)]
    parts += [_findings(manifest.get("trained_with", {}).get("diagnostics")), _caveats(manifest)]
    return head + "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _title(manifest: dict[str, Any], name: str) -> str:
    pruners = ", then ".join(stage["pruner"] for stage in manifest["stages"])
    left = manifest["stages"][-1]["retained"]
    return (
        f"# {name}\n\n{manifest['base']['model'] or manifest['base']['class']} with {left} of "
        f"{manifest['vision_tokens']} vision tokens per {manifest['scope']} after its last stage ({pruners}), "
        f"{manifest['layer_average']:.4g} on average per decoder layer. It loads only with its pruner."
    )


def _usage(manifest: dict[str, Any], name: str) -> str:
    trained = manifest["trained_budgets"]
    lines = ["import tpcompress as tp", "", f'model, processor = tp.load("{name}"), tp.load_processor("{name}")']
    if trained and any(each["low"] != each["high"] for each in trained):
        asked = {key: [each["low"][key] for each in trained] for key in trained[0]["low"] if _all_have(trained, key)}
        for key, values in asked.items():
            shown = values[0] if len(values) == 1 else values
            lines.append(f'model = tp.load("{name}", {key}={shown})  # any budget in its range')
    code = "\n".join(["```python", *lines, "```"])
    return code if not manifest.get("code", {}).get("files") else f"{code}\n\n{WITHOUT.format(name=name)}"


def _plan(manifest: dict[str, Any]) -> str:
    trained = manifest["trained_budgets"]
    header = ["stage", "layer", "pruner", "budget", "retained", *(["trained at"] if trained else [])]
    rows = []
    for stage in manifest["stages"]:
        row = [stage["stage"], stage["layer"], stage["pruner"], _budget(stage["budget"])]
        row.append(f"{stage['retained']} of {manifest['vision_tokens']}")
        if trained:
            low, high = trained[stage["stage"]]["retained"]
            row.append(f"{low} to {high}" if low != high else str(low))
        rows.append(row)
    scope, total = manifest["scope"], manifest["vision_tokens"]
    fixed = manifest["tokens_per_image"] is not None and scope == "image"
    note = f"Budgets hold per {scope}."
    if not fixed:
        note += f" Counts are those of the probe, whose {scope} has {total} vision tokens; others have more or fewer."
    return f"## Plan\n\n{_table(header, rows)}\n\n{note}"


def _curve(manifest: dict[str, Any]) -> str:
    points = manifest.get("budget_curve")
    if not points:
        return ""
    header = ["budget", "retained", "accuracy", "correct answer tokens", "label loss", "questions", "seed"]
    rows = []
    for point in points:
        mark = " *" if point["trained"] is False else ""
        accuracy = f"{100 * point['accuracy']:.1f} % ± {100 * point['ci95']:.1f}"
        right = f"{100 * point['token_accuracy']:.1f} %"
        row = [point["budget"] + mark, f"{point['retained']:.1f}", accuracy, right, f"{point['loss']:.3f}"]
        rows.append([*row, point["questions"], point["seed"]])
    notes = [f"Measured on this export: {points[0]['data']}, {points[0]['images']} images; ± is a 95 % interval."]
    if any(point["trained"] is False for point in points):
        notes.append("* outside of the trained range.")
    return f"## Accuracy by budget\n\n{_table(header, rows)}\n\n{' '.join(notes)}"


def _training(manifest: dict[str, Any]) -> str:
    facts = {k: v for k, v in manifest.get("trained_with", {}).items() if k != "diagnostics"}
    if not facts:
        return ""
    rows = [[name.replace("_", " "), _value(value)] for name, value in facts.items()]
    return f"## Training\n\n{_table(['setting', 'value'], rows)}\n\nThe complete recipe, if any, is recipe.yaml."


def _findings(found: dict[str, Any] | None) -> str:
    """Whether the pruner beat random selection of as many tokens at the end of training, and other alarms."""
    if not found:
        return ""
    last, alarms = found["last"], found["alarms"]
    gap, error = last["behind_random"], last["behind_random_error"]
    if gap is None or error is None:
        verdict = "The comparison with random selection could not be measured."
    else:
        what = "beats" if gap < -2 * error else "falls behind" if gap > 2 * error else "cannot be distinguished from"
        verdict = (
            f"The pruner {what} random selection of as many tokens: its label loss is {abs(gap):.3f} nats "
            f"{'lower' if gap < 0 else 'higher'} (standard error {error:.3f}), {100 * last['accuracy']:.0f} % of "
            f"answer tokens are correct against {100 * last['random_accuracy']:.0f} %."
        )
    seen = f"At the last check of training (step {last['step']:.0f}, a few batches, the plan's own budget):"
    warned = "\n".join(f"- ALARM: {alarm}" for alarm in alarms) or "No alarms."
    return f"## Does the pruner beat random?\n\n{seen} {verdict}\n\n{warned}"


def _caveats(manifest: dict[str, Any]) -> str:
    lines = []
    if manifest["prompt_dependent"]:
        lines.append("- Which tokens are retained depends on the prompt.")
    if manifest.get("trained_with", {}).get("quantize"):
        lines.append(
            "- It was trained on a quantised base; its adapters are merged into the unquantised weights, so that it "
            "differs from the trained model by the quantisation error."
        )
    if manifest.get("untrained_pruners"):
        names = ", ".join(manifest["untrained_pruners"])
        lines.append(f"- The pruner was not trained: {names} has the weights that it was built with.")
    if manifest.get("code", {}).get("reason"):
        lines.append(f"- It loads with tpcompress only: {manifest['code']['reason']}.")
    conversion = manifest["conversion"]
    if conversion is not None:
        lines.append(f"- Writing the weights moved the first logits of the probe by {conversion['logit_gap']:.2g}.")
    lines += [f"- {line}." for line in report(manifest["runtimes"])]
    return "## Notes\n\n" + "\n".join(lines)


def _all_have(trained: Sequence[dict[str, Any]], key: str) -> bool:
    return all(key in each["low"] for each in trained)


def _budget(fields: dict[str, Any]) -> str:
    ((name, value),) = fields.items()
    return f"{value} tokens" if name == "keep_tokens" else f"{amount_text(value)} of the tokens"


def _value(value: Any) -> str:
    """Text of a plain value: classes as calls, lists with commas."""
    if isinstance(value, dict) and "class" in value:
        rest = ", ".join(f"{k}={_value(v)}" for k, v in value.items() if k != "class")
        return f"{value['class']}({rest})"
    if isinstance(value, dict):
        return ", ".join(f"{k}={_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_value(each) for each in value)
    return "none" if value is None else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
