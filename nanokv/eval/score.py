"""Score caches through the decode path: read a prompt, compress it, feed what follows through the compressed cache.

One forward pass over everything would attend to the exact prompt and measure nothing; what follows is fed one token at
a time, since a method may act in single steps only. Several windows of text, or several questions, are read as one
batch: a sequence gets in it what it would get alone, and the weights, which a step of a small batch spends its time on,
are read once for all of them. Methods that leave a prompt alone until its end begin with what a full cache has read.
"""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from nanokv import KVCache
from nanokv.engine import prefill
from nanokv.method import Dense, Plan, Policy
from nanokv.packed import Packed

LAST = 64  # tokens that a method reads itself; no default observation window is longer
PART = 16  # tokens between looks at the bytes held
SIZES = ("held", "payload", "overhead", "full")


class Unrotated(Policy):
    """Hold keys before RoPE, so that another cache can be given them."""

    renumbers = True


class Prompt:
    """Prompts ids (B, C), of which all but the last tokens have been read, to begin many caches with."""

    def __init__(self, model, ids: Tensor, chunk: int = 512):
        self.model, self.ids, self.split = model, ids, max(0, ids.shape[1] - LAST)
        self.base = KVCache(model, [Unrotated()])
        for part in ids[:, : self.split].split(chunk, 1) if self.split else ():
            model(part, self.base, "prompt", last=True)

    def read(self, spec: str, more: Tensor | None = None) -> KVCache:
        """Return a cache of `spec` that has read the prompts, with `more` (B, T) at their end, and compressed them."""
        ids = self.ids if more is None else torch.cat([self.ids, more], 1)
        cache = KVCache(self.model, spec)
        if self.split and waits_for_the_end(cache):
            self._replay(cache)
            self.model(ids[:, self.split :], cache, "last", last=True)
        else:
            prefill(self.model, cache, ids)
        return cache

    def _replay(self, cache: KVCache) -> None:
        """Let a cache remember what was read, without computing it again."""
        pos = cache.begin(self.model, self.ids[:, : self.split], "prompt")
        for mine, its in zip(cache.layers, self.base.layers, strict=True):
            k, v = (t.unflatten(0, (its.B, -1)) for t in its.storage.read())
            mine.append(k, v, k.new_empty(its.B, self.split, 0), pos)
        cache.end()


def waits_for_the_end(cache: KVCache) -> bool:
    """Say whether a cache's methods leave a prompt alone, and its queries unseen, until its last tokens."""
    early = ("before_append", "before_attend", "after_part", "before_layer", "after_layer", "share")
    acts = any(hasattr(m, name) and overrides(type(m), name) for m in cache.policies for name in early)
    plain = type(cache.storage).store in (Dense.store, Packed.store)
    observes = max((m.observes for m in cache.policies), default=0) <= LAST
    return plain and observes and not (acts or cache.renumbers or cache.chunk or any(cache.config.windows))


def overrides(cls: type, name: str) -> bool:
    """Say whether a policy or plan acts at the moment of this name."""
    return getattr(cls, name) is not getattr(Plan if issubclass(cls, Plan) else Policy, name)


def follow(model, cache: KVCache, ids: Tensor) -> Iterator[Tensor]:
    """Feed ids (B, T) one by one, as generated text; yield log-probabilities fp32 (B, 1, vocab) for each."""
    for part in ids.split(1, 1):
        yield model(part, cache, "decode").float().log_softmax(-1)


class Text:
    """Windows of text ids (B, C + T), of which the first `context` = C tokens are the prompt, to score caches on."""

    def __init__(self, model, ids: Tensor, context: int):
        self.model, self.prompt = model, Prompt(model, ids[:, :context])
        self.rest, self.target = ids[:, context:-1], ids[:, context + 1 :]  # (B, T - 1) both
        self.exact = torch.cat(list(follow(model, self.prompt.read("full"), self.rest)), 1)  # (B, T - 1, vocab)
        self.full = _nll(self.exact, self.target).mean(1)  # (B,)

    def __call__(self, spec: str) -> list[dict]:
        """Return a record for each window, of tokens C + 1 to the end.

        nll and kl in nats per token, same (share of equal top tokens), rise (nll less the full cache's), parted (the
        first of these tokens where the top token differs, or None), and bytes: held, payload, overhead and full are
        means over the continuation, held_start and held_end are those before and after it.
        """
        cache, done, kl, same, nll = self.prompt.read(spec), 0, [], [], []
        sizes = [held(cache)]
        for other in follow(self.model, cache, self.rest):
            at = slice(done, done + other.shape[1])
            done, ref = at.stop, self.exact[:, at]
            kl.append((ref.exp() * (ref - other)).sum(-1))
            same.append(ref.argmax(-1) == other.argmax(-1))
            nll.append(_nll(other, self.target[:, at]))
            if done % PART == 0 or done == self.rest.shape[1]:
                sizes.append(held(cache))
        kl, same, nll = torch.cat(kl, 1).mean(1), torch.cat(same, 1), torch.cat(nll, 1).mean(1)
        size = {k: round(statistics.fmean(s[k] for s in sizes)) for k in SIZES}
        size |= {"held_start": sizes[0]["held"], "held_end": sizes[-1]["held"]}
        return [
            {"nll": float(nll[b]), "rise": float(nll[b] - self.full[b]), "kl": float(kl[b]),
             "same": float(row.float().mean()), "parted": int(row.byte().argmin()) if not row.all() else None, **size}
            for b, row in enumerate(same)
        ]  # fmt: skip


class Question:
    """Questions, tasks.Sample, of equal lengths, to score caches on in both modes."""

    def __init__(self, model, samples: list):
        self.model = model
        parts = ([getattr(s, name) for s in samples] for name in ("context", "question", "answer", "scored"))
        context, self.asked, self.answer, self.scored = (torch.tensor(ids) for ids in parts)  # (B, n) each
        self.prompt = Prompt(model, context)

    def length(self, mode: str) -> int:
        """Return how many tokens are compressed: the context, and in mode "aware" the question but its last token."""
        return self.prompt.ids.shape[1] + (self.asked.shape[1] - 1 if mode == "aware" else 0)

    def __call__(self, spec: str, mode: str) -> list[dict]:
        """Return a record for each question: exact (all right), right (share of the scored tokens), nll (per token).

        Bytes are those held when the prompt was compressed, before the rest of the question comes.
        """
        aware = mode == "aware"
        cache = self.prompt.read(spec, self.asked[:, :-1] if aware else None)
        size = held(cache)
        rest = torch.cat([self.asked[:, -1:] if aware else self.asked, self.answer[:, :-1]], 1)
        found = torch.cat(list(follow(self.model, cache, rest)), 1)[:, -self.answer.shape[1] :]
        right, nll = found.argmax(-1) == self.answer, _nll(found, self.answer)
        return [{"exact": bool(r[s].all()), "right": float(r[s].float().mean()), "nll": float(n[s].mean()), **size}
                for r, n, s in zip(right, nll, self.scored, strict=True)]  # fmt: skip


def _nll(logp: Tensor, target: Tensor) -> Tensor:
    return -logp.gather(-1, target[..., None])[..., 0]


def held(cache: KVCache) -> dict[str, int]:
    """Return bytes per sequence: held in all, payload, overhead (all else held), and what a full cache would hold."""
    total, B = cache.ledger()["total"], cache.B
    return {"held": total["held"] // B, "payload": total["payload"] // B,
            "overhead": (total["held"] - total["payload"]) // B, "full": total["full"] // B}  # fmt: skip
