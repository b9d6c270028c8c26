"""Warm starts: losses by which scores imitate another rule, its scores or its choice.

B rows, V vision tokens.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.topk import standardise

FLOOR = -1e4
"""Logit of padding: its weight is 0, and nothing overflows in a row without a valid token."""


def imitation(scores_BV: Tensor, target_BV: Tensor, valid_BV: Tensor, temperature: float = 1.0) -> Tensor:
    """`choice_imitation` of a choice (bool), `score_imitation` of scores (real numbers)."""
    if target_BV.is_floating_point():
        return score_imitation(scores_BV, target_BV, valid_BV, temperature)
    return choice_imitation(scores_BV, target_BV, valid_BV)


def score_imitation(scores_BV: Tensor, target_BV: Tensor, valid_BV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(z(target) / T) || softmax(z(scores) / T)) over the tokens of a row, mean over rows.

    z standardises each row, so neither scale nor offset of either side matters; the lower T, the more the best tokens
    count. Listwise distillation as in ListNet (Cao et al., 2007, section 4.2). A row without a valid token counts 0.

    Args:
        scores_BV: what learns.
        target_BV: scores to imitate; no gradient reaches them.
        valid_BV: bool.
        temperature: T.

    Raises:
        ValueError: T is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"score_imitation needs a temperature above 0, got {temperature}; 1 is the default.")
    log_BV, target_log_BV = (
        (standardise(x_BV, valid_BV) / temperature).masked_fill(~valid_BV, FLOOR).log_softmax(1)
        for x_BV in (scores_BV, target_BV.detach())
    )
    kl_BV = F.kl_div(log_BV, target_log_BV, reduction="none", log_target=True).masked_fill(~valid_BV, 0.0)
    return kl_BV.sum(1).mean() * temperature**2


def choice_imitation(scores_BV: Tensor, keep_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """-mean over another rule's retained tokens of log softmax(scores), mean over rows.

    The cross-entropy of softmax(scores) to the uniform distribution over the choice: listwise, so every dropped token
    is pushed down as much as it stands out. A row that retains nothing counts 0.

    Args:
        scores_BV: what learns; as the selector sees them, standardised per row.
        keep_BV: bool, the choice.
        valid_BV: bool.
    """
    log_BV = scores_BV.float().masked_fill(~valid_BV, FLOOR).log_softmax(1)
    return -(log_BV.masked_fill(~keep_BV, 0.0).sum(1) / keep_BV.sum(1).clamp(min=1)).mean()
