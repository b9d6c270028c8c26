"""Build the untrained base model: a stock LLaVA at the smallest size that can learn every family."""

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tpcompress.data.benchmark.vocabulary import BOS, EOS, GRID, IMAGE, IMAGE_SIZE, PAD, PATCH, WORDS

WIDTH = 128
VISION_TOKENS = GRID * GRID
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = (WORDS.index(word) for word in (PAD, BOS, EOS, IMAGE))


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """Build a model with random weights that depend on the seed only."""
    torch.manual_seed(seed)
    shared = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        num_hidden_layers=3, image_size=IMAGE_SIZE, patch_size=PATCH, projection_dim=WIDTH, **shared
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        num_hidden_layers=2,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        **shared,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").float()
    _init_similarity_attention(model)
    return model


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Input of the projector under LLaVA's "default" strategy: the last tower layer without CLS, (B, V, D)."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


@torch.no_grad()
def _init_similarity_attention(model: LlavaForConditionalGeneration) -> None:
    """Initialise attention to attend to similar tokens and copy them, so that look-ups are learned early.

    Large embeddings make word identity dominate the residual stream at first; the small final norm keeps the first
    logits in a normal range.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for projection, gain, noise in (
            (attention.q_proj, 1.2, 0.1),
            (attention.k_proj, 1.2, 0.1),
            (attention.v_proj, 0.5, 0.05),
            (attention.o_proj, 0.5, 0.05),
        ):
            _near_identity(projection, gain, noise)
    for layer in model.model.vision_tower.encoder.layers:
        _near_identity(layer.self_attn.v_proj, 0.5, 0.05)
        _near_identity(layer.self_attn.out_proj, 0.5, 0.05)
    model.model.language_model.embed_tokens.weight.mul_(10)
    model.model.language_model.norm.weight.fill_(0.2)


def _near_identity(projection: nn.Linear, gain: float, noise: float) -> None:
    weight = projection.weight
    weight.copy_(gain * torch.eye(len(weight)) + noise * torch.randn_like(weight) / len(weight) ** 0.5)
