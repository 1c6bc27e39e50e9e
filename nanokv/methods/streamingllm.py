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
Differs: the authors' perplexity script feeds a text token by token, and their chat demo reads a prompt in one piece,
    once it has made room; here parts of a quarter window give each token at least three quarters of the window to look
    back on.
"""

from dataclasses import dataclass

from nanokv.method import Policy, at_least


@dataclass
class StreamingLLM(Policy):
    """Sinks and a sliding window. budget: entries per KV head; n_sink: of them, first ones; reindex: positions inside
    the cache, else original.
    """

    budget: int = 1024
    n_sink: int = 4
    reindex: bool = True
    limits = {"budget": at_least(1), "n_sink": at_least(0)}

    def __post_init__(self):
        super().__post_init__()
        if self.budget <= self.n_sink:
            raise ValueError(f"{self.name}: budget must be at least n_sink + 1 = {self.n_sink + 1}, got {self.budget}")
        self.renumbers = self.reindex
        self.chunk = max(1, (self.budget - self.n_sink) // 4) if self.reindex else None

    @property
    def protects(self):
        return self.n_sink, self.budget - self.n_sink

    def check(self, config):
        if self.reindex and self.budget > config.context:
            raise ValueError(f"{self.name}: budget must be at most the model's context, {config.context}")

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def before_append(self, cache, n):
        if self.reindex or cache.phase == "decode":
            cache.drop_run(self.n_sink, [c + t - self.budget for c, t in zip(cache.counts, n, strict=True)])

    def after_prompt(self, cache):
        cache.drop_run(self.n_sink, [c - self.budget for c in cache.counts])

    def after_step(self, cache, q, pos):
        self.after_prompt(cache)  # a step of more tokens than there is room for

    def ahead(self, cache):
        return max(0, self.budget - cache.n_live)
