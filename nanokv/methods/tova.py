"""Forget what the newest token attends to least, step by step.

Paper: Transformers are Multi-State RNNs, arXiv 2401.06104
Axis: token
Idea: Look at the cache as the state of an RNN, of fixed size. When it is full, drop the token that the current query
    attends to least, on the average of all heads. Nothing is added up and nothing has a right to stay: sinks and recent
    tokens survive where they are attended to.
Stores: the storage's entries and the token number of each, int32. All KV heads of a layer keep the same tokens.
    While a prompt is being read also its last query.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it; all but `budget` entries per KV head go
    when its last token is in, by that token's attention. Then every step attends to at most budget + 1 entries and
    forgets one: at most `budget` live after a step. With online=False nothing is forgotten after the prompt, and each
    generated token adds one entry.
Differs: the newest entry always stays; in the authors' code it competes. Where other methods have left the KV heads of
    a sequence with different tokens, each is judged by its own query heads. Several tokens in one step count as one:
    the last one's attention decides. Positions are kept as they were. Equal attention: the older entry stays.
"""

from dataclasses import dataclass

from nanokv.attention import reduce_group
from nanokv.method import Evict, at_least


@dataclass
class TOVA(Evict):
    """The last query decides, on the average of all heads. budget: entries per KV head; online: forget after the prompt
    too.
    """

    budget: int = 512
    online: bool = True
    limits = {"budget": at_least(1)}
    observes = n_recent = 1

    def score(self, cache, q, pos):
        p = cache.probs(q[:, :, -1:], pos[..., -1:])[:, :, 0]  # (B, H, N)
        token, every = cache.token, p.mean(1, keepdim=True)
        if token.shape[1] == 1:
            return every
        same = (token == token[:, :1]).flatten(1).all(1)  # (B,): a slot is one token, whichever head
        return every.where(same[:, None, None], reduce_group(p, cache.config.n_kv_heads, "mean"))
