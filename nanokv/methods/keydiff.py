"""Keep the entries whose keys are least like the average key.

Paper: KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments, arXiv 2504.15364
Axis: token
Idea: Most keys of a head point more or less the same way, and the few that do not tend to receive the attention. So
    forget the keys that have the highest cosine with the mean direction. Neither queries nor attention are needed, so a
    prompt can be cut while it is being read.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
Bytes: under `full`, once more than budget tokens were read: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots, whatever the length of the text.
Acts: the prompt is read exactly, so the first generated token sees all of it, and cut to `budget` entries per KV head
    when its last token is in. With block=128 the prompt is read in parts of 128 tokens (fewer where the engine reads
    fewer at once), each followed by a cut: no more than budget + block entries ever live, but later parts, and the
    first generated token, see what is left. Then every step attends to at most budget + 1 entries and forgets one, not
    the newest. With decode_update=False nothing is forgotten after the prompt, and each generated token adds one entry.
Differs: the authors read in blocks of 128; here this is an option, so that methods can be compared on the same prompt.
    Keys are compared as they are stored, rotated by their positions. The mean is taken anew of what lives at every cut.
    Nothing but the newest token of a step is protected unless n_sink and window say so. Equal cosines: the older entry
    stays.
"""

import torch

from nanokv.cache import Policy


class KeyDiff(Policy):
    """The most distinctive keys. budget: entries per KV head; block: prompt tokens between cuts, 0 for one cut at its
    end; n_sink, window: first and newest entries that stay; decode_update: forget after the prompt too.
    """

    def __init__(self, budget: int = 512, block: int = 0, n_sink: int = 0, window: int = 0, decode_update: bool = True):
        least = max(1, n_sink + window)
        for name, value, ok, what in (
            ("block", block, block >= 0, "at least 0"),
            ("n_sink", n_sink, n_sink >= 0, "at least 0"),
            ("window", window, window >= 0, "at least 0"),
            ("budget", budget, budget >= least, f"at least {least}, the sinks and the window"),
        ):
            if not ok:
                raise ValueError(f"keydiff: {name} must be {what}, got {value}")
        self.budget, self.n_sink, self.window, self.decode_update = budget, n_sink, window, decode_update
        self.chunk, self.early = block or None, block > 0
        self.padded = not block  # where a block ends decides what later ones see

    def most(self, prompt, new):
        return min(prompt + new, self.budget) if self.decode_update else min(prompt, self.budget) + new

    def __call__(self, cache, q, pos):
        acts = {"last": True, "prompt": self.chunk is not None, "decode": self.decode_update}[cache.phase]
        if acts and cache.n_live > self.budget:
            new = min(q.shape[2], self.budget - self.n_sink) if cache.phase == "decode" else 0
            self._cut(cache, max(self.window, new))

    def _cut(self, cache, n_recent):
        """Forget all but the sinks, the n_recent newest entries and the most distinctive of the others."""
        k, live = cache.read()[0].float(), cache.live
        length = k.norm(dim=-1).clamp(min=1e-12)  # (B, Hkv, N)
        anchor = torch.where(live, 1 / length, 0.0)[:, :, None] @ k  # the sum of unit keys; its direction matters
        cosine = (anchor @ k.mT)[:, :, 0] / length  # times the anchor's length, the same for all of a head
        cache.keep_best(-cosine, self.budget, self.n_sink, n_recent)
