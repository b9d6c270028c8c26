"""What is known of encoded images reaches the prefill: through rebuilt containers, copies and offloading."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import send_to_device
from support import batch, generate, tiny_model
from torch import Tensor
from torch.distributed.utils import _recursive_to

import tpcompress as tp
from tpcompress.families.layout import Grid, Layout
from tpcompress.insertion.attach import attach, mode, record
from tpcompress.insertion.encoded import Encoded, given_features, recall_features, remember_features
from tpcompress.insertion.plan import PruningPlan, Stage

FAMILIES = ("llava", "qwen2_5_vl")
PLAN = PruningPlan([Stage("divprune", 0, keep_ratio=0.5), Stage("fastv", 2, keep_ratio=0.2)])
TOWER = PruningPlan([Stage("fastervlm", 0, keep_tokens=9)])
every_family = pytest.mark.parametrize("family", FAMILIES)


def pair(family: str) -> tuple[Any, dict[str, Any], Any]:
    """A model to dispatch, its inputs, and what a model like it that stays in one piece generates."""
    model, whole = tiny_model(family), tiny_model(family)
    inputs = batch([(5, 1, 7), (3, 2, 8)], family=family, config=model.config)
    return model, inputs, generate(attach(whole, PLAN), inputs)


def offloaded(model: Any, how: str, folder: Path) -> Any:
    """A model as accelerate dispatches it: weights elsewhere, hooks that rebuild the inputs of every module."""
    if how == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, folder, torch.device("cpu"))
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


@every_family
@pytest.mark.parametrize(
    ("how", "order"),
    [
        ("hook", "dispatch first"),
        ("cpu", "attach first"),
        ("disk", "attach first"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("hook", "attach first"),
                ("cpu", "dispatch first"),
                ("disk", "dispatch first"),
            )
        ),
    ],
)
def test_generate_on_a_dispatched_model(family: str, how: str, order: str, tmp_path: Path) -> None:
    model, inputs, expected = pair(family)
    if order == "attach first":
        attach(model, PLAN)
    model = offloaded(model, how, tmp_path)
    if order == "dispatch first":
        attach(model, PLAN)
    with record(model) as trace:
        found = generate(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(trace.stages) == 2
    assert all(out < total for out, total in zip(trace.stages[-1].vision_out, trace.stages[-1].total, strict=True))
    beams = {"num_beams": 2, "num_return_sequences": 2}
    assert generate(model, inputs, **beams).sequences.shape[0] == 4
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]


@every_family
@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("rebuild", ["accelerate", "fsdp", "copied", "float64 and back"])
def test_features_of_a_rebuilt_container(family: str, rebuild: str, beams: int, monkeypatch: Any) -> None:
    """`generate` hands its features to a model whose wrapper rebuilds or copies them."""
    model, inputs, _ = pair(family)
    attach(model, PLAN)
    options = {"num_beams": beams, "num_return_sequences": beams}
    expected, plain, rebuilt = generate(model, inputs, **options), model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("mm_encoder_outputs"):
            kwargs["mm_encoder_outputs"] = again(kwargs["mm_encoder_outputs"], rebuild)
            rebuilt.append(rebuild)
        return plain(*args, **kwargs)

    forward.__signature__ = plain.__signature__  # type: ignore[attr-defined]
    monkeypatch.setitem(model.__dict__, "forward", forward)
    assert torch.equal(generate(model, inputs, **options).sequences, expected.sequences)
    assert rebuilt


def again(outputs: dict[str, Any], rebuild: str) -> dict[str, Any]:
    """Encoder outputs in new containers, and in new tensors where they are copied."""
    if rebuild == "fsdp":
        return _recursive_to(outputs, torch.device("cpu"), False)[0]
    made = send_to_device(outputs, "cpu")
    for output in made.values():
        if rebuild != "accelerate":
            features, copy = output.pooler_output, clone if rebuild == "copied" else round_trip
            same = copy(features) if isinstance(features, Tensor) else [copy(x) for x in features]
            output.pooler_output = same
    assert all(made[m] is not outputs[m] for m in made)
    return made


def clone(x: Tensor) -> Tensor:
    return x.clone()


def round_trip(x: Tensor) -> Tensor:
    return x.double().float()


@pytest.mark.parametrize("plan", [PLAN, TOWER], ids=["layouts", "tower"])
def test_encoded_features_serve_several_calls(model: Any, plan: PruningPlan) -> None:
    """Encoded once, passed in a container of the caller's own, as often as it likes."""
    attach(model, plan)
    inputs = batch([(5, 1, 7)])
    with torch.no_grad():
        expected = model(**inputs).logits
        output = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        for _ in range(2):
            own = type(output)(pooler_output=output.pooler_output)
            assert torch.equal(model(**inputs, mm_encoder_outputs={"image": own}).logits, expected)


def test_features_that_are_unknown_are_refused(model: Any) -> None:
    inputs = batch([(5, 1, 7)])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        before = model.model.get_image_features(pixels, return_dict=True)
        attach(model, PLAN)
        with pytest.raises(ValueError, match=r"^The layout of the image features of this call is unknown: [^\n]*$"):
            model(**inputs, mm_encoder_outputs={"image": before})
        with mode(model, "off"):
            model(**inputs, mm_encoder_outputs={"image": before})
        known = model.model.get_image_features(pixels, return_dict=True)
        other = type(known)(pooler_output=[x + 1 for x in known.pooler_output])
        with pytest.raises(ValueError, match="changed since"):
            model(**inputs, mm_encoder_outputs={"image": other})
        model(**inputs, mm_encoder_outputs={"image": known})


# ------------------------------------------------------------------------------------------------------ the notes


def encoded(*counts: int) -> Encoded:
    return Encoded(
        [Layout((Grid(1, count),)) for count in counts], {("tower_keys", -2): [torch.ones(n) for n in counts]}
    )


def test_features_are_found_by_identity_then_by_value() -> None:
    first, second, note = torch.rand(2, 3), torch.rand(4, 3), encoded(2, 4)
    remember_features([first, second], note)
    assert recall_features([first, second]).layouts == note.layouts
    assert recall_features((second, first, second)).layouts == [note.layouts[i] for i in (1, 0, 1)]
    assert [len(x) for x in recall_features([second]).tower["tower_keys", -2]] == [4]
    assert recall_features([first.clone(), second.double()]) is note
    assert recall_features([second.clone()]) is None, "copies are compared with all features of one encoder call"
    assert recall_features([first + 1, second]) is None
    stacked, other = torch.rand(2, 2, 3), encoded(2, 2)
    remember_features(stacked, other)
    assert recall_features(stacked) is recall_features(stacked.clone()) is other
    assert recall_features(stacked[:1]) is None
    assert recall_features([]).layouts == []


def test_notes_end_with_their_features() -> None:
    feature = torch.rand(2, 3)
    copy = feature.clone()
    remember_features([feature], encoded(2))
    assert recall_features([copy]) is not None
    del feature
    gc.collect()
    assert recall_features([copy]) is None


def test_a_call_without_features_has_none() -> None:
    assert given_features({}) == given_features({"mm_encoder_outputs": {"image": None}}) == {}


def test_an_export_is_loaded_and_dispatched(tmp_path: Path) -> None:
    """`device_map` makes accelerate put its hooks around ours."""
    model, inputs, expected = pair("llava")
    attach(model, PLAN)
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "plain", device_map={"": "cpu"})
    tp.attach(accelerate.cpu_offload(loaded.eval(), torch.device("cpu")), PLAN)
    loaded.generation_config = model.generation_config
    assert torch.equal(generate(loaded, inputs).sequences, expected.sequences)
