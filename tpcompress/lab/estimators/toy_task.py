"""A toy retrieval task of 24 tokens that shows in seconds on one core whether a gate learns.

Four tokens of an image are facts: the sum of a key, a value and a flag. The other twenty are distractors: they have a
key and a value, too, but another flag. A query gives the key of one fact; the answer is its value. The model that
answers is trained on all tokens and then frozen, so that only a pruner can learn which four of the 24 tokens matter.

B samples, V vision tokens, D width, S = V + 1 positions, N facts, K retained slots, C values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.bundled import PACKAGE
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import slots, take

WEIGHTS = PACKAGE / "assets" / "retrieval.npz"
WIDTH, HEADS, LAYERS = 48, 4, 2
TOKENS, FACTS, KEYS, VALUES = 24, 4, 8, 8
FLAG, NOISE = 0.45, 0.9
"""Size of the flag that separates facts from distractors, weak on purpose, and of the noise on every token."""
KEEP = 5
"""Tokens that a pruner keeps: the facts and one more."""
DENSE_STEPS, DENSE_BATCH, DENSE_RATE = 1600, 64, 2e-3


@dataclass(frozen=True)
class Samples:
    """Images with a question each.

    Attributes:
        image_BVD: tokens before the projector.
        query_B: key of the fact in question.
        answer_B: its value.
        fact_BV: bool, which tokens are facts.
    """

    image_BVD: Tensor
    query_B: Tensor
    answer_B: Tensor
    fact_BV: Tensor


@dataclass(frozen=True)
class World:
    """The vectors that all images are made of: one per key, per value and per flag."""

    keys: Tensor
    values: Tensor
    flags: Tensor

    @classmethod
    def make(cls) -> World:
        """The same vectors at every call."""
        generator = torch.Generator().manual_seed(0)
        keys, values, flags = (torch.randn(n, WIDTH, generator=generator) for n in (KEYS, VALUES, 2))
        return cls(keys, values, FLAG * flags)

    def draw(self, batch: int, generator: torch.Generator) -> Samples:
        """Draw images with a question each.

        Args:
            batch: number of images.
            generator: source of the random numbers.
        """
        key_BV = torch.randint(KEYS, (batch, TOKENS), generator=generator)
        value_BV = torch.randint(VALUES, (batch, TOKENS), generator=generator)
        place_BN = torch.rand(batch, TOKENS, generator=generator).argsort(1)[:, :FACTS]
        named_BN = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :FACTS]  # keys of facts are distinct
        key_BV = key_BV.scatter(1, place_BN, named_BN)
        fact_BV = torch.zeros(batch, TOKENS, dtype=torch.bool).scatter(1, place_BN, True)
        noise_BVD = NOISE * torch.randn(batch, TOKENS, WIDTH, generator=generator)
        image_BVD = self.keys[key_BV] + self.values[value_BV] + self.flags[(~fact_BV).long()] + noise_BVD
        asked_B1 = torch.randint(FACTS, (batch, 1), generator=generator)
        answer_BN = value_BV.gather(1, place_BN)
        return Samples(
            0.5 * image_BVD, named_BN.gather(1, asked_B1)[:, 0], answer_BN.gather(1, asked_B1)[:, 0], fact_BV
        )


class Block(nn.Module):
    """Pre-norm attention and MLP; values may be gated and keys biased, as in the layers after a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.between = nn.RMSNorm(WIDTH, eps=1e-6)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor, gate_BS: Tensor, bias_BSS: Tensor) -> Tensor:
        """Causal attention under `bias_BSS`, with every value multiplied by its gate."""
        query_BSD, key_BSD, value_BSD = self.qkv(self.before(x_BSD)).chunk(3, -1)
        value_BSD = value_BSD * gate_BS[..., None]
        query, key, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query_BSD, key_BSD, value_BSD))
        logits_BHSS = query @ key.mT / math.sqrt(query.shape[-1]) + bias_BSS[:, None]
        read_BSD = (logits_BHSS.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x_BSD = x_BSD + self.out(read_BSD)
        return x_BSD + self.down(F.gelu(self.up(self.between(x_BSD))))


class RetrievalModel(nn.Module):
    """A projector and a small causal decoder over [vision tokens, query], without position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(WIDTH, WIDTH)
        self.query = nn.Embedding(KEYS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, VALUES)

    def forward(
        self, vision_BVD: Tensor, query_B: Tensor, gate_BV: Tensor | None = None, bias_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Answer.

        Args:
            vision_BVD: tokens after the projector, all of them or the retained ones.
            query_B: key of the fact in question.
            gate_BV: factors on the values of vision tokens in every layer.
            bias_BV: terms added to the attention logits of their keys in every layer.

        Returns:
            logits (B, C), and the input of the head (B, D)
        """
        x_BSD = torch.cat([vision_BVD, self.query(query_B)[:, None]], 1)
        B, S, _ = x_BSD.shape
        gate_BS = x_BSD.new_ones(B, S) if gate_BV is None else F.pad(gate_BV, (0, 1), value=1.0)
        bias_BSS = x_BSD.new_full((S, S), -torch.inf).triu(1).expand(B, S, S)
        if bias_BV is not None:
            # A token still attends to itself, as in DynamicViT, so that no row of the softmax is empty.
            off_SS = 1 - torch.eye(S)
            bias_BSS = bias_BSS + F.pad(bias_BV, (0, 1))[:, None] * off_SS
        for block in self.blocks:
            x_BSD = block(x_BSD, gate_BS, bias_BSS)
        last_BD = self.norm(x_BSD[:, -1])
        return self.head(last_BD), last_BD


@dataclass(frozen=True)
class Answered:
    """The output of a model on samples.

    Attributes:
        logits_BC: logits over the values.
        hidden_BD: input of the head.
        view, selection: input and output of the pruner; None without one.
    """

    logits_BC: Tensor
    hidden_BD: Tensor
    view: TokenView | None = None
    selection: Selection | None = None


def answer(
    model: RetrievalModel, samples: Samples, pruner: Pruner | None = None, keep: int = KEEP, full_length: bool = False
) -> Answered:
    """Run the model with a pruner between projector and decoder, as a stage of `insertion` does.

    Args:
        model: the frozen model.
        samples: images and questions.
        pruner: the pruner; None keeps all tokens.
        keep: tokens to retain.
        full_length: keep all tokens if the pruner returns gates (mode `mask`); else gather the retained ones.
    """
    vision_BVD = model.projector(samples.image_BVD)
    if pruner is None:
        return Answered(*model(vision_BVD, samples.query_B))
    view = TokenView.of(vision_BVD, (4, TOKENS // 4), soft=full_length)
    selection = pruner(view, torch.full((len(vision_BVD),), keep))
    if selection.vision_BVD is not None:
        vision_BVD = selection.vision_BVD
    gate_BV, bias_BV = selection.value_gate_BV, selection.key_bias_BV
    if not (full_length and selection.gate_BV is not None):
        longest = int(selection.keep_BV.sum(1).max())
        index_BK, chosen_BK = slots(selection.keep_BV, longest)
        vision_BVD = take(vision_BVD, index_BK)
        gate_BV = None if gate_BV is None else gate_BV.gather(1, index_BK)
        bias_BV = torch.zeros_like(chosen_BK, dtype=torch.float32) if bias_BV is None else bias_BV.gather(1, index_BK)
        bias_BV = bias_BV.masked_fill(~chosen_BK, -1e4)
    logits_BC, hidden_BD = model(vision_BVD, samples.query_B, gate_BV, bias_BV)
    return Answered(logits_BC, hidden_BD, view, selection)


@torch.no_grad()
def hard_scores(
    model: RetrievalModel, pruner: Pruner | None, batch: int = 1024, keep: int = KEEP, seed: int = 1
) -> tuple[float, float]:
    """Share of right answers on gathered tokens, and share of the facts that were retained.

    Args:
        model: the frozen model.
        pruner: the pruner, set to eval mode meanwhile; None keeps all tokens.
        batch: number of samples.
        keep: tokens to retain.
        seed: seed of the samples.
    """
    samples = World.make().draw(batch, torch.Generator().manual_seed(seed))
    training = pruner is not None and pruner.training
    if pruner is not None:
        pruner.eval()
    done = answer(model, samples, pruner, keep)
    if pruner is not None:
        pruner.train(training)
    right = (done.logits_BC.argmax(-1) == samples.answer_B).float().mean()
    kept_BV = samples.fact_BV if done.selection is None else samples.fact_BV & done.selection.keep_BV
    return right.item(), kept_BV.sum().item() / samples.fact_BV.sum().item()


def train_dense(steps: int = DENSE_STEPS, seed: int = 0) -> RetrievalModel:
    """Train the model on all tokens; under a minute.

    Args:
        steps: steps of AdamW, with warm-up and linear decay.
        seed: seed of weights and images.
    """
    generator, world = torch.Generator().manual_seed(seed), World.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RetrievalModel()
    optimizer = torch.optim.AdamW(model.parameters(), DENSE_RATE, weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = DENSE_RATE * min(1, (step + 1) / 100) * max(0.05, 1 - step / steps)
        samples = world.draw(DENSE_BATCH, generator)
        loss = F.cross_entropy(answer(model, samples).logits_BC, samples.answer_B)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def save_weights(model: RetrievalModel, path: Path = WEIGHTS) -> None:
    """Write the weights in half precision."""
    halves = {name: value.half().numpy() for name, value in model.state_dict().items()}
    np.savez_compressed(path, **halves)


def load_model(path: Path = WEIGHTS) -> RetrievalModel:
    """The trained model, frozen.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No weights at {path}; run scripts/build_retrieval.py to train the model.")
    with np.load(path) as stored:
        state: dict[str, Any] = {name: torch.from_numpy(stored[name]).float() for name in stored.files}
    with torch.device("meta"):  # skips the initialisation of weights that are replaced
        model = RetrievalModel()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()
