"""Views are an open set: every field has a provider, every provider fills its fields, and a new one is one file."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from looks import plan_of
from support import TOKENS, batch, make_view, tiny_model

import tpcompress
from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.insertion.views.registry import Provider, _add, providers
from tpcompress.pruners import Pruner, TokenView
from tpcompress.pruners.views import JOINT, LAYER_VIEWS, TOWER_VIEWS, VIEWS, ViewSpec, fields_of, views_at

PACKAGE = Path(tpcompress.__file__).parent
README = (PACKAGE / "insertion" / "README.md").read_text()
OPTIONAL = [f.name for f in fields(TokenView) if f.metadata.get("views")]


def test_every_view_has_a_provider_and_fields() -> None:
    assert providers().keys() == VIEWS.keys()
    assert {name for name in VIEWS if not fields_of(name)} == {JOINT.name}
    assert {name for view in VIEWS for name in fields_of(view)} == set(OPTIONAL)
    assert {name for name, provider in providers().items() if provider.capture} == TOWER_VIEWS
    assert {name for name, p in providers().items() if p.capture and p.capture.of_layer} == views_at("tower_layer")
    assert LAYER_VIEWS
    assert not LAYER_VIEWS & TOWER_VIEWS


@pytest.mark.parametrize("name", sorted(VIEWS.keys() - {JOINT.name}))
def test_a_provider_fills_its_fields_and_no_other(model: Any, name: str) -> None:
    """On a model, and in the views that tests draw: there in the same dimensions."""
    layer = next(at for at in (2, 0) if why_unavailable(resolve(model), Reads(name), at) is None)
    inputs = batch([(5, 1, 7), (4, 2, 3)])
    attach(model, plan_of(name, layer=layer))
    with record(model) as trace, torch.no_grad():
        model(**inputs)
    view = next(stage.view for stage in trace.stages if stage.view is not None and stage.layer == layer)
    assert {field for field in OPTIONAL if getattr(view, field) is not None} == set(fields_of(name))
    drawn = make_view(Reads(name), torch.rand(2, 20, 16))
    for field in fields_of(name):
        if isinstance(getattr(view, field), torch.Tensor):
            letters = field.rpartition("_")[2]
            assert getattr(view, field).ndim == getattr(drawn, field).ndim == len(letters), field
            assert [x for x, letter in zip(getattr(view, field).shape, letters, strict=True) if letter == "V"] in (
                [],
                [TOKENS],
            ), field
    detach(model)


class Reads(Pruner):
    """A pruner that needs one view."""

    name = "reads"

    def __init__(self, view: str) -> None:
        super().__init__()
        self.view = view

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.view})


def test_wrong_registrations_are_refused() -> None:
    with pytest.raises(ValueError, match="There is no view 'nothing'"):
        _add("nothing", Provider(lambda stage: {}))
    with pytest.raises(ValueError, match="'keys' has two providers"):
        _add("keys", Provider(lambda stage: {}))
    with pytest.raises(ValueError, match="at 'somewhere'; take one of stage"):
        ViewSpec("mine", "somewhere")
    assert "no view" in str(why_unavailable(resolve(tiny_model()), Reads("nothing"), 2))


TRY = """
import torch
from support import TOKENS, batch, make_view, tiny_model
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, Selection
from tpcompress.pruners.topk import keep_topk

class Longest(Pruner):
    needs = frozenset({"norm"})
    def forward(self, tokens, num_keep_B):
        return Selection(keep_topk(tokens.norm_BV, tokens.valid_BV, num_keep_B), tokens.norm_BV)

model = attach(tiny_model(), PruningPlan([Stage(Longest(), 2, keep_tokens=9)]))
with record(model) as trace, torch.no_grad():
    model(**batch([(5, 1, 7)]))
view, selection = trace.stages[0].view, trace.stages[0].selection
assert torch.allclose(view.norm_BV, view.vision_BVD.norm(dim=-1))
assert view.norm_BV[selection.keep_BV].min() >= view.norm_BV[~selection.keep_BV].max()
assert make_view(Longest(), torch.rand(2, 5, 4)).norm_BV.shape == (2, 5)
from insertion.views import test_view_registry
test_view_registry.test_every_view_has_a_provider_and_fields()
import test_layering
assert not [line for line in test_layering.violations() if "insertion" in line or "pruners" in line]
print("norm works")
"""


@pytest.mark.slow  # by default with the other kinds, in tests/one_file
def test_a_new_view_is_one_field_and_one_file(tmp_path: Path) -> None:
    """What the README shows, in a copy of the package."""
    line, file = re.findall(r"```python\n# (?:tpcompress/\S+?)(?:, in TokenView)?\n(.*?)```", README, re.DOTALL)
    shutil.copytree(PACKAGE, tmp_path / "tpcompress", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parents[2], tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    views = tmp_path / "tpcompress" / "pruners" / "views.py"
    place = "    pixels_BVC: Tensor | None"
    assert views.read_text().count(place) == 1
    views.write_text(views.read_text().replace(place, line + place))
    (tmp_path / "tpcompress" / "insertion" / "views" / "norm.py").write_text(file)
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{tmp_path / 'tests'}", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("norm works\n"), done.stderr[-3000:]
