"""Forget what the newest token attends to least, step by step.

Paper: Transformers are Multi-State RNNs, arXiv 2401.06104
Axis: token
Idea: Look at the cache as the state of an RNN, of fixed size. When it is full, drop the token that the current query
    attends to least, on the average of all heads. Nothing is added up and nothing has a right to stay: sinks and recent
    tokens survive where they are attended to.
Stores: the storage's entries and the token number of each, int32. All KV heads of a layer keep the same tokens.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it; all but `budget` entries per KV head go
    when its last token is in, by that token's attention. Then every step attends to at most budget + 1 entries and
    forgets one: at most `budget` live after a step. With decode_update=False nothing is forgotten after the prompt, and
    each generated token adds one entry.
Differs: the newest entry always stays; with protect_last=False it competes, as the authors have it. heads="kv_head"
    averages over each query group alone, so that KV heads keep tokens of their own; so does every sequence whose heads
    other methods have left with different tokens. Several tokens in one step count as one: the last one's attention
    decides. Positions are kept as they were. Equal attention: the older entry stays. Steps compute attention another
    way than `full`'s, also within the budget: results are equal but for rounding.
"""

from nanokv.attention import reduce_group
from nanokv.cache import Policy


class TOVA(Policy):
    """The last query decides. budget: entries per KV head; heads: average over the "layer" or each "kv_head";
    protect_last: the newest entry stays; decode_update: forget after the prompt too.
    """

    observes = 1

    def __init__(self, budget: int = 512, heads: str = "layer", protect_last: bool = True, decode_update: bool = True):
        if budget < 1:
            raise ValueError(f"tova: budget must be at least 1, got {budget}")
        if heads not in ("layer", "kv_head"):
            raise ValueError(f"tova: heads must be layer or kv_head, got {heads}")
        self.budget, self.heads, self.protect_last = budget, heads, protect_last
        self.decode_update = self.needs_probs = decode_update

    def most(self, prompt, new):
        return min(prompt + new, self.budget) if self.decode_update else min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        acts = cache.phase == "last" or (cache.phase == "decode" and self.decode_update)
        if acts and cache.n_live > self.budget:
            p = cache.probs(*cache.observed(1)) if cache.phase == "last" else cache.step_probs  # (B, H, T, N)
            cache.keep_best(self._score(cache, p[:, :, -1]), self.budget, last=int(self.protect_last))

    def _score(self, cache, p):
        """Average attention p (B, H, N) over heads: (B, Hkv, N), or (B, 1, N) where all rows hold the same tokens."""
        token = cache.token
        if self.heads == "layer" and token.shape[1] == 1:
            return p.mean(1, keepdim=True)
        score = reduce_group(p, cache.config.n_kv_heads, "mean")
        if self.heads == "kv_head":
            return score
        same = (token == token[:, :1]).flatten(1).all(1)  # (B,): a slot is one token, whichever head
        return score.mean(1, keepdim=True).where(same[:, None, None], score)
