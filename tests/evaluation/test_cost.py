import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaModel

import tpcompress as tp
from tpcompress.insertion.cost import count_lengths, decoder_flops, kv_bytes

TOLERANCE = 0.02


def config(**more) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=128, attn_implementation="eager", **(sizes | {"num_key_value_heads": 2} | more))


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 4}, {"head_dim": 8}, {"num_hidden_layers": 1}])
@pytest.mark.parametrize("length", [5, 200])
def test_flops_are_those_that_torch_counts(more, length):
    settings = config(**more)
    model = LlamaModel(settings).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.ones(1, length, dtype=torch.long), use_cache=False)
    expected = decoder_flops(settings, [length] * settings.num_hidden_layers)
    assert expected == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)


def test_flops_of_a_pruned_model_are_those_that_torch_counts(eager_model):
    model = eager_model  # torch does not count inside the CPU's fused attention
    plan = tp.PruningPlan([tp.Stage("uniform", keep_tokens=20), tp.Stage("random", layer=2, keep_tokens=7)])
    tp.attach(model, plan)
    ids = torch.cat([torch.full((1, 64), 100), torch.ones(1, 30, dtype=torch.long)], 1)
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), use_cache=False)
    counted = sum(counter.get_flop_counts()["LlavaForConditionalGeneration.model.language_model"].values())
    lengths = count_lengths(plan, 30, 64, model.config.text_config.num_hidden_layers)
    assert decoder_flops(model.config, lengths) == pytest.approx(counted, rel=TOLERANCE)


def test_head_is_counted_where_asked():
    settings = config()
    assert decoder_flops(settings, [4] * 3, head_tokens=1) - decoder_flops(settings, [4] * 3) == 2 * 64 * 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_cache(dtype):
    settings = config()
    cache = DynamicCache(config=settings)
    with torch.no_grad():
        LlamaModel(settings).to(dtype)(torch.ones(1, 9, dtype=torch.long), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(settings, [9] * 3, dtype) == held


def test_lengths_follow_the_plan():
    plan = tp.PruningPlan([tp.Stage("uniform", keep_ratio=0.5), tp.Stage("uniform", layer=2, keep_tokens=3)])
    assert count_lengths(plan, 10, 64, 4) == [42, 42, 13, 13]
    assert count_lengths(plan, 10, 64, 4, num_images=2) == [74, 74, 16, 16]
    assert count_lengths(None, 10, 64, 2) == [74, 74]
    assert count_lengths(plan, 10, 64, 4, num_images=0) == [10] * 4
    prompt = tp.PruningPlan(plan.stages, scope="prompt")
    assert count_lengths(prompt, 10, 64, 4, num_images=2) == [74, 74, 13, 13]
    assert sum(count_lengths(plan, 0, 64, 4)) / 4 == plan.layer_average(64, 4)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="A stage acts at layer 2, but there are 2"):
        count_lengths(tp.PruningPlan([tp.Stage("uniform", layer=2, keep_tokens=3)]), 1, 9, 2)
    with pytest.raises(ValueError, match="The model has 3 decoder layers, got 2 lengths"):
        decoder_flops(config(), [1, 2])
    with pytest.raises(ValueError, match="must not be negative"):
        count_lengths(None, -1, 9, 2)
