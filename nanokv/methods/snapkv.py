"""Keep what the last queries of the prompt look at, and the last tokens themselves.

Paper: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469
Axis: token
Idea: What the end of a prompt attends to is what the answer will attend to. Score each earlier entry by the attention
    of the last `window` queries, spread the scores to neighbours so that a hit survives with its context, and keep the
    best of each KV head, and the window.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
    While a prompt is being read also its last `window` queries.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most `budget` entries per KV head live, the window among them; each generated token adds one, until the
    next prompt ends and the same is done to all that lives.
Differs: selection is per KV head (the authors repeat keys first and select per query head); scores of a query group are
    reduced before they are pooled. Equal scores: the older entry stays. A budget below the window keeps the newest
    `budget` entries.
"""

from dataclasses import dataclass

from nanokv.attention import pool, reduce_group
from nanokv.method import Evict, at_least, one_of


@dataclass
class SnapKV(Evict):
    """Cut a prompt to budget entries per KV head. window: newest entries, which are kept and whose queries decide;
    kernel, pooling: how scores spread to neighbours; reduce: over a query group.
    """

    budget: int = 512
    window: int = 32
    kernel: int = 7
    pooling: str = "max"
    reduce: str = "mean"
    limits = {
        "budget": at_least(1),
        "window": at_least(1),
        "kernel": (lambda n: n >= 1 and n % 2, "odd"),
        "pooling": one_of("max", "avg"),
        "reduce": one_of("mean", "max", "sum"),
    }

    def __post_init__(self):
        super().__post_init__()
        self.observes = self.n_recent = min(self.window, self.budget)

    def score(self, cache, q, pos):
        s = reduce_group(cache.probs(q, pos).sum(2), cache.config.n_kv_heads, self.reduce)  # (B, Hkv, N)
        return pool(s, cache.between(0, self.n_recent).expand_as(s), self.kernel, self.pooling)
