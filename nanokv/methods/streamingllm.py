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

from dataclasses import dataclass

from nanokv.method import Policy, at_least


@dataclass
class StreamingLLM(Policy):
    """Sinks and a sliding window, renumbered. budget: entries per KV head."""

    budget: int = 1024
    n_sink: int = 4
    limits = {"budget": at_least(2), "n_sink": at_least(0)}
    renumbers = True

    def before_append(self, cache, n):
        over = [c + t - self.budget if t else 0 for c, t in zip(cache.counts, n, strict=True)]
        cache.drop_run(self.n_sink, [max(0, m) for m in over])

    def ahead(self, cache):
        return self.budget - cache.n_live
