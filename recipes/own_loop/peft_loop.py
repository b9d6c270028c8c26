"""Fine-tune in a bare loop with PEFT: a learned gate alone, then LoRA. Usage: peft_loop.py [FOLDER] [MODEL]"""

import sys

import torch
from peft import LoraConfig, get_peft_model

import tpcompress as tp
from tpcompress.data import ChatCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.models import load_base, load_processor

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop"
base = sys.argv[2] if len(sys.argv) > 2 else "tiny_llava"
processor, rows = load_processor(base), load_benchmark("train", 8)
collate = ChatCollator(processor)
model = get_peft_model(load_base(base), LoraConfig(r=8, target_modules=r".*language_model.*(q|v)_proj"))
tp.attach(model, "learned_gate", keep_ratio=0.25)
losses = []
for what, rate in (("pruner", 1e-3), ("rest", 1e-4)):  # full length with gates, then cut sequences
    optimizer = torch.optim.AdamW(tp.trainable(model, what), lr=rate)
    for start in (0, 2, 4, 6):
        batch = collate([rows[start], rows[start + 1]])
        batch.pop("meta")
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
tp.save_pretrained(model.eval(), f"{folder}/export", processor=processor, overwrite=True)
print(tp.verify(f"{folder}/export"))
