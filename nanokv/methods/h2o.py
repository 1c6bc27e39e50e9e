"""Keep the entries that have received the most attention so far, and the most recent ones.

Paper: H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv 2306.14048
Axis: token
Idea: Add up the attention probability that each entry has received from all queries since it came. Few entries collect
    most of it, and they go on doing so: keep these heavy hitters, and the newest entries, which had no time to collect.
Stores: the storage's entries, the token number of each, int32, and its accumulated probability `acc`, fp32; KV heads
    keep equally many, but different tokens.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 8) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it; the attention of all its queries is added
    up on the way, and all but `budget` entries per KV head go when its last token is in. Then every step attends to at
    most budget + 1 entries, adds its own attention and forgets one: at most `budget` live after a step. With
    online=False nothing is added or forgotten after the prompt, and each generated token adds one entry.
Differs: of the authors' three rules this is the one that really drops entries, step by step. It is defined for grouped
    queries: the probabilities of a query group are reduced, by their mean unless told, query by query, so that the sum
    does not depend on how the prompt was cut into parts. The recent share comes out of the budget; the paper splits
    evenly, as the default here does. Positions are kept as they were. Equal sums: the older entry stays.
"""

from dataclasses import dataclass

from nanokv.method import Evict, at_least, one_of


@dataclass
class H2O(Evict):
    """Heavy hitters and recent entries. budget: entries per KV head; recent: how many of them are the newest, a share
    if below 1, else a number; reduce: over a query group; online: add up and forget after the prompt too.
    """

    budget: int = 512
    recent: float = 0.5
    reduce: str = "mean"
    online: bool = True
    limits = {
        "budget": at_least(1),
        "recent": (lambda x: 0 <= x < 1 or 1 <= x < 1e9 and x == int(x), "a share below 1 or a whole number"),
        "reduce": one_of("mean", "max", "sum"),
    }

    def __post_init__(self):
        super().__post_init__()
        self.n_recent = int(self.recent) if self.recent >= 1 else round(self.recent * self.budget)
        if self.n_recent > self.budget:
            least = f"{self.n_recent}, the recent entries"
            raise ValueError(f"{self.name}: budget must be at least {least}, got {self.budget}")

    def after_part(self, cache, q, pos):
        cache.set_column("acc", cache.column("acc") + cache.paid(q, pos, self.reduce))

    def after_step(self, cache, q, pos):
        if self.online:
            self.after_part(cache, q, pos)
            super().after_step(cache, q, pos)

    def score(self, cache, q, pos):
        return cache.column("acc")
