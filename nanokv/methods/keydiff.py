"""Keep the entries whose keys are least like the average key.

Paper: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments, arXiv 2504.15364
Axis: token
Idea: Most keys of a head point more or less the same way, and the few that do not tend to receive the attention. So
    forget the keys that have the highest cosine with the mean direction. Neither queries nor attention are needed.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it, and cut to `budget` entries per KV head
    when its last token is in. Then every step attends to at most budget + 1 entries and forgets one, not the newest.
    With online=False nothing is forgotten after the prompt, and each generated token adds one entry.
Differs: the authors read in blocks of 128, each followed by a cut, so that later parts of a prompt see what is left;
    here prompts are read whole, so that methods can be compared on the same prompt. Keys are compared as they are
    stored, rotated by their positions. The mean is taken anew of what lives at every cut. Nothing but the newest token
    of a step is protected. Equal cosines: the older entry stays.
"""

from dataclasses import dataclass

import torch

from nanokv.method import Evict, at_least


@dataclass
class KeyDiff(Evict):
    """The most distinctive keys. budget: entries per KV head; online: forget after the prompt too."""

    budget: int = 512
    online: bool = True
    limits = {"budget": at_least(1)}

    def after_step(self, cache, q, pos):
        if self.online and self._room(cache) < 0:
            newest = min(q.shape[2], self.budget)  # the step's own
            cache.keep_best(self.score(cache, q, pos), self._shares(cache), last=newest)

    def score(self, cache, q, pos):
        k = cache.read()[0].float()
        length = k.norm(dim=-1).clamp(min=1e-12)  # (B, Hkv, N)
        anchor = torch.where(cache.live, 1 / length, 0.0)[:, :, None] @ k  # the sum of unit keys; its direction matters
        return -(anchor @ k.mT)[:, :, 0] / length  # times the anchor's length, the same for all of a head
