"""The catalogue describes every class of the open sets."""

import pytest

from tpcompress.training import catalogue
from tpcompress.training.losses import list_losses
from tpcompress.training.schedules import list_schedules
from tpcompress.training.teachers import list_teachers


@pytest.mark.parametrize(
    ("entries", "classes"),
    [
        (catalogue.losses, list_losses),
        (catalogue.teachers, list_teachers),
        (catalogue.schedules, list_schedules),
    ],
)
def test_every_class_has_an_entry(entries, classes):
    found = {entry.name: entry for entry in entries()}
    assert list(found) == list(classes())
    for name, entry in found.items():
        assert entry.summary
        assert entry.summary in " ".join(entry.description.split())
        assert not {"self", "args", "kwargs"} & set(entry.arguments)
        assert set(classes()[name].test_arguments[0]) <= set(entry.arguments)


def test_what_an_entry_contains():
    (matryoshka,) = [entry for entry in catalogue.schedules() if entry.name == "Matryoshka"]
    assert matryoshka.arguments == {"factors": "required"}
    assert matryoshka.paper == "2405.17430"
    (kl,) = [entry for entry in catalogue.losses() if entry.name == "KL"]
    assert kl.arguments == {"temperature": "1.0", "shifted": "true", "weight": "1.0"}
    (ramp,) = [entry for entry in catalogue.schedules() if entry.name == "LayerRamp"]
    assert ramp.arguments["budget"] == "null"
    (off,) = [entry for entry in catalogue.teachers() if entry.name == "AdapterOff"]
    assert (off.arguments, off.paper) == ({}, "")
