"""Keep the entries that have received the most attention so far, and the most recent ones.

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048
Axis: token
Idea: Add up the attention probability that each entry has received from all queries since it came. Few entries collect
    most of it, and they go on doing so: keep these heavy hitters, and the newest entries, which had no time to collect.
Stores: the storage's entries, the token number of each, int32, and its accumulated probability `acc`, fp32; KV heads
    keep equally many, but different tokens. While a prompt is read also what its last part paid, fp32 per entry.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 8) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it; the attention of all its queries is added
    up on the way, and all but `budget` entries per KV head go when its last token is in. Then every step attends to at
    most budget + 1 entries, adds its own attention and forgets one: at most `budget` live after a step. With
    decode_update=False nothing is added or forgotten after the prompt, and each generated token adds one entry.
Differs: defined for grouped queries: the probabilities of a query group are reduced, by their mean unless told, query
    by query, so that the sum does not depend on how the prompt was cut into parts. The recent share comes out of the
    budget; the paper splits evenly, as the default here does. normalize divides by the number of queries that could
    see the entry, which old entries otherwise profit from, and protects n_sink first entries that would lose by it.
    Positions are kept as they were. Equal sums: the older entry stays. Attention that is added up is computed another
    way than `full`'s, also within the budget: results are equal but for rounding.
"""

from nanokv.attention import reduce_group
from nanokv.cache import Policy


class H2O(Policy):
    """Heavy hitters and recent entries. budget: entries per KV head; recent: how many of them are the newest, a share
    of the budget if below 1, else a number; reduce: over a query group, mean, max or sum; n_sink: only with normalize.
    """

    early = True

    def __init__(self, budget: int = 512, recent: float = 0.5, reduce: str = "mean", normalize: bool = False,
                 n_sink: int = 4, decode_update: bool = True):  # fmt: skip
        n_recent = int(recent) if recent >= 1 else round(recent * budget)
        least = max(1, n_recent + n_sink * normalize)
        for name, value, ok, what in (
            ("recent", recent, recent >= 0 and (recent < 1 or recent == n_recent), "a share below 1 or a whole number"),
            ("n_sink", n_sink, n_sink >= 0, "at least 0"),
            ("budget", budget, budget >= least, f"at least {least}, the recent entries and sinks"),
            ("reduce", reduce, reduce in ("mean", "max", "sum"), "mean, max or sum"),
        ):
            if not ok:
                raise ValueError(f"h2o: {name} must be {what}, got {value}")
        self.budget, self.n_recent, self.reduce, self.normalize = budget, n_recent, reduce, normalize
        self.n_sink, self.decode_update = n_sink * normalize, decode_update
        self.needs_probs, self.needs_sums = decode_update, reduce

    def most(self, prompt, new):
        return min(prompt + new, self.budget) if self.decode_update else min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        if cache.phase != "decode":
            new = cache.column("paid")
        elif self.decode_update:
            new = reduce_group(cache.step_probs, cache.config.n_kv_heads, self.reduce).sum(2)
        else:
            return
        cache.set_column("acc", cache.column("acc") + new)
        if cache.phase != "prompt" and cache.n_live > self.budget:
            self._evict(cache)

    def _evict(self, cache):
        """Forget all but the sinks, the newest and the heaviest of the others."""
        score = cache.column("acc")  # (B, Hkv, N)
        if self.normalize:
            newest = cache.token.masked_fill(~cache.live, -1).amax(-1, keepdim=True)  # (B, Hkv, 1)
            score = score / (newest + 1 - cache.token)  # every query since the entry came could see it
        cache.keep_best(score, self.budget, self.n_sink, self.n_recent)
