"""Small methods for tests: each uses one hook, or has one fault that a check of the contract must find."""

from dataclasses import dataclass

import tiny
import torch

from nanokv import attention
from nanokv.method import Dense, Evict, Plan, Policy
from nanokv.packed import Packed

# Who watches


class Against:
    """A recorder that notes how far each attention is from the reference over what is read."""

    def __init__(self):
        self.errors = []

    def attended(self, cache, q, pos, o):
        want = attention.reference(q, *cache.read(), cache.additive_mask(pos))
        self.errors.append(tiny.rms(o, want))

    def merged(self, cache, left, to):
        pass


class Diary:
    """A recorder, or a list of what happened: ("attended", layer), ("merged", layer, left, to), ("passed",)."""

    def __init__(self):
        self.told = []

    def attended(self, cache, q, pos, o):
        self.told.append(("attended", cache.layer, tuple(o.shape)))

    def merged(self, cache, left, to):
        self.told.append(("merged", cache.layer, left.tolist(), to.tolist()))

    def passed(self, cache):
        self.told.append(("passed", cache.phase))


# One hook each


@dataclass
class Newest(Policy):
    """Read the newest `budget` entries only, in prompts too if told so."""

    budget: int = 8
    prompts: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.selects_prompts = self.prompts

    def select(self, cache, q, pos):
        at = pos[:, None, :, None] if pos.dim() == 2 else pos[..., None]
        key = cache.pos[:, :, None]
        return ((key > at - self.budget) & (key <= at)).expand(cache.B, cache.config.n_kv_heads, -1, -1)


@dataclass
class Pages(Policy):
    """Let a step read, of each KV head, the `best` pages whose keys' bounds promise most, and what is no page yet."""

    best: int = 2
    page: int = 8

    def select(self, cache, q, pos):
        whole = torch.tensor([n // self.page for n in cache.n_slots]).view(cache.B, -1, 1)
        P = int(whole.max())
        if P <= self.best:
            return None
        k = cache.read()[0][:, :, : P * self.page].unflatten(2, (P, self.page))
        low, high = (bound[:, :, None, None] for bound in (k.amin(3), k.amax(3)))  # (B, Hkv, 1, 1, P, D)
        q = q.unflatten(1, (cache.config.n_kv_heads, -1)).unsqueeze(-2)  # (B, Hkv, G, T, 1, D)
        promise = torch.maximum(q * low, q * high).sum(-1).amax(2)  # (B, Hkv, T, P)
        promise = promise.masked_fill(torch.arange(P) >= whole[..., None], -torch.inf)
        chosen = torch.zeros_like(promise, dtype=torch.bool).scatter(-1, promise.topk(self.best, -1).indices, True)
        chosen = torch.nn.functional.pad(chosen.repeat_interleave(self.page, -1), (0, cache.N - P * self.page))
        return chosen | (torch.arange(cache.N) >= whole[..., None] * self.page)

    def ahead(self, cache):
        return 1  # a page's bounds know the tokens of a draft


@dataclass
class Louder(Policy):
    """Multiply the values of what has come, before anybody looks at them."""

    factor: float = 2.0

    def before_attend(self, cache, x, pos):
        T = x.shape[1]
        k, v = (t[:, :, -T:] for t in cache.read())
        assert torch.equal(cache.attn.v_proj(x).unflatten(-1, (-1, v.shape[-1])).transpose(1, 2), v)
        index = torch.arange(cache.N - T, cache.N).expand(cache.B, cache.config.n_kv_heads, -1)
        cache.write(index, k, self.factor * v)


@dataclass
class Oldest(Evict):
    """Keep the oldest entries after a prompt."""

    budget: int = 16

    def score(self, cache, q, pos):
        return -cache.rank.float().expand(cache.B, 1, -1)


@dataclass
class Log(Policy):
    """Note when it acts, in a list that all copies share."""

    def __post_init__(self):
        super().__post_init__()
        self.acted = []

    def after_prompt(self, cache):
        self.acted.append(cache.layer)


@dataclass
class Backwards(Plan):
    """Turn every score round."""

    def rescore(self, cache, score, policy):
        return -score


@dataclass
class Pairs(Plan):
    """Let every second layer read what the one before it holds."""

    def share(self, config):
        return [i - i % 2 for i in range(config.n_layers)]


@dataclass
class OnlyFirst(Plan):
    """Hold the first layer's entries as they are, and the others' as the storage does."""

    def storages(self, config, kept):
        return [Dense(), *kept[1:]]


@dataclass
class Every(Plan):
    """From layer `first` on read each `nth` token of a prompt, counted from its end, and nothing else."""

    first: int = 1
    nth: int = 2

    def before_layer(self, cache, i, x, pos):
        if i == self.first and cache.phase in ("prompt", "last") and x.shape[1] > 1:
            some = slice((x.shape[1] - 1) % self.nth, None, self.nth)
            return x[:, some], pos[:, some]
        return x, pos


@dataclass
class LastOnly(Plan):
    """Let only the prompt's last token go on after layer `i`."""

    layer: int = 0

    def after_layer(self, cache, i, x, pos):
        return (x[:, -1:], pos[:, -1:]) if i == self.layer and cache.phase == "last" else (x, pos)


@dataclass
class Tidies(Plan):
    """After each generated token forget the entry of this rank in all layers, when all have read it."""

    rank: int = 3

    def __post_init__(self):
        super().__post_init__()
        self.told = []

    def after_pass(self, cache):
        self.told.append((cache.phase, list(cache.next_position), [layer.n_live for layer in cache.layers]))
        for layer in cache.layers if cache.phase == "decode" else ():
            layer.keep(layer.rank != self.rank)

    def ahead(self, cache):
        return 1


@dataclass
class LooksAgain(Plan):
    """When a prompt has ended, read it a second time, and keep the `budget` entries that this attends to most."""

    budget: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.logits = []

    def after_pass(self, cache):
        if cache.phase != "last":
            return
        self.logits.append(cache.model(torch.stack(cache.ids).long(), cache, "draft"))
        score = []
        for layer in cache.layers:
            *_, pos, q = layer.draft
            score.append(layer.paid(layer.rope(q, pos), pos, "mean"))
        cache.accept(0)
        for layer, s in zip(cache.layers, score, strict=True):
            if self.budget:
                layer.keep_best(s[..., : layer.N], self.budget)


@dataclass
class Skips(Plan):
    """Leave a layer out."""

    layer: int = 1

    def before_layer(self, cache, i, x, pos):
        return None if i == self.layer else (x, pos)


@dataclass
class Rounded(Packed):
    """Hold packed numbers as whole ones, and with `repair` what that leaves out."""

    n_sink: int = 2
    residual: int = 8
    repair: bool = False

    def encode(self, x, which, at):
        assert len(at.head) == len(at.sequence) == len(x)
        return {"x": x.round().flatten(1)}

    def correct(self, x, decoded, at):
        return {"error": (x - decoded).flatten(1)} if self.repair else None

    def decode(self, fields, which, at):
        x = fields["x"] + fields.get("error", 0.0)
        return x.unsqueeze(1)


@dataclass
class Joint(Packed):
    """Hold all KV heads of a token side by side, as they are."""

    n_sink: int = 1
    residual: int = 8
    joint = True

    def encode(self, x, which, at):
        self.widths = {x.shape[-1]}
        return super().encode(x, which, at)


@dataclass
class MergesOldest(Policy):
    """After a prompt put the mean of the two oldest entries into the second one, and forget the first."""

    def after_prompt(self, cache):
        k, v = cache.read()
        left = torch.zeros(cache.B, cache.config.n_kv_heads, 1, dtype=torch.int64)
        cache.merge(left, left + 1, k[:, :, :2].mean(2, keepdim=True), v[:, :, :2].mean(2, keepdim=True))
        cache.keep(cache.rank > 0)


# One fault each


@dataclass
class Sleeps(Policy):
    """Never act."""


@dataclass
class Forgets(Policy):
    """Forget a token while the prompt is being read."""

    def before_attend(self, cache, x, pos):
        cache.keep(cache.token != 3)


@dataclass
class Rounds(Dense):
    """Attend to other values than those that are read."""

    def attend(self, q, pos, cache):
        k, v = cache.read()
        return attention.attend(q, k, v.bfloat16().to(v.dtype), *cache.mask(pos))


class Peeks(Policy):
    """Change what all earlier tokens see by what comes last."""

    def before_attend(self, cache, x, pos):
        if cache.N > 1:
            index = torch.zeros(cache.B, cache.config.n_kv_heads, 1, dtype=torch.int64)
            k, v = (t[:, :, -1:] for t in cache.read())
            cache.write(index, k, v)


@dataclass
class CountsParts(Policy):
    """Keep fewer entries the more parts a prompt was read in."""

    def after_part(self, cache, q, pos):
        cache.notes["parts"] = cache.notes.get("parts", 0) + 1

    def after_prompt(self, cache):
        cache.keep_best(-cache.rank.float(), max(8, 40 - cache.notes["parts"]))


@dataclass
class Boasts(Policy):
    """Promise to keep less than it does."""

    def most(self, prompt, new):
        return min(prompt + new, 10)


@dataclass
class Hides(Dense):
    """Hold a tensor that the ledger does not know of."""

    def reset(self, cache):
        super().reset(cache)
        self.more = Box(torch.zeros(100))


class Box:
    """Hold something."""

    def __init__(self, held):
        self.held = held


@dataclass
class Mixes(Policy):
    """Keep fewer entries the larger the batch."""

    def after_prompt(self, cache):
        cache.keep_best(-cache.rank.float(), 30 // cache.B)


@dataclass
class Promises(Policy):
    """Forget at every step, and say that it never does."""

    def after_step(self, cache, q, pos):
        cache.keep(cache.rank != 3)

    def ahead(self, cache):
        return None


class Remembers(Policy):
    """Keep its state in itself, where copies share it."""

    n = 0

    def after_step(self, cache, q, pos):
        self.n += 1
        if self.n % 7 == 0:
            cache.keep(cache.rank != 3)
