"""The table of pruners says what is so."""

from __future__ import annotations

import pytest
from support import tiny_model

from tpcompress.cli.main import main
from tpcompress.families import resolve
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import list_pruners
from tpcompress.pruners.catalogue import COLUMNS, about, arguments, facts, retains, site, unserved

PARTS = resolve(tiny_model())


@pytest.mark.parametrize("name", list_pruners())
def test_every_pruner_has_a_row_and_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = list_pruners()[name]
    assert tuple(facts(cls())) == COLUMNS
    assert all(facts(cls()).values())
    assert len(retains(cls)) > 10
    assert set(arguments(cls)) == set(cls.argument_names())
    text = about(cls)
    asked = ["needs", "gives", "Cost: "] + ([] if cls.paper == "ours" else ["Unlike the official code"])
    assert [word for word in asked if word not in text] == [], "what the page of a pruner must say"
    assert cls.paper == "ours" or cls.paper.partition(" ")[0] in text, "a page names its paper"
    assert main(["pruners", name]) == 0
    shown = capsys.readouterr().out
    assert all(argument in shown for argument in arguments(cls))


@pytest.mark.parametrize("name", list_pruners())
def test_the_site_is_where_its_views_are(name: str) -> None:
    rule = list_pruners()[name]()
    allowed = {">= 0": {0, 2}, ">= 1": {2}, "0": {0}}[site(rule)]
    if why_unavailable(PARTS, rule, 0 if 0 in allowed else 2) is None:
        assert {layer for layer in (0, 2) if why_unavailable(PARTS, rule, layer) is None} == allowed


def test_the_table_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pruners"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_pruners())


def test_who_can_be_served() -> None:
    served = {name for name, cls in list_pruners().items() if unserved(cls()) is None}
    assert {"divprune", "uniform", "pool", "fastervlm", "visionzip"} <= served
    assert not served & {"fastv", "dart", "sparsevlm", "vtw", "cdpruner"}
