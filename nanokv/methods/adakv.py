"""Share one layer's budget out among its KV heads by their scores: heads with flat attention get more.

Paper: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550
Axis: head, token
Idea: A head that looks at few entries needs few. Put the scores of all KV heads of a layer into one list and keep its
    best, which loses the least attention mass that a layer's budget allows. Each head is sure of a share `alpha` of
    what it would get evenly, in case the scores mislead.
Stores: the storage's entries and the token number of each, int32, for every KV head as many as it was given.
Bytes: under `full`, after a prompt of T > budget tokens: held = sum over KV heads h of
    (S_h + max(16, S_h // 16)) * (2 * D * itemsize + 4) per layer, where the S_h average to `budget`. Every further
    token takes one slot more per KV head.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most Hkv * budget entries live in a layer; a KV head has at least window + g of them, and so at most
    Hkv * budget - (Hkv - 1) * (window + g), g the entries that are safe beyond the window. Each generated token adds
    one per KV head, until the next prompt ends.
Differs: scores as in SnapKV, per KV head, with the group reduced before pooling. variant "guard": each head's
    best floor(alpha * (budget - window)) entries are safe, the rest of the layer's budget goes to the best of all other
    entries. "kvpress": the same, but the window counts among the floor(alpha * budget) that are safe. "mix" is the
    authors' rule, the average of an even and a free allocation with weights alpha and 1 - alpha; where they round each
    head for itself, largest remainders keep the sum. Equal scores: the older entry, then the lower head, stays. A
    budget below the window keeps the newest `budget` entries of each head.
"""

import torch

from nanokv.attention import window_scores
from nanokv.cache import Policy, top


def all_heads(t):
    """Lay t (B, Hkv, N) out as one list per sequence, (B, 1, N * Hkv), older slots first."""
    return t.transpose(1, 2).flatten(1)[:, None]


class AdaKV(Policy):
    """Cut a prompt to budget entries per KV head on average. alpha: the share of an even allocation that each head is
    sure of; variant: guard, mix or kvpress; window, kernel, pooling and reduce as in SnapKV.
    """

    def __init__(self, budget: int = 512, window: int = 32, alpha: float = 0.2, kernel: int = 7, pooling: str = "max",
                 reduce: str = "mean", variant: str = "guard"):  # fmt: skip
        for name, value, ok, what in (
            ("budget", budget, budget >= 1, "at least 1"),
            ("window", window, window >= 1, "at least 1"),
            ("alpha", alpha, 0 <= alpha <= 1, "from 0 to 1"),
            ("kernel", kernel, kernel >= 1 and kernel % 2, "odd and at least 1"),
            ("pooling", pooling, pooling in ("max", "avg"), "max or avg"),
            ("reduce", reduce, reduce in ("mean", "max", "sum"), "mean, max or sum"),
            ("variant", variant, variant in ("guard", "mix", "kvpress"), "guard, mix or kvpress"),
        ):
            if not ok:
                raise ValueError(f"adakv: {name} must be {what}, got {value}")
        self.budget, self.window, self.alpha = budget, min(window, budget), alpha
        self.kernel, self.pooling, self.reduce, self.variant = kernel, pooling, reduce, variant
        self.observes = self.window

    def most(self, prompt, new):
        return min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        if cache.phase == "last" and cache.n_live > self.budget:
            score = window_scores(cache, self.window, self.kernel, self.pooling, self.reduce)
            old = cache.between(0, self.window).expand_as(score)
            cache.keep((self._mix if self.variant == "mix" else self._guard)(score, old) | ~old)

    def _guard(self, score, old):
        """Return which of the old entries stay, bool (B, Hkv, N), some of each head before all others."""
        b = self.budget - self.window
        g = int(self.alpha * b) if self.variant == "guard" else max(0, int(self.alpha * self.budget) - self.window)
        safe = top(score, g, old)
        left = b * score.shape[1] - safe.sum((1, 2)).view(-1, 1, 1)
        return safe | self._best(score, left, old & ~safe)

    def _mix(self, score, old):
        """Return which of the old entries stay: (1 - alpha) * free + floor(alpha * even) per head, rounded."""
        n = (self.budget - self.window) * score.shape[1]
        free = self._best(score, n, old).sum(-1, keepdim=True).double()  # (B, Hkv, 1)
        order = torch.argsort(score.masked_fill(~old, -torch.inf), dim=-1, descending=True, stable=True)
        place = torch.argsort(order, dim=-1)
        # the share less the place falls by one from a head's best entry to its next, so the n highest are the shares
        # rounded, largest remainders first; the even part, the same for all heads, makes no difference to that
        return self._best((1 - self.alpha) * free - place, n, old)

    def _best(self, score, n, among):
        """Return the n best of all heads' entries together, bool (B, Hkv, N)."""
        best = top(all_heads(score), n, all_heads(among))
        return best.unflatten(-1, (-1, score.shape[1]))[:, 0].transpose(1, 2)
