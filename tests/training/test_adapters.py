"""What of adapters an export could not contain is refused before training, with the way out."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.export.adapters import merged_view
from tpcompress.families import resolve
from tpcompress.training.adapters import add_lora

HEADS = ("lm_head", "embed_tokens")


@pytest.fixture
def make(base_folder):
    def load(tied: bool = False):
        model = AutoModelForImageTextToText.from_pretrained(base_folder)
        if tied:
            model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
            model.tie_weights()
            assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        return model.requires_grad_(False)

    return load


@pytest.mark.parametrize("start", ["pissa_niter_2", "pissa_niter_0"])
def test_a_start_that_changes_the_base_at_random_is_refused(make, start):
    model = make()
    with pytest.raises(
        ValueError, match=rf"^lora: init_lora_weights {start} changes the weights of the base at random[^\n]*$"
    ):
        add_lora(model, {"r": 2, "init_lora_weights": start}, resolve(model), set())


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "olora", "mica"])
def test_a_start_that_can_be_repeated_is_not(make, start):
    model = make()
    add_lora(model, {"r": 2, "init_lora_weights": start}, resolve(model), set())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora changes"),
        ({"bias": "all"}, "bias all trains"),
        ({"bias": "lora_only", "target_modules": ["fc1"]}, "bias lora_only trains"),
    ],
)
def test_adapter_off_needs_a_base_that_stays(make, fields, reason):
    model = make()
    with pytest.raises(ValueError, match=rf"^Teacher AdapterOff is [^\n]*{reason} [^\n]*FrozenCopy.$"):
        add_lora(model, {"r": 2} | fields, resolve(model), set(), needs_base=True)
    add_lora(make(), {"r": 2} | fields, resolve(model), set())


@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", HEADS)
def test_one_of_two_tied_embeddings_is_not_adapted_alone(make, where, name):
    fields = {"r": 2, "target_modules": ["q_proj"]} | {where: [name]}
    model = make(tied=True)
    with pytest.raises(ValueError, match=rf"^lora: {name} shares its weight [^\n]* ensure_weight_tying: true[^\n]*$"):
        add_lora(model, dict(fields), resolve(model), set())
    add_lora(make(), dict(fields), resolve(model), set())  # not tied
    add_lora(make(tied=True), fields | {"ensure_weight_tying": True}, resolve(model), {"projector"})


def test_what_a_user_tuned_on_tied_embeddings_is_not_merged_away(make):
    """In a loop of the user, where nothing was checked before training."""
    from peft import LoraConfig, get_peft_model

    model = tp.attach(make(tied=True), "pool", keep_tokens=16)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="^lora: lm_head shares its weight"):
        merged_view(tuned)


def test_untied_weights_under_a_config_that_ties_them_are_not_exported(make, tmp_path):
    from training.helpers import make_processor

    model = make(tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    tp.attach(model, "pool", keep_tokens=16)
    with pytest.raises(ValueError, match=r"^The config shares '[\w.]+' with another weight \(tie_word_embeddings\)"):
        tp.export(model, make_processor(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [{"lora": {"r": 2, "init_lora_weights": "mica"}, "train": []}])
def test_frozen_tensors_of_adapters_are_in_the_checkpoint(work, model):
    run = work.fit(model=model, trainer={"max_steps": 1})
    saved = work.saved()["state_dict"]
    frozen = [name for name, p in run.model.named_parameters() if "lora_" in name and not p.requires_grad]
    assert frozen
    assert set(frozen) <= set(saved)
