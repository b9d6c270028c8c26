"""A base of the counts of LLaVA-1.5, and presets as they are read: each once per session."""

import pytest
import torch
import yaml
from support import scramble
from training.helpers import Workplace, save_base, save_chat
from training.recipe.presets import DEPTH, FILES, V
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tpcompress.training.recipe.run import RecipeCLI


@pytest.fixture(scope="session")
def preset_work(tmp_path_factory) -> Workplace:
    """A base of LLaVA-1.5's counts, and the photographs."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    config.text_config.num_hidden_layers = DEPTH
    config.vision_config.patch_size = processor.patch_size = 4
    config.image_seq_length = V
    torch.manual_seed(0)
    scramble(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return Workplace(folder, save_chat(tmp_path_factory.mktemp("chat")), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def read(preset_work):
    """A preset's trainer, module and data, from its file or from changed values."""
    held: dict[str, RecipeCLI] = {}

    def read(name: str, values: dict | None = None) -> RecipeCLI:
        if values is None and name in held:
            return held[name]
        values_or_file = yaml.safe_load(FILES[name].read_text()) if values is None else values
        path = preset_work.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values_or_file))
        more = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--model.base", str(preset_work.base)]
        run = RecipeCLI(["--config", str(path), *more], progress=False, run=False)
        if values is None:
            held[name] = run
        return run

    return read
