"""Keep what the last queries of the prompt look at, and the last tokens themselves.

Paper: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469
Axis: token
Idea: What the end of a prompt attends to is what the answer will attend to. Score each earlier entry by the attention
    of the last `window` queries, spread the scores to neighbours so that a hit survives with its context, and keep the
    best of each KV head, and the window.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most `budget` entries per KV head live, the window among them; each generated token adds one, until the
    next prompt ends and the same is done to all that lives.
Differs: selection is per KV head (the authors repeat keys first and select per query head); scores of a query group are
    reduced before they are pooled. Equal scores: the older entry stays. A budget below the window keeps the newest
    `budget` entries.
"""

from nanokv.attention import window_scores
from nanokv.cache import Policy


class SnapKV(Policy):
    """Cut a prompt to budget entries per KV head. window: newest entries, which are kept and whose queries decide;
    kernel, pooling: how scores spread to neighbours, "max" or "avg"; reduce: over a query group, mean, max or sum.
    """

    def __init__(self, budget: int = 512, window: int = 32, kernel: int = 7, pooling: str = "max",
                 reduce: str = "mean"):  # fmt: skip
        for name, value, ok, what in (
            ("budget", budget, budget >= 1, "at least 1"),
            ("window", window, window >= 1, "at least 1"),
            ("kernel", kernel, kernel >= 1 and kernel % 2, "odd and at least 1"),
            ("pooling", pooling, pooling in ("max", "avg"), "max or avg"),
            ("reduce", reduce, reduce in ("mean", "max", "sum"), "mean, max or sum"),
        ):
            if not ok:
                raise ValueError(f"snapkv: {name} must be {what}, got {value}")
        self.budget, self.window = budget, min(window, budget)
        self.kernel, self.pooling, self.reduce = kernel, pooling, reduce
        self.observes = self.window

    def most(self, prompt, new):
        return min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        if cache.phase == "last" and cache.n_live > self.budget:
            score = window_scores(cache, self.window, self.kernel, self.pooling, self.reduce)
            cache.keep_best(score, self.budget, last=self.window)
