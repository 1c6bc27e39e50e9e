"""Keep the entries whose keys are shortest.

Paper: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430
Axis: token
Idea: In trained models, keys with a small L2 norm tend to receive much attention, above all those of the first tokens.
    So the norm of a key says what to keep before any query has come, and no attention needs to be computed for it.
Stores: the storage's entries and the token number of each, int32; KV heads keep equally many, but different tokens.
Bytes: under `full`, after a prompt of T > budget tokens: held = S * Hkv * (2 * D * itemsize + 4) per layer with
    S = budget + max(16, budget // 16) slots. Every further token takes one slot more. Layers that are skipped hold all.
Acts: once, when the last token of a prompt is in; the prompt is read exactly, so the first generated token sees all of
    it. Then at most `budget` entries per KV head live; each generated token adds one, until the next prompt ends and
    the same is done to all that lives. With decode_update, the authors' rule, every step forgets one again.
Differs: a budget in entries; the authors keep a share. They leave the first two layers whole, where norm and attention
    do not go together; here all layers are cut unless skip_layers says otherwise, so that the budget is one. Norms are
    taken in fp32, as in bf16 most of them are equal; a rotation does not change them. Nothing is protected. Equal
    norms: the older entry stays.
"""

from dataclasses import dataclass

from nanokv.method import Evict, at_least


@dataclass
class Knorm(Evict):
    """The smallest keys. budget: entries per KV head; skip_layers: how many of the first layers are left whole;
    decode_update: forget after every generated token too.
    """

    budget: int = 512
    skip_layers: int = 0
    decode_update: bool = False
    limits = {"budget": at_least(1), "skip_layers": at_least(0)}

    def __post_init__(self):
        super().__post_init__()
        self.online = self.decode_update

    def most(self, prompt, new):
        return prompt + new if self.skip_layers else super().most(prompt, new)

    def after_prompt(self, cache):
        if cache.layer >= self.skip_layers:
            super().after_prompt(cache)

    def after_step(self, cache, q, pos):
        if cache.layer >= self.skip_layers:
            super().after_step(cache, q, pos)

    def score(self, cache, q, pos):
        return -cache.read()[0].float().norm(dim=-1)
