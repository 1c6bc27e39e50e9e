"""Keep the first few tokens and the most recent ones, and number them as if nothing lay between.

Paper: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453
Axis: token
Idea: Softmax must put its spare probability somewhere, and trained models put it on the first tokens, whatever these
    say. Keep those sinks and a recent window. Positions are counted inside the cache, so that no query is ever further
    from a key than the cache is long: text may go on for ever.
Stores: budget entries per KV head in the storage's form, keys un-rotated (rotated with reindex=False), and the token
    number of each, int32.
Bytes: under `full`, once C = budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = C + max(16, C // 16) slots, whatever the length of the text. C of the slots hold live entries.
Acts: before every token is appended, so that C entries, the new one included, are attended to. The prompt is read in
    parts of at most (C - n_sink) / 4 tokens in the same way, so its early tokens see no more than a cache of C: the
    first generated token sees a compressed prompt. With reindex=False the prompt is read whole, with full attention,
    and cut to C afterwards.
Differs: the paper feeds a prompt token by token; parts of a quarter window give each token at least three quarters of
    the window to look back on.
"""

from nanokv.cache import Policy


class StreamingLLM(Policy):
    """Sinks and a sliding window. budget: entries per KV head; reindex: positions inside the cache, else original."""

    def __init__(self, budget: int = 1024, n_sink: int = 4, reindex: bool = True):
        if n_sink < 0:
            raise ValueError(f"streamingllm: n_sink must be at least 0, got {n_sink}")
        if budget <= n_sink:
            raise ValueError(f"streamingllm: budget must be at least n_sink + 1 = {n_sink + 1}, got {budget}")
        self.budget, self.n_sink, self.renumbers = budget, n_sink, reindex
        self.early = reindex
        self.padded = not reindex  # where a part of the prompt ends decides what its tokens see
        self.chunk = max(1, (budget - n_sink) // 4) if reindex else None

    def check(self, config):
        if self.renumbers and self.budget > config.context:
            raise ValueError(f"streamingllm: budget must be at most the model's context, {config.context}")

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def before(self, cache, n_new):
        if self.renumbers or cache.phase == "decode":
            cache.keep_ends(self.n_sink, self.budget - n_new - self.n_sink)

    def __call__(self, cache, q, pos):
        if cache.phase == "last" or (cache.phase == "decode" and q.shape[2] > 1) or self.renumbers:
            cache.keep_ends(self.n_sink, self.budget - self.n_sink)
