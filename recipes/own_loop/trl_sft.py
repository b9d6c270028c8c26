"""Fine-tune with TRL's SFTTrainer and a budget drawn at every step. Usage: trl_sft.py [FOLDER]"""

import sys

from trl import SFTConfig, SFTTrainer

import tpcompress as tp
from tpcompress.data.benchmark import load_benchmark
from tpcompress.models import load_base, load_processor
from tpcompress.training.schedules import RandomBudget


class PrunedSFTTrainer(tp.TrainerMixin, SFTTrainer):
    """SFTTrainer with losses and metrics on the pruned sequence."""


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop"
model, processor = load_base("tiny_llava"), load_processor("tiny_llava")
tp.attach(model, "divprune", keep_tokens=16)
rows = load_benchmark("train", 16)
rows = rows.map(lambda row: {"prompt": row["conversations"][0][:1], "completion": row["conversations"][0][1:]},
                remove_columns=["conversations", "families"])  # fmt: skip
arguments = SFTConfig(
    folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-4, max_length=None, save_strategy="no",
    logging_steps=1, report_to="none", use_cpu=True, bf16=False,
)  # fmt: skip
trainer = PrunedSFTTrainer(
    model, arguments, train_dataset=rows, processing_class=processor, callbacks=[tp.ScheduleCallback(RandomBudget())]
)
trainer.train()
tp.save_pretrained(model, f"{folder}/export", processor=processor, overwrite=True)
print(tp.summary(tp.from_pretrained(f"{folder}/export", verify=True)))
