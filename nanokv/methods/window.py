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

from dataclasses import dataclass

from nanokv.method import Policy, at_least


@dataclass
class Window(Policy):
    """A sliding window without sinks. budget: entries per KV head."""

    budget: int = 512
    limits = {"budget": at_least(1)}

    @property
    def protects(self):
        return 0, self.budget

    def most(self, prompt, new):
        return min(prompt + new, self.budget)

    def before_append(self, cache, n):
        if cache.phase == "decode":
            cache.drop_run(0, [c + t - self.budget for c, t in zip(cache.counts, n, strict=True)])

    def after_prompt(self, cache):
        cache.drop_run(0, [c - self.budget for c in cache.counts])

    def after_step(self, cache, q, pos):
        self.after_prompt(cache)  # a step of more tokens than the window holds

    def ahead(self, cache):
        return max(0, self.budget - cache.n_live)
