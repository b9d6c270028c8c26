import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from tpcompress.data.benchmark import make_row

ROOT = Path(__file__).resolve().parents[2]
ASSET = ROOT / "tpcompress" / "assets" / "tiny_llava"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(ASSET, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(ASSET, local_files_only=True).eval()


def ask(model, processor, image, question: str) -> str:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True)


def test_bundled_base_is_small():
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 10e6


def test_bundled_base_is_the_promised_network(model):
    config = model.config
    assert (config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers) == (3, 2)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "default")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_processor_gives_one_placeholder_per_patch(processor, model):
    row = make_row("test", 9, 0)
    inputs = processor(images=row["images"], text="<image><bos> how many rings ?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
    assert (inputs["input_ids"][0, :144] == model.config.image_token_id).all()
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_words_survive_the_tokenizer(processor):
    text = "where is the red ring ? <x1> <y11>"
    assert processor.decode(processor.tokenizer(text)["input_ids"]) == text
    unspaced = processor.tokenizer("how many rings?")["input_ids"]
    assert unspaced == processor.tokenizer("how many rings ?")["input_ids"]
    assert processor.tokenizer.unk_token_id not in unspaced


@pytest.mark.parametrize("content", ["<image>how many rings ?", "how many rings ?\n<image>"])
def test_template_of_plain_text(processor, content):
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "2"}]
    assert processor.apply_chat_template(chat) == "<image><bos> how many rings ? 2 <eos>"


def test_template_of_parts_and_several_turns(processor):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "how many rings ?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "2"}]},
        {"role": "user", "content": "is there a red ring ?"},
    ]
    expected = "<image><bos> how many rings ? 2 <eos><bos> is there a red ring ?"
    assert processor.apply_chat_template(chat) == expected
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == expected


def test_template_marks_assistant_tokens(processor):
    chat = [{"role": "user", "content": "how many rings ?"}, {"role": "assistant", "content": "2"}]
    encoded = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert list(encoded["assistant_masks"][0])[-2:] == [1, 1]
    assert sum(encoded["assistant_masks"][0]) == 2


def test_text_only_conversation(model, processor):
    inputs = processor(text="<bos> how many rings ?", return_tensors="pt")
    assert torch.isfinite(model(**inputs).logits).all()


def test_held_out_images_are_answered(model, processor):
    right = []
    for index in range(12):
        row = make_row("test", 7, index)
        for user, assistant in row["conversations"][:3]:
            right.append(ask(model, processor, row["images"], user["content"]) == assistant["content"])
    assert len(right) >= 20
    assert sum(right) / len(right) >= 0.8


class _Interrupted(Exception):
    """Stands for a lost machine."""


def _build(work: Path, stop: tuple[str, int] | None = None) -> dict[str, torch.Tensor]:
    """The three stages at toy size; ``stop`` breaks off at a step of a stage."""
    from tiny_base.joint import JointStage
    from tiny_base.language import LanguageStage
    from tiny_base.loop import Budget, run_stage
    from tiny_base.tower import TowerStage

    budget = Budget(steps=4, lr=1e-3, warmup=2, gate=0.0, save_every=2, exam=4, report_every=1000)

    def run(stage):
        start = stage.learner

        def learner(seed):
            started = start(seed)
            loss = started.loss

            def breaking(step, steps):
                if stop == (stage.name, step):
                    raise _Interrupted
                return loss(step, steps)

            started.loss = breaking
            return started

        stage.learner = learner
        return run_stage(stage, budget, 0, work, Console(quiet=True))

    work.mkdir(exist_ok=True)
    language, tower = run(LanguageStage(2, 2)), run(TowerStage(4))
    return run(JointStage(language, tower, 2, 2, plugged=32)).modules.state_dict()


@pytest.fixture
def _scripts(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])


@pytest.mark.slow
@pytest.mark.usefixtures("_scripts")
def test_interrupted_build_ends_with_the_same_weights(tmp_path):
    whole = _build(tmp_path / "whole")
    for stop in (("language", 3), ("tower", 2), ("joint", 3)):
        with pytest.raises(_Interrupted):
            _build(tmp_path / "broken", stop)
    resumed = _build(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.usefixtures("_scripts")
def test_missed_gate_extends_then_tries_the_next_seed(tmp_path):
    from tiny_base.loop import Budget, run_stage

    seeds = []

    class Learner:
        def __init__(self, seed):
            from tiny_base.optim import Optimizers

            seeds.append(seed)
            self.modules = torch.nn.Linear(2, 2)
            self.optimizers = Optimizers(dict(self.modules.named_parameters()))
            self.steps = 0

        def loss(self, step, steps):
            self.steps += 1
            return self.modules(torch.ones(1, 2)).sum()

        def evaluate(self, pictures):
            return {"count": 100.0 if seeds[-1] == 6 and self.steps == 5 else 50.0}

    class Stage:
        name = "toy"
        learner = Learner

    budget = Budget(steps=2, lr=1e-3, extension=3, extensions=1, attempts=2)
    assert run_stage(Stage(), budget, 5, tmp_path, Console(quiet=True)).steps == 5
    assert seeds == [5, 6]
    with pytest.raises(RuntimeError, match=r"'toy' missed its gate with seeds 8-9.*count"):
        run_stage(Stage(), budget, 8, tmp_path, Console(quiet=True))
