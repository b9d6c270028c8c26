"""Fine-tune with transformers' Trainer; the budget falls from 144 vision tokens to 16. Usage: trainer.py [FOLDER]"""

import sys

from transformers import Trainer, TrainingArguments

import tpcompress as tp
from tpcompress.data import ChatCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.models import load_base, load_processor
from tpcompress.training.schedules import Linear

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop"
model, processor = load_base("tiny_llava"), load_processor("tiny_llava")
tp.attach(model, "divprune", keep_tokens=16)
collate = ChatCollator(processor)
arguments = TrainingArguments(
    folder, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-4,
    remove_unused_columns=False, save_strategy="no", logging_steps=1, report_to="none", use_cpu=True,
)  # fmt: skip
trainer = Trainer(
    model, arguments, train_dataset=load_benchmark("train", 16), callbacks=[tp.ScheduleCallback(Linear(start=9))],
    data_collator=lambda rows: {name: value for name, value in collate(rows).items() if name != "meta"},
)  # fmt: skip
trainer.train()
tp.save_pretrained(model, f"{folder}/export", processor=processor, overwrite=True)
print(tp.summary(tp.from_pretrained(f"{folder}/export", verify=True)))
