"""Score caches through the decode path: read a prompt, compress it, feed what follows through the compressed cache.

One forward pass over everything would attend to the exact prompt and measure nothing. Several windows of text, or
several questions, of the same length are read as one batch: a sequence gets in it what it would get alone, and the
weights, which a step of a small batch spends its time on, are read once for all of them. All methods share the reading
of the prompt where they can: those that leave it alone until its last tokens take over what a full cache has read
(KVCache.adopt), those that only take notes while it is read take over what the same method has read at another budget.
"""

import statistics
from collections.abc import Iterator

import torch
from torch import Tensor

from nanokv import KVCache
from nanokv.engine import prefill

LAST = 64  # tokens that a method reads itself; no default observation window is longer
CHUNK = 64  # tokens fed at once behind a prompt, where that is the same as one by one
PART = 16  # the same for storages that pack at the end of a pass
SIZES = ("held", "payload", "overhead", "full")


class Prompt:
    """Prompts ids (B, C), of which a full cache has read all but the last tokens, to begin many caches with."""

    def __init__(self, model, ids: Tensor, chunk: int = 512):
        self.model, self.ids, self.chunk, self.split = model, ids, chunk, max(0, ids.shape[1] - LAST)
        self.base, self.begun = KVCache(model), (None, None)
        if self.split:
            self._begin(self.base)

    def read(self, spec: str, more: Tensor | None = None) -> KVCache:
        """Return a cache of `spec` that has read the prompts, with `more` (B, T) at their end, and compressed them."""
        ids = self.ids if more is None else torch.cat([self.ids, more], 1)
        cache = KVCache(self.model, spec)
        early = any(m.early for m in cache.methods)
        alone = any(m.renumbers or m.chunk for m in cache.methods)  # forgets while it reads
        if not self.split or alone or any(cache.config.windows) or max(cache.observes, 1) > LAST:
            prefill(self.model, cache, ids)
            return cache
        with cache.prompt(ids.shape[1] - self.split):
            self._take_over(cache) if early else cache.adopt(self.base)
            self.model(ids[:, self.split :], cache, last=True)
        return cache

    def _begin(self, cache: KVCache) -> None:
        cache._prompt_left = self.ids.shape[1] + 1  # so that it never sees the end
        for part in self.ids[:, : self.split].split(self.chunk, 1):
            self.model(part, cache, last=True)

    def _take_over(self, cache: KVCache) -> None:
        """Give cache what the same methods have read and noted at any budget: nothing is cut before the end."""
        like = [(m.name, {k: v for k, v in m.parameters.items() if k != "budget"}) for m in cache.methods]
        if self.begun[0] != like:
            first = KVCache(self.model, cache.spec)
            self._begin(first)
            self.begun = like, first
        copy, fresh = self.begun[1].clone(), cache.layers
        cache.layers, cache.next_position = copy.layers, copy.next_position
        for mine, own in zip(cache.layers, fresh, strict=True):
            mine.policies = own.policies
            mine.belong(cache)


def follow(model, cache: KVCache, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Feed ids (B, T) as generated text, `chunk` tokens at a time; yield log-probabilities fp32 (B, t, vocab) per part.

    Methods that forget in every step, which `most` tells, get single tokens as in use: how many entries the tokens of a
    part see would depend on whether a method makes room before or after it. Storages that pack after a pass get 16.
    """
    n = cache.next_position
    if cache.storage.name != "full":
        chunk = min(chunk, PART)
    if any(m.most(n, 64) < m.most(n, 0) + 64 for m in cache.methods):
        chunk = 1
    with cache.decoding():
        for part in ids.split(min(chunk, cache.chunk or chunk), 1):
            yield model(part, cache).float().log_softmax(-1)


class Text:
    """Windows of text ids (B, C + T), of which the first `context` = C tokens are the prompt, to score caches on."""

    def __init__(self, model, ids: Tensor, context: int, chunk: int = CHUNK):
        self.model, self.chunk, self.prompt = model, chunk, Prompt(model, ids[:, :context])
        self.rest, self.target = ids[:, context:-1], ids[:, context + 1 :]  # (B, T - 1) both
        self.exact = torch.cat(list(follow(model, self.prompt.read("full"), self.rest, chunk)), 1)  # (B, T - 1, vocab)
        self.full = _nll(self.exact, self.target).mean(1)  # (B,)

    def __call__(self, spec: str) -> list[dict]:
        """Return a record for each window, of tokens C + 1 to the end.

        nll and kl in nats per token, same (share of equal top tokens), rise (nll less the full cache's), parted (the
        first of these tokens where the top token differs, or None), and bytes: held, payload, overhead and full are
        means over the continuation, held_start and held_end are those before and after it.
        """
        cache, done, kl, same, nll = self.prompt.read(spec), 0, [], [], []
        sizes = [held(cache)]
        for other in follow(self.model, cache, self.rest, self.chunk):
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

    def __init__(self, model, samples: list, chunk: int = CHUNK):
        self.model, self.chunk = model, chunk
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
        found = torch.cat(list(follow(self.model, cache, rest, self.chunk)), 1)[:, -self.answer.shape[1] :]
        right, nll = found.argmax(-1) == self.answer, _nll(found, self.answer)
        return [{"exact": bool(r[s].all()), "right": float(r[s].float().mean()), "nll": float(n[s].mean()), **size}
                for r, n, s in zip(right, nll, self.scored, strict=True)]  # fmt: skip


def _nll(logp: Tensor, target: Tensor) -> Tensor:
    return -logp.gather(-1, target[..., None])[..., 0]


def held(cache: KVCache) -> dict[str, int]:
    """Return bytes per sequence: held in all, payload, overhead (all else held), and what a full cache would hold."""
    total, B = cache.ledger()["total"], cache.layers[0].B
    return {"held": total["held"] // B, "payload": total["payload"] // B,
            "overhead": (total["held"] - total["payload"]) // B, "full": total["full"] // B}  # fmt: skip
