"""RESTORE: merge into what any pruner retains, with positions and attention set right (after arXiv 2606.01711)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import Composed, places
from tpcompress.pruners.gate_components import Choice
from tpcompress.pruners.greedy import cosines
from tpcompress.pruners.merging import group_sizes, merge_groups, nearest_kept
from tpcompress.pruners.topk import keep_topk, rank

WEIGHTS = ("mean", "similarity")
PLACES = ("median", "own")


class Restore(Composed):
    """S = what `pruner` retains of floor((1 - anchors) budget) tokens; the rest of it goes to the best of the others by

    R_i (1 - max_{j: R_j > R_i} cos(x_i, x_j)),  R_i = sum over j of cos(x_i, x_j)   (`distinctive`).

    Each dropped token joins the most similar anchor (without a share: the most similar retained token), and
      merge      x_s = mean of its group (`weights: mean`), or weighted by max(0, cos) (`similarity`);
      position   that of the group's median token (`place: median`) or its own (`own`);
      attention  log(size of the group) added to the logits of its key after the stage, with `proportional`.

    A `pruner` that learns trains through it as through `merged`; its scores are put in the order own choice, anchors,
    rest, so that its gates close around what is retained.

    needs  what `pruner` needs.     gives  keep_BV, scores_BV, vision_BVD, place_BV with median, size_BV with
    proportional.
    Paper: around DivPrune, VisPruner or HoloV, with anchors = 0.5 as in the official code; 64 of LLaVA-1.5's 576
    tokens, before the language model; positions of the full sequence, the median for merged tokens.
    Cost: that of `pruner`, one product of anchors with all tokens, and one to average; with anchors one V x V Gram
    matrix.
    Unlike the official code: attention there is log(size (c - D(m - n))), D the decay of rotary embedding with the
    distance of a query m to the token n. That differs from query to query, and a `Selection` weighs a key alike for all
    of them; what is left is the size. The paper names the distance its larger part, so this is less than its method.
    Ours: `anchors: 0`, where a pruner's own choice serves as the anchors, and any share but one half;
    `similarity` weights; the earlier of two equal R or median tokens; 1-D order for the median of a grid; a token
    unlike all more central ones counts as uncovered (the paper's masked maximum), there its negative cosine counts.
    """

    name = "restore"
    paper = "2606.01711"
    merges = True
    only_rank = True
    group = "merging"
    paper_plan = """
    # RESTORE around DivPrune: 32 of LLaVA-1.5's 576 tokens as DivPrune picks them, and 32 distinctive anchors that
    # hold the means of all others, at the median positions of their groups, with attention in proportion to their
    # sizes.
    stages:
      - {pruner: restore, layer: 0, keep_tokens: 64}
    """
    test_arguments = (
        {"weights": "similarity", "place": "own", "proportional": False},
        {"anchors": 0.0},
        {"anchors": 0.25},
        {"anchors": 0.9, "pruner": {"type": "random", "seed": 3, "resample": False}},
        {"pruner": {"type": "learned_gate", "scorer": "linear"}},
        {"anchors": 0.25, "pruner": {"type": "learned_gate", "applier": "gather"}},
    )

    def __init__(
        self,
        pruner: Pruner | str | dict[str, Any] = "divprune",
        anchors: float = 0.5,
        weights: str = "mean",
        place: str = "median",
        proportional: bool = True,
    ) -> None:
        super().__init__(pruner=pruner)
        if not 0 <= anchors < 1:
            raise ValueError(f"restore needs 0 <= anchors < 1, a share of the budget, got {anchors}.")
        for argument, given, known in (("weights", weights, WEIGHTS), ("place", place, PLACES)):
            if given not in known:
                raise ValueError(f"restore has no {argument} '{given}'; choose one of {', '.join(known)}.")
        self.differentiable = self.parts[0].differentiable
        self.uses_token_sizes = proportional or place == "median"
        self.anchors, self.weights, self.place, self.proportional = anchors, weights, place, proportional
        self.adopt()
        self.trains_through_model = True

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        x_BVD, valid_BV, most = tokens.vision_BVD, tokens.valid_BV, int(num_keep_B.max())
        own_B = self._own(num_keep_B)
        if self.learned:
            choice = self.chosen(tokens, num_keep_B)
            own_BV = keep_topk(choice.scores_BV.detach(), valid_BV, own_B)
            # Noise of a selector in training may leave an anchor out.
            anchor_BV = self._anchors(tokens, own_BV, num_keep_B - own_B)[0] & choice.keep_BV
        else:
            own = self.select_with(self.parts[0], tokens, own_B)
            anchor_BV, worth_BV = self._anchors(tokens, own.keep_BV, num_keep_B - own_B)
            above_B1 = own.scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True) + 1
            choice = Choice(own.keep_BV | anchor_BV, torch.where(anchor_BV, above_B1 + worth_BV, own.scores_BV))
        keep_BV = choice.keep_BV
        target_BV = torch.where(anchor_BV.any(1, keepdim=True), anchor_BV, keep_BV)
        group_BV, similar_BV = nearest_kept(x_BVD, target_BV, valid_BV & (target_BV | ~keep_BV), most)
        weight_BV = self.member_weights(tokens, choice)
        if self.weights == "similarity":
            weight_BV = similar_BV.clamp(min=0) * (1 if weight_BV is None else weight_BV)
        return self.with_values(
            tokens,
            choice,
            merge_groups(x_BVD, group_BV, keep_BV, most, weight_BV),
            size_BV=group_sizes(group_BV).clamp(min=1).float() if self.proportional else None,
            place_BV=median_member(group_BV) if self.place == "median" else None,
        )

    def order(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        """The learned part's own share first, then the anchors, then the rest."""
        own_B = self._own(num_keep_B)
        own_BV = keep_topk(scores_BV, tokens.valid_BV, own_B)
        anchor_BV, worth_BV = self._anchors(tokens, own_BV, num_keep_B - own_B)
        place_BV = rank(torch.where(anchor_BV, worth_BV, scores_BV), tokens.valid_BV)
        return places(2 - 2 * own_BV.long() - anchor_BV.long() + 2 * (~tokens.valid_BV).long(), place_BV)

    def _own(self, num_keep_B: Tensor) -> Tensor:
        """The share of the budget that the inner rule has."""
        return (num_keep_B * (1 - self.anchors) + 1e-4).long().clamp(min=1)

    def _anchors(self, tokens: TokenView, own_BV: Tensor, num_B: Tensor) -> tuple[Tensor, Tensor]:
        """The best `num` anchors beside the inner rule's own choice, bool (B, V), and what each token is worth."""
        if not self.anchors:
            return torch.zeros_like(own_BV), torch.zeros(own_BV.shape, device=own_BV.device)
        rest_BV = tokens.valid_BV & ~own_BV
        worth_BV = distinctive(tokens.vision_BVD.detach(), rest_BV)
        return keep_topk(worth_BV, rest_BV, num_B), worth_BV


@torch.no_grad()
def distinctive(x_BVD: Tensor, valid_BV: Tensor) -> Tensor:
    """How central and how little covered each token is: R_i (1 - max(0, max_{j: R_j > R_i} C_ij)).

    Args:
        x_BVD: features (B, V, D); C_ij is their cosine.
        valid_BV: bool (B, V): the tokens that are looked at.

    Returns:
        fp32 (B, V), R_i = sum of C_ij over all j, i among them; the earlier of equal R counts as the larger, so that of
        equal tokens one is covered. Meaningless where not valid.
    """
    similar_BVV = cosines(x_BVD).masked_fill(~valid_BV[:, None], 0.0)
    central_BV = similar_BVV.sum(-1, dtype=torch.float64).float()
    place_BV = rank(central_BV, valid_BV)
    stronger_BVV = (place_BV[:, None] < place_BV[..., None]) & valid_BV[:, None]
    covered_BV = similar_BVV.masked_fill(~stronger_BVV, 0.0).amax(-1).clamp(min=0)
    return central_BV * (1 - covered_BV)


def median_member(group_BV: Tensor) -> Tensor:
    """int64 (B, V): for the token that a group goes by its median member, the earlier of two; for others themselves."""
    B, V = group_BV.shape
    itself_BV = torch.arange(V, device=group_BV.device).expand(B, V)
    member_BV = group_BV.argsort(dim=1, stable=True)
    size_BV = group_sizes(group_BV)
    middle_BV = size_BV.cumsum(1) - size_BV + (size_BV - 1).clamp(min=0) // 2
    return torch.where(size_BV > 0, member_BV.gather(1, middle_BV.clamp(max=V - 1)), itself_BV)
