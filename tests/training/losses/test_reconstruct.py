"""The reconstruction loss against a loop over tokens."""

import torch
import torch.nn.functional as F
from training.losses.gate_passes import (
    TOKENS,
    everything,
)
from training.losses.gate_rows import COUNTS, rows

from tpcompress.training.losses.reconstruct import Reconstruct, reconstruction_error

# ------------------------------------------------------------------ reconstruction


def reference_reconstruction(x, gate, temperature):
    n, mean = len(x), x.mean(0)
    scale = sum((t - mean).square().sum() for t in x) / n
    top = bottom = 0.0
    for d in range(n):
        weights = [
            0.0 if k == d else gate[k] * torch.exp(F.cosine_similarity(x[d], x[k], dim=0) / temperature)
            for k in range(n)
        ]
        rebuilt = sum(w * t for w, t in zip(weights, x, strict=True)) / sum(weights)
        top += (1 - gate[d]) * (rebuilt - x[d]).square().sum() / scale
        bottom += 1 - gate[d]
    return top / bottom


def test_reconstruction():
    here, _ = everything()
    x = here.trace.stages[0].view.vision_BVD.detach()
    terms = [reference_reconstruction(x[r, :n], rows(here)[r][0], 0.3) for r, n in enumerate(TOKENS)]
    torch.testing.assert_close(
        Reconstruct(temperature=0.3)(here, None), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5
    )
    hard = [(torch.arange(n) < k).float() for n, k in zip(TOKENS, COUNTS, strict=True)]
    terms = [reference_reconstruction(x[r, :n], hard[r], 0.3) for r, n in enumerate(TOKENS)]
    found = Reconstruct("values", temperature=0.3)(here, None)
    torch.testing.assert_close(found, torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)


def test_duplicates_cost_nothing_and_what_is_unique_is_worth_a_gate():
    x = torch.eye(4)[[0, 0, 1, 2]][None]  # the first two are equal
    valid = torch.ones(1, 4, dtype=torch.bool)
    kept = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert reconstruction_error(x, x, kept, valid) < 1e-6
    lost = torch.tensor([[1.0, 1.0, 1.0, 0.0]], requires_grad=True)
    error = reconstruction_error(x, x, lost, valid)
    assert error > 0.5
    error.sum().backward()
    assert lost.grad[0, 2:].max() < -1  # no other token can rebuild it, dropped or not
    assert lost.grad[0, :2].min() > -0.2
