"""Gates inside attention: bits, slopes, checkpointing, masks of all kinds, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from gating import Gating, dense
from support import answer_labels, batch, generate, gradients, tiny_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach, mode, record
from tpcompress.insertion.gates import ARGUMENT
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Selection, TokenView

SAMPLES = [(5, 1, 9), (3, 2, 8), (4, 0, 9)]


class Fixed(Gating):
    """Gates of one number for what is dropped, and another for what is retained."""

    def __init__(self, gate: float | None = None, bias: float | None = None, smooth: bool = True) -> None:
        super().__init__()
        self.gate, self.bias, self.smooth = gate, bias, smooth

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        said = super().forward(tokens, num_keep_B)
        low = [None if x is None else torch.where(said.keep_BV, y, x) for x, y in ((self.gate, 1.0), (self.bias, 0.0))]
        hard_BV = said.keep_BV.float() if self.smooth else None
        return Selection(said.keep_BV, said.scores_BV.detach(), hard_BV, value_gate_BV=low[0], key_bias_BV=low[1])


def plan(pruner: Gating, layer: int = 2) -> PruningPlan:
    return PruningPlan([Stage(pruner, layer, keep_tokens=11)])


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2])
def test_gates_that_do_nothing(impl: str, layer: int) -> None:
    model, inputs = tiny_model(impl=impl), batch(SAMPLES)
    expected = logits(model, inputs)
    attach(model, plan(Fixed(gate=1.0), layer), mode="mask")
    assert torch.equal(logits(model, inputs), expected), "values times one"
    detach(model)
    attach(model, plan(Fixed(bias=0.0), layer), mode="mask")
    assert (logits(model, inputs) - expected).abs().max() < 1e-5, "one coordinate more rounds differently, and no more"
    detach(model)
    attach(model, plan(Fixed(gate=0.9), layer), mode="mask")
    assert (logits(model, inputs) - expected).abs().max() > 1e-3, "control"


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_a_low_bias_hides_as_the_mask_does(impl: str) -> None:
    """On positions of text; a hidden token's own row is another matter."""
    model, inputs = tiny_model(impl=impl), batch(SAMPLES)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] < 90)
    plain = logits(model, inputs)
    attach(model, plan(Fixed(smooth=False)), mode="mask")
    hidden = logits(model, inputs)
    detach(model)
    attach(model, plan(Fixed(bias=-30.0)), mode="mask")
    biased = logits(model, inputs)
    assert (biased - hidden)[text].abs().max() < 1e-5
    assert (plain - hidden)[text].abs().max() > 0.05, "control"


@pytest.mark.parametrize("layer", [0, 3])
def test_a_value_gate_of_zero_is_a_row_of_zeros(layer: int) -> None:
    model, base, inputs = tiny_model(), tiny_model(), batch(SAMPLES)
    attach(model, plan(Fixed(gate=0.0), layer), mode="mask")
    with record(model) as trace:
        found = logits(model, inputs)
    with dense(base, inputs, trace):  # only to place the choice
        gate = [layer.self_attn.dense_reference[0] for layer in resolve(base).layers]
    handles = [
        module.self_attn.v_proj.register_forward_hook(lambda m, a, out, g=g: out * g[..., None])
        for module, g in zip(resolve(base).layers, gate, strict=True)
    ]
    expected = logits(base, inputs)
    for handle in handles:
        handle.remove()
    assert (found - expected).abs().max() < 1e-5
    assert (logits(base, inputs) - expected).abs().max() > 0.05, "control"


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("value", "bias"), [(True, False), (False, True), (True, True)])
def test_gradients_equal_finite_differences(value: bool, bias: bool) -> None:
    model = tiny_model().double()
    inputs = batch([(5, 1, 9)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = answer_labels(inputs)
    stages = [Stage(Gating(value, bias), 0, keep_tokens=40), Stage(Gating(value, bias), 3, keep_tokens=11)]
    attach(model, PruningPlan(stages), mode="mask")

    def loss() -> Tensor:
        """In fp64, which the model's own is not."""
        return torch.nn.functional.cross_entropy(model(**inputs).logits[0, -5:-1], labels[0, -4:])

    model.token_pruners.double()
    loss().backward()
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    for pruner in model.token_pruners:
        slope = (pruner.weight.grad @ direction).item()
        ends = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):
                pruner.weight += step * direction
                ends.append(loss().item())
                pruner.weight -= step * direction
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)
        assert abs(slope) > 1e-3, "control"


def backward(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    loss = model(**inputs, labels=answer_labels(inputs), use_cache=False).loss
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("how", ["mask", "drop"])
@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_changes_nothing(how: str, frozen: bool) -> None:
    """Layers are computed again when the call is over; both ways of doing so, several stages, also scorers alone."""
    model, inputs = tiny_model().train(), batch(SAMPLES)
    stages = [Stage(Gating(), 0, keep_tokens=30), Stage(Gating(bias=False), 2, keep_tokens=20)]
    attach(model, PruningPlan([*stages, Stage(Gating(value=False), 4, keep_tokens=9)]), mode=how)
    model.requires_grad_(not frozen)
    model.token_pruners.requires_grad_(True)
    loss, plain = backward(model, inputs)
    ours = [name for name in plain if name.startswith("token_pruners")]
    assert len(ours) == 3
    assert all(plain[name].abs().max() > 0 for name in ours)
    for reentrant in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            for _ in range(2):  # nothing of a step stays behind
                again, found = backward(model, inputs)
                assert again == loss
                assert found.keys() == plain.keys()
                for name, gradient in plain.items():
                    # Leaves add up the layers' shares in another order; some gradients are rounding alone.
                    near = 1e-5 * gradient.abs().max() + 1e-7 if reentrant else 0.0
                    assert (found[name] - gradient).abs().max() <= near, (name, reentrant)
            model.gradient_checkpointing_disable()


def test_a_checkpointing_function_that_nobody_knows() -> None:
    """It may keep to one graph after all; leaves must be full before their gradients go on."""
    model, inputs = tiny_model().train(), batch(SAMPLES)
    attach(model, PruningPlan([Stage(Gating(), 0, keep_tokens=30), Stage(Gating(), 2, keep_tokens=9)]), mode="mask")
    loss, plain = backward(model, inputs)
    for layer in resolve(model).layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: checkpoint(function, *args, use_reentrant=False)
    again, found = backward(model, inputs)
    assert again == loss
    for name, gradient in plain.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_gates_change_every_gradient() -> None:
    """The control of the test above: layers computed again without gates would give others."""
    model, inputs = tiny_model().train(), batch(SAMPLES)
    attach(model, plan(Gating(), 0), mode="mask")
    _, gated = backward(model, inputs)
    detach(model)
    _, plain = backward(model, inputs)
    behind = [n for n in plain if ".language_model.layers." in n]
    assert behind
    assert all((gated[n] - plain[n]).abs().max() > 1e-3 * plain[n].abs().max() for n in behind)


# -------------------------------------------------------------------------------------------------- other inputs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mask", "drop"])
def test_padding_and_ragged_batches(side: str, how: str) -> None:
    model, base, inputs = tiny_model(), tiny_model(), batch(SAMPLES, side)
    labels = answer_labels(inputs)
    attach(model, plan(Gating()), mode=how)
    with record(model) as trace, torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    with dense(base, inputs, trace, hide=how == "drop"), torch.no_grad():
        assert abs(base(**inputs, labels=labels).loss - loss) < 1e-5
    with torch.no_grad():
        assert abs(base(**inputs, labels=labels).loss - loss) > 1e-3, "control"


@pytest.mark.parametrize("how", ["mask", "drop"])
def test_packed_sequences(how: str) -> None:
    """A 4-D mask of two samples behind each other."""
    model, base = tiny_model(), tiny_model()
    a, b = batch([(5, 1, 9)]), batch([(3, 1, 8)], seed=1)
    inputs: dict[str, Any] = {k: torch.cat([a[k], b[k]], 1) for k in ("input_ids",)}
    first, N = a["input_ids"].shape[1], inputs["input_ids"].shape[1]
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    seen[first:, :first] = False
    inputs["attention_mask"] = torch.zeros(1, 1, N, N).masked_fill(~seen, torch.finfo(torch.float32).min)
    inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(N - first)])[None]
    inputs["pixel_values"] = torch.cat([a["pixel_values"], b["pixel_values"]])
    attach(model, plan(Gating()), mode=how)
    with record(model) as trace:
        found = logits(model, inputs)
    with dense(base, inputs, trace, hide=how == "drop"):
        expected = logits(base, inputs)
    assert (found[:, -5:] - expected[:, -5:]).abs().max() < 1e-5
    assert (found[:, -5:] - logits(base, inputs)[:, -5:]).abs().max() > 0.05, "control"


def test_gates_of_several_stages_multiply() -> None:
    model, base, inputs = tiny_model(), tiny_model(), batch(SAMPLES)
    stages = [Stage(Gating(), 0, keep_tokens=30), Stage(Gating(slope=-1.0), 3, keep_tokens=9)]
    attach(model, PruningPlan(stages), mode="mask")
    with record(model) as trace:
        found = logits(model, inputs)
    with dense(base, inputs, trace):
        assert (found - logits(base, inputs))[inputs["attention_mask"].bool()].abs().max() < 1e-5


def test_half_precision_and_autocast() -> None:
    inputs, found = batch(SAMPLES), {}
    real = inputs["attention_mask"].bool()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("autocast", torch.float32)):
        model = tiny_model().to(dtype)
        attach(model, plan(Gating(), 0), mode="mask")
        given = inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            found[name] = logits(model, given).float()[real]
    scale = found["fp32"].abs().max()
    assert (found["bf16"] - found["fp32"]).abs().max() < 0.1 * scale
    assert (found["autocast"] - found["fp32"]).abs().max() < 0.1 * scale


@pytest.mark.parametrize(("value", "bias"), [(True, False), (False, True), (True, True)])
def test_the_fused_kernel_serves(value: bool, bias: bool) -> None:
    """No dense mask: nothing but the flash kernel is allowed."""
    model, inputs = tiny_model(), batch([(5, 2, 9)])
    del inputs["attention_mask"]
    attach(model, plan(Gating(value, bias), 0), mode="mask")
    free = model(**inputs).logits
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = model(**inputs).logits
        found.sum().backward()
    assert (found - free).abs().max() < 1e-5
    assert model.token_pruners[0].weight.grad.abs().max() > 0


def test_attention_that_later_stages_see_is_biased() -> None:
    """`fastv` behind a gate reads the attention that the layer really pays."""
    inputs, seen = batch(SAMPLES), []
    for impl in ("sdpa", "eager"):
        model = tiny_model(impl=impl)
        stages = [Stage(Gating(slope=4.0), 0, keep_tokens=30), Stage("fastv", 2, keep_tokens=9)]
        attach(model, PruningPlan(stages), mode="mask")
        with record(model) as trace, torch.no_grad():
            out = model(**inputs, output_attentions=impl == "eager")
        seen.append(trace.stages[1].view.attention_BHV)
    paid = out.attentions[1][0, :, -1][:, inputs["input_ids"][0] == inputs["input_ids"][0].max()]
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-5)
    assert torch.allclose(seen[1][0][:, : paid.shape[1]], paid, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- refused


def test_gates_are_for_calls_that_read_everything(model: Any) -> None:
    attach(model, plan(Gating()), mode="mask")
    inputs = batch([(5, 1, 9)])
    words = {k: v[:, :3] for k, v in inputs.items() if k != "pixel_values"}
    with torch.no_grad():
        cache = model(**words, use_cache=True).past_key_values
        mask = torch.ones(1, 3 + inputs["input_ids"].shape[1], dtype=torch.long)
        with pytest.raises(ValueError, match="continues a cache"):
            model(**inputs | {"attention_mask": mask}, past_key_values=cache)


def test_a_pruner_must_say_that_it_gates(model: Any) -> None:
    class Silent(Gating):
        name = "silent"
        gates = False

    attach(model, plan(Silent()), mode="mask")
    assert "forward" not in vars(resolve(model).layers[-1].self_attn)
    with pytest.raises(ValueError, match="set its class attribute gates = True"):
        model(**batch(SAMPLES))


@pytest.mark.parametrize(
    ("case", "impl", "reason"),
    [
        (("lfm2_vl", "lfm2"), "sdpa", "which have no keys"),
        (("llava",), "flex_attention", "attn_implementation='sdpa'"),
        (("paligemma", "gemma2"), "flash_attention_2", "attn_implementation='eager'"),
    ],
)
def test_where_gates_cannot_act(case: tuple, impl: str, reason: str) -> None:
    model = tiny_model(*case)
    config = resolve(model).text_config
    config._attn_implementation_internal = impl
    names = set(vars(model))
    with pytest.raises(ValueError, match=reason):
        attach(model, plan(Gating()))
    assert set(vars(model)) == names


def test_wide_heads_under_flash_attention() -> None:
    model = tiny_model()
    resolve(model).text_config._attn_implementation_internal = "flash_attention_2"
    for layer in resolve(model).layers:
        layer.self_attn.head_dim = 256
    with pytest.raises(ValueError, match="heads of 256"):
        attach(model, plan(Gating()))


def test_generation_is_that_of_inference(model: Any) -> None:
    """In evaluation a gating pruner is a rule like any other, and no layer gets an argument of ours."""
    quiet = Fixed(smooth=False)
    attach(model, plan(quiet))
    seen: list[bool] = []
    handle = (
        resolve(model)
        .layers[-1]
        .register_forward_pre_hook(lambda m, args, kwargs: seen.append(ARGUMENT in kwargs), with_kwargs=True)
    )
    tokens = generate(model, batch(SAMPLES)).sequences
    handle.remove()
    assert len(seen) > 1
    assert not any(seen)
    with mode(model, "off"):
        assert generate(model, batch(SAMPLES)).sequences.shape == tokens.shape
