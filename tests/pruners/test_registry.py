"""Names, configs and their errors."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import pytest
import torch

from tpcompress.pruners import Pruner, Selection, TokenView, create, list_pruners, pruner_class
from tpcompress.pruners.topk import keep_topk


class Brightest(Pruner):
    """A pruner outside the package."""

    name = "brightest"

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, tokens: TokenView, num_keep_B: torch.Tensor) -> Selection:
        scores = tokens.vision_BVD.float().norm(self.power, -1)
        return Selection(keep_topk(scores, tokens.valid_BV, num_keep_B), scores)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("somewhere_else")
    module.Brightest = Brightest  # type: ignore[attr-defined]
    monkeypatch.setattr(Brightest, "__module__", "somewhere_else")
    monkeypatch.setitem(sys.modules, "somewhere_else", module)
    return "somewhere_else.Brightest"


def test_names_are_keys() -> None:
    assert all(cls.name == name for name, cls in list_pruners().items())
    assert list(list_pruners()) == sorted(list_pruners())


def test_unknown_name_lists_known_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="No pruner 'divprun'. Known: .*dart.* Did you mean divprune?"):
        create("divprun")
    with pytest.raises(ValueError, match="Known: ") as error:
        create("qqqq")
    assert "Did you mean" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [7, None, {}, {"seed": 1}, ["dart"]])
def test_neither_name_nor_mapping(config: Any) -> None:
    with pytest.raises(ValueError, match="A pruner is a name or a mapping"):
        create(config)


@pytest.mark.parametrize("name", [7, None, ["dart"], 0.5])
def test_type_that_is_no_name(name: Any) -> None:
    with pytest.raises(ValueError, match="(?i)no pruner|neither a name nor a dotted path"):
        create({"type": name})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "dart", "vision_pivots": "4"}, "Pruner 'dart': vision_pivots must be int, got '4'."),
        ({"type": "pool", "kernel": 3}, "Pruner 'pool': kernel must be str, got 3."),
        ({"type": "merged", "proportional": "yes"}, "Pruner 'merged': proportional must be bool, got 'yes'."),
        ({"type": "dart", "reduction": True}, "Pruner 'dart': reduction must be float, got True."),
    ],
)
def test_a_value_of_a_wrong_type_names_its_argument(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        create(config)


@pytest.mark.parametrize("name", list_pruners())
def test_unknown_argument_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"Pruner '{name}'.*it takes"):
        create({"type": name, "surely_not_an_argument": 1})


@pytest.mark.parametrize(
    "config",
    [
        {"type": "dart", "vision_pivots": 0, "text_pivots": 0},
        {"type": "dart", "pivot": "colour"},
        {"type": "dart", "text_pivots": -1},
        {"type": "learned_gate", "scorer": {"type": "local_global", "condition": "mood"}},
        {"type": "learned_gate", "scorer": {"type": "local_global", "width": 0}},
        {"type": "learned_gate", "reserve": -1},
        {"type": "learned_gate", "selector": {"type": "soft_topk", "temperature_end": 0.0}},
        {"type": "learned_gate", "selector": {"type": "soft_topk", "temperature_start": 0.1, "temperature_end": 0.5}},
    ],
)
def test_refused_values_name_the_pruner(config: dict[str, Any]) -> None:
    given = [config["type"], *(part["type"] for part in config.values() if isinstance(part, dict))]
    with pytest.raises(ValueError, match=given[-1]) as error:
        create(config)
    assert "\n" not in str(error.value)


def test_pruner_from_elsewhere(outside: str) -> None:
    assert pruner_class(outside) is Brightest
    pruner = create({"type": outside, "power": 2.0})
    assert pruner(TokenView.of(torch.randn(1, 5, 3)), torch.tensor([2])).keep_BV.sum() == 2
    with pytest.raises(ValueError, match="outside tpcompress"):
        pruner_class(outside, allow_outside=False)
    with pytest.raises(ValueError, match="cannot be imported"):
        create("no_such_module.Thing")
    with pytest.raises(ValueError, match="not a Pruner"):
        create("torch.nn.Linear")


def test_config_of_a_pruner_from_elsewhere_can_be_created_again(outside: str) -> None:
    config = create({"type": outside, "power": 2.0}).config()
    assert config == {"type": outside, "power": 2.0}
    assert create(config).config() == config


def test_instances_pass_through() -> None:
    pruner = create("dart")
    assert create(pruner) is pruner
    assert "vision_pivots=4" in repr(pruner)


def test_build_twice_keeps_weights_and_refuses_another_width() -> None:
    pruner = create("learned_gate")
    pruner.build(16)
    weight = pruner.scorer.reduce.weight
    pruner.build(16)
    assert pruner.scorer.reduce.weight is weight
    with pytest.raises(ValueError, match="built for width 16, the model has 32"):
        pruner.build(32)


def test_view_of_plain_tensors() -> None:
    view = TokenView.of(torch.randn(2, 6, 3), (2, 3))
    assert view.row_BV[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert view.col_BV[1].tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="does not hold 6 tokens"):
        TokenView.of(torch.randn(2, 6, 3), (2, 2))


def test_forward_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match="must define forward"):
        Pruner()(TokenView.of(torch.randn(1, 2, 3)), torch.tensor([1]))


@pytest.mark.parametrize("name", [".", "..", "a..b", "no file.yaml"])
def test_a_name_that_is_no_dotted_path_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^Pruner '[^\n]*' is neither a name nor a dotted path[^\n]*$"):
        create(name)
