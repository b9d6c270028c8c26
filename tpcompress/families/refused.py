"""Model types that no `Family` can describe, and why: refused by name instead of only unknown."""

CROSS = "its text reaches images by cross-attention, so no vision token stands in the sequence"

ENCODER_DECODER = "it is an encoder-decoder: its decoder reaches vision tokens by cross-attention"

QUERIES = "its Q-Former already makes a few learned queries of an image, and it has no core model that merges them"

DISCRETE = "a VQ-VAE turns its images into words of the vocabulary, so there is no projector and no grid of features"

TIMM = "its vision tower comes from timm, which tpcompress does not install, so no test covers it"

REFUSED: dict[str, str] = {
    "blip": CROSS,
    "blip-2": QUERIES,
    "chameleon": DISCRETE,
    "emu3": DISCRETE,
    "fast_vlm": TIMM,
    "florence2": ENCODER_DECODER,
    "fuyu": "it has no vision tower, and its get_image_features does not give one feature per image",
    "gemma3n": "its layers pass several streams of hidden states (AltUp), and its vision tower comes from timm",
    "git": "it puts image features before the text inside its forward, so the prompt has no placeholders",
    "granite4_vision": "its text model adds vision features between decoder layers, at the length of the whole prompt",
    "idefics": CROSS,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "kimi_k25": "transformers cannot encode its videos (it pools frames, then splits by the count before), and no test "
    "covers the multi-head latent attention of its language model",
    "kosmos-2": "a mask beside the prompt (image_embeds_position_mask) says where its images are, not a placeholder",
    "kosmos-2.5": "a mask beside the prompt (image_embeds_position_mask) says where its images are, not a placeholder",
    "llama4": "its language_model is a whole Llama4ForCausalLM, and no core model merges vision tokens before it",
    "mllama": CROSS,
    "perception_lm": TIMM,
    "pix2struct": ENCODER_DECODER,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "video_llama_3": "its videos are compressed by a mask (video_compression_mask) that the encoder does not see, so "
    "the features of a video do not tell how its tokens lie",
    "vision-encoder-decoder": ENCODER_DECODER,
}
"""`config.model_type` -> reason."""


def check_not_refused(model_type: str) -> None:
    """Raise a ValueError with the reason for a model type that cannot be pruned."""
    if model_type in REFUSED:
        raise ValueError(f"{model_type} cannot be pruned: {REFUSED[model_type]}. `tpcompress families` lists what can.")
