"""Feeds a language model with image features from ONNX Runtime: any runtime that takes embeddings can do the same.

    tpcompress onnx exported exported_onnx
    python recipes/onnx/onnx_features.py exported exported_onnx photo.png "What is this?"

The graph has pruned: the language model sees K features per image. For families with 1-D positions.
"""

import json
import sys
from pathlib import Path

import onnxruntime
import torch
from PIL import Image

import tpcompress as tp


def answer(folder, graph, image, question, new_tokens=8):
    """Greedy tokens after one image and a question."""
    about = json.loads((Path(graph) / "manifest.json").read_text())
    processor = tp.load_processor(folder)
    text = f"USER: {getattr(processor, 'image_token', '<image>')}\n{question} ASSISTANT:"
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")

    # Image side: ONNX Runtime. `indices` are those of the retained tokens among the placeholders of the image.
    session = onnxruntime.InferenceSession(str(Path(graph) / "vision.onnx"), providers=["CPUExecutionProvider"])
    features, indices = session.run(None, {"pixel_values": inputs["pixel_values"].numpy()})

    # Text side: here the stock modules of transformers, with the plan off.
    model = tp.load(folder)
    decoder, embed, head = model.model.language_model, model.get_input_embeddings(), model.get_output_embeddings()
    ids = inputs["input_ids"][0]
    is_image = ids == model.config.image_token_id
    keep = ~is_image
    keep[is_image.nonzero()[:, 0][torch.from_numpy(indices)]] = True
    embeddings = embed(ids.masked_fill(is_image, 0))
    embeddings[keep & is_image] = torch.from_numpy(features).to(embeddings.dtype)
    columns = torch.arange(len(ids))[keep]
    position = columns if about["positions"] == "original" else torch.arange(len(columns))
    step, cache, found = embeddings[keep][None], None, []
    with torch.no_grad(), tp.disabled(model):
        for _ in range(new_tokens):
            out = decoder(inputs_embeds=step, position_ids=position[None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = head(out.last_hidden_state[:, -1])
            logits[:, model.config.image_token_id] = -torch.inf
            found.append(int(logits.argmax()))
            step, position = embed(torch.tensor(found[-1:]))[None], position[-1:] + 1
    return found


if __name__ == "__main__":
    folder, graph, path, question = sys.argv[1:5]
    tokens = answer(folder, graph, Image.open(path).convert("RGB"), question)
    print(tp.load_processor(folder).decode(tokens))
