"""Keep the most recent tokens and nothing else.

Paper: none; the usual sliding window, which arXiv 2309.17453 shows to fail as soon as the first tokens leave it.
Axis: token
Idea: Near tokens matter most. What this leaves out, the first tokens, on which trained models put the attention they
    have no use for, turns out to matter more: compare with streamingllm at the same budget.
Stores: budget entries per KV head in the storage's form, and the token number of each, int32.
Bytes: under `full`, once C = budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = C + max(16, C // 16) slots, whatever the length of the text. C of the slots hold live entries.
Acts: the prompt is read exactly, so the first generated token sees all of it, and is cut to its last C tokens when it
    is in. Then before every token is appended, so that C entries, the new one included, are attended to.
Differs: a model trained with a window also reads its prompt through it; this one does not. Positions are kept as they
    were. The same as streamingllm(n_sink=0, reindex=False).
"""

from nanokv.cache import Policy


class Window(Policy):
    """A sliding window without sinks. budget: entries per KV head."""

    def __init__(self, budget: int = 512):
        if budget < 1:
            raise ValueError(f"window: budget must be at least 1, got {budget}")
        self.budget = budget

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def before(self, cache, n_new):
        if cache.phase == "decode":
            cache.keep_ends(0, self.budget - n_new)

    def __call__(self, cache, q, pos):
        if cache.phase != "prompt":
            cache.keep_ends(0, self.budget)
