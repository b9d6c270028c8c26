"""The untrained base: a stock LLaVA with DINOv2-small as its tower and a Llama of two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from photos.tower import PATCH, SIDE, dinov2_small
from tpcompress.data.photos.questions import WORDS

SPECIAL = PAD, BOS, EOS, IMAGE, UNKNOWN = "<pad>", "<bos>", "<eos>", "<image>", "<unk>"
VOCABULARY = (*SPECIAL, *WORDS)
WORD_IDS = {word: i for i, word in enumerate(VOCABULARY)}
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = (WORD_IDS[word] for word in (PAD, BOS, EOS, IMAGE))
VISION_TOKENS = (SIDE // PATCH) ** 2
WIDTH, LAYERS, HEADS, INNER = 192, 2, 4, 448


def base_config(layers: int = LAYERS) -> LlavaConfig:
    """Config of the base; its tower's config alone decides the width of the projector's input."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    return LlavaConfig(
        vision_config=dinov2_small(),
        text_config=text,
        image_token_id=IMAGE_ID,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=True,
    )


_KERNEL = "tpcompress_photos_fp32"
"""Attention of the training: scores in fp32 under autocast, where bf16's backward pass is half as fast on CPUs."""


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: object
) -> tuple[Tensor, None]:
    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(_KERNEL, _attend)


class Reader(nn.Module):
    """Everything of the base but its tower: projector, language model and head, which features are put through."""

    def __init__(self, seed: int, layers: int = LAYERS) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = base_config(layers)
        config.vision_config.num_hidden_layers = 0  # the tower is not trained: its features are cached
        self.model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").float()
        self.language_model.config._attn_implementation = _KERNEL
        del self.model.model.vision_tower
        _init_similarity_attention(self.model)

    @property
    def projector(self) -> nn.Module:
        """LLaVA's projector: linear, GELU, linear."""
        return self.model.model.multi_modal_projector

    @property
    def language_model(self) -> nn.Module:
        """The Llama."""
        return self.model.model.language_model


@torch.no_grad()
def _init_similarity_attention(model: LlavaForConditionalGeneration) -> None:
    """Attend to similar tokens and copy them from the start, so that look-ups are learnt early, as in the tiny base."""
    eye = torch.eye(WIDTH)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for projection, gain, noise in (
            (attention.q_proj, 1.2, 0.1),
            (attention.k_proj, 1.2, 0.1),
            (attention.v_proj, 0.5, 0.05),
            (attention.o_proj, 0.5, 0.05),
        ):
            projection.weight.copy_(gain * eye + noise * torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
    model.model.language_model.embed_tokens.weight.mul_(10)
    model.model.language_model.norm.weight.fill_(0.2)
