"""Model types that cannot be pruned, each with the reason, so that they are refused with an explanation."""

CROSS = "its text attends to images by cross-attention, so the sequence has no vision tokens"

ENCODER_DECODER = "it is an encoder-decoder whose decoder attends to vision tokens by cross-attention"

QUERIES = "its Q-Former already reduces an image to a few learned queries, and no core model merges them"

DISCRETE = "a VQ-VAE encodes its images as vocabulary tokens, so there is no projector and no grid of features"

TIMM = "its vision tower requires timm, which tpcompress does not install, so it is not tested"

KOSMOS = "the positions of its images are given by a mask (image_embeds_position_mask), not by placeholders"

REFUSED: dict[str, str] = {
    "blip": CROSS,
    "blip-2": QUERIES,
    "chameleon": DISCRETE,
    "emu3": DISCRETE,
    "fast_vlm": TIMM,
    "florence2": ENCODER_DECODER,
    "fuyu": "it has no vision tower, and its get_image_features does not return one feature per image",
    "gemma3n": "its layers have several streams of hidden states (AltUp), and its vision tower requires timm",
    "git": "it prepends image features inside its forward, so the prompt has no placeholders",
    "granite4_vision": "its text model adds vision features of the full prompt length between decoder layers",
    "idefics": CROSS,
    "instructblip": QUERIES,
    "instructblipvideo": QUERIES,
    "kimi_k25": "transformers cannot encode its videos (frames are pooled, then split by the count before pooling), "
    "and the multi-head latent attention of its language model is not tested",
    "kosmos-2": KOSMOS,
    "kosmos-2.5": KOSMOS,
    "llama4": "its language_model is a complete Llama4ForCausalLM, and no core model merges vision tokens before it",
    "mllama": CROSS,
    "perception_lm": TIMM,
    "pix2struct": ENCODER_DECODER,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "video_llama_3": "its videos are compressed by a mask (video_compression_mask) that is not an encoder input, so "
    "the layout of the tokens of a video is unknown",
    "vision-encoder-decoder": ENCODER_DECODER,
}
"""`config.model_type` -> reason."""


def check_not_refused(model_type: str) -> None:
    """Check that a model type is not refused.

    Raises:
        ValueError: it cannot be pruned; with the reason.
    """
    if model_type in REFUSED:
        raise ValueError(f"{model_type} cannot be pruned: {REFUSED[model_type]}. See `tpcompress families` for others.")
