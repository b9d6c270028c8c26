"""Every family trains on what its own processor returns: full and with LoRA, taught, exported, and compared again."""

import json

import pytest
import torch
from PIL import Image
from skimage import data as photos
from support import family_folder
from training.helpers import Workplace

from tpcompress.export import verify
from tpcompress.families import list_families
from tpcompress.training.recipe.export import export_run

DEFAULT = ("smolvlm", "gemma3")  # tiles, token types; tests/main_job trains others by command
FAMILIES = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in list_families()]
MORE = {"lora": {"r": 2}, "train": ["projector"], "teacher": "AdapterOff", "losses": ["Label", "KL"],
        "gradient_checkpointing": True}  # fmt: skip


@pytest.fixture
def own_data(tmp_path, family):
    """Four rows: one image, two images, none, and one of another shape; those that the family takes."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    sizes = {"astronaut": (96, 96), "chelsea": (120, 64), "coffee": (64, 112)}
    for name, size in sizes.items():
        Image.fromarray(getattr(photos, name)()).resize(size).save(folder / f"images/{name}.png")
    rows = []
    takes = list_families()[family].takes
    kinds = {0: "text", 2: "images"}
    for number, names in enumerate((["astronaut"], ["astronaut", "chelsea"], [], ["coffee"])):
        if len(names) in kinds and kinds[len(names)] not in takes:
            continue
        asked = "<image>\n" * len(names) + "what is this ?"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat " * (number + 1)}]
        images = {"images": [f"{name}.png" for name in names]} if names else {}
        rows.append({"id": str(number), "messages": turns} | images)
    (folder / "chat.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_on_its_own_batches_and_is_exported(own_data, tmp_path, family):
    work = Workplace(family_folder(family), own_data, tmp_path)
    plan = {"pruner": "divprune", "keep_tokens": 4}
    run = work.fit(model=MORE | {"plan": plan}, trainer={"max_steps": 2})
    assert run.trainer.global_step == 2
    assert not run.datamodule.bad_rows.counts
    assert torch.isfinite(run.trainer.callback_metrics["loss/kl"])
    folder = export_run(work.folder / "run", tmp_path / "out")
    assert json.loads((folder / "manifest.json").read_text())["reload"]["compared"]
    assert verify(folder).ok
