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

from dataclasses import dataclass

from nanokv.attention import top
from nanokv.method import Plan


@dataclass
class AdaKV(Plan):
    """Share a layer's budget out among its KV heads by any policy's scores. alpha: the share of an even allocation that
    each head is sure of.
    """

    alpha: float = 0.2
    brings = ("snapkv", {})
    limits = {"alpha": (lambda x: 0 <= x <= 1, "from 0 to 1")}

    def shares(self, cache, score, policy):
        """Count each head's entries among the best of all heads."""
        fixed, Hkv = policy.n_sink + policy.n_recent, score.shape[1]
        among, b = cache.between(policy.n_sink, policy.n_recent).expand_as(score), policy.budget - fixed
        safe = top(score, int(self.alpha * b), among)
        flat = lambda t: t.transpose(1, 2).flatten(1)[:, None]  # one list per sequence, older slots first
        left = b * Hkv - safe.sum((1, 2)).view(-1, 1, 1)
        best = top(flat(score), left, flat(among & ~safe)).unflatten(-1, (-1, Hkv))[:, 0].transpose(1, 2)
        return ((safe | best).sum(-1) + fixed).flatten().tolist()
