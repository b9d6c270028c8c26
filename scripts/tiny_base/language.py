"""Language stage: train the language model on patch labels instead of vision features."""

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tiny_base.batches import Batch, answer_logits, answer_loss, exact_matches, make_batch, shown_patches
from tiny_base.model import VISION_TOKENS, build_model
from tiny_base.optim import Optimizers
from tpcompress.data.benchmark.symbolic import Kind
from tpcompress.data.benchmark.vocabulary import FAMILIES, LABELS, WORDS

SCENE: tuple[Kind, ...] = ("scene",)
OTHERS: tuple[Kind, ...] = ("document", "chart", "digits")
_FEWEST_SHOWN = 28


class LabelTable(nn.Module):
    """Ideal vision tokens: the sum of the vectors of a patch's labels, initialised to the embeddings of their words."""

    def __init__(self, model: LlavaForConditionalGeneration):
        super().__init__()
        words = model.get_input_embeddings().weight.detach()
        rows = 0.2 * torch.randn(len(LABELS), words.shape[1])
        for i, word in enumerate(LABELS.values()):
            if word is not None:
                rows[i] = words[WORDS.index(word)] + 0.05 * torch.randn(words.shape[1])
        self.table = nn.Parameter(rows)

    def forward(self, labels: Tensor) -> Tensor:
        """Vision tokens (..., D) of labels (..., K)."""
        return labels @ self.table


class LanguageStage:
    """Trains the language model and the label table."""

    name = "language"

    def __init__(self, scenes: int = 24, others: int = 16):
        self._scenes, self._others = scenes, others

    def learner(self, seed: int) -> "LanguageLearner":
        """Create the learner of a seed."""
        return LanguageLearner(seed, self._scenes, self._others)


class LanguageLearner:
    """State of the language stage for one seed."""

    def __init__(self, seed: int, scenes: int, others: int):
        self._seed, self._sizes = seed, ((SCENE, scenes), (OTHERS, others))
        self._model = build_model(seed)
        self.table = LabelTable(self._model)
        self.language_model = self._model.model.language_model
        self.modules = nn.ModuleDict({"language_model": self.language_model, "table": self.table})
        self.optimizers = Optimizers(dict(self.modules.named_parameters()), adam_gain=2.5)

    def loss(self, step: int, steps: int) -> Tensor:
        """Answer loss from a few patches with noisy labels; later steps include more of the background.

        Counting is learned last, and only if the fraction of patches per object is stable; the first half therefore
        uses a fixed number of patches.
        """
        shown = _FEWEST_SHOWN
        if step >= 0.55 * steps:
            shown = (28, 40, 72)[step % 3] if step < 0.9 * steps else (40, VISION_TOKENS)[step % 2]
        total = torch.zeros(())
        for kinds, size in self._sizes:
            batch = make_batch("train", self._seed, range(step * size, (step + 1) * size), kinds, drawn=False)
            total = total + self._batch_loss(batch, shown, step)
        return total / len(FAMILIES)

    @torch.no_grad()
    def evaluate(self, images: int) -> dict[str, float]:
        """Exact match in percent from all patches with clean labels."""
        self.modules.eval()
        matches: dict[str, list[bool]] = {family: [] for family in FAMILIES}
        everywhere = torch.arange(VISION_TOKENS)
        for start in range(0, images, 32):
            for kinds in (SCENE, OTHERS):
                batch = make_batch("validation", 0, range(start, start + 32), kinds, drawn=False)
                logits = answer_logits(self._model, self.table(batch.labels), everywhere.expand(32, -1), batch.pack)
                for family, right in exact_matches(logits, batch).items():
                    matches[family] += right
        return {family: 100 * sum(right) / len(right) for family, right in matches.items() if right}

    def _batch_loss(self, batch: Batch, shown: int, step: int) -> Tensor:
        where = shown_patches(batch.labels, shown, self._seed, step)
        labels = batch.labels.gather(1, where[..., None].expand(-1, -1, batch.labels.shape[-1]))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        labels = labels * (torch.rand(labels.shape, generator=generator) > 0.03)
        labels = labels + 0.05 * torch.randn(labels.shape, generator=generator)
        return answer_loss(answer_logits(self._model, self.table(labels), where, batch.pack), batch.pack)
