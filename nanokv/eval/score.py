"""Score caches through the decode path: read a prompt, compress it, feed what follows through the compressed cache.

One forward pass over everything would attend to the exact prompt and measure nothing. All methods of a unit (a window
of text, a question) share the reading of the prompt where they can: those that leave it alone until its last tokens
take over what a full cache has read (KVCache.adopt) and read the last LAST tokens themselves.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanokv import KVCache
from nanokv.engine import prefill

LAST = 128  # tokens that a method reads itself; more than any default observation window


class Prompt:
    """A prompt ids (1, C), of which a full cache has read all but the last tokens, to begin many caches with."""

    def __init__(self, model, ids: Tensor, chunk: int | None = None):
        self.model, self.ids = model, ids
        self.base, self.split = KVCache(model), max(0, ids.shape[1] - LAST)
        if self.split:
            self.base._prompt_left = ids.shape[1] + 1  # the base never sees the end
            for part in ids[:, : self.split].split(chunk or 512, 1):
                model(part, self.base, last=True)

    def read(self, spec: str, more: Tensor | None = None) -> KVCache:
        """Return a cache of `spec` that has read the prompt, with `more` (1, T) at its end, and compressed it."""
        ids = self.ids if more is None else torch.cat([self.ids, more], 1)
        cache = KVCache(self.model, spec)
        late = self.split and not any(m.early or m.renumbers for m in cache.methods) and not any(cache.config.windows)
        if not late or max(cache.observes, 1) > LAST:
            prefill(self.model, cache, ids)
            return cache
        with cache.prompt(ids.shape[1] - self.split):
            cache.adopt(self.base)
            self.model(ids[:, self.split :], cache, last=True)
        return cache


def follow(model, cache: KVCache, ids: Tensor, chunk: int) -> Iterator[Tensor]:
    """Feed ids (1, T) as generated text, `chunk` tokens at a time; yield log-probabilities fp32 (t, vocab) per part.

    Methods that forget in every step, which `most` tells, get single tokens as in use: how many entries the tokens of a
    part see would depend on whether a method makes room before or after it.
    """
    n = cache.next_position
    if any(m.most(n, 64) < m.most(n, 0) + 64 for m in cache.methods):
        chunk = 1
    with cache.decoding():
        for part in ids.split(min(chunk, cache.chunk or chunk), 1):
            yield model(part, cache)[0].float().log_softmax(-1)


def text(
    model, specs: list[str], ids: Tensor, context: int, chunk: int = 16, tick: Callable = lambda: None
) -> Iterator:
    """Yield (spec, record) for ids (1, T), of which the first `context` tokens are the prompt.

    The record holds, over tokens context + 1 to the end: nll and kl (nats per token), same (share of equal top tokens),
    rise (nll less the full cache's), parted (the first of these tokens where the top token differs, or None), and the
    bytes held at the end.
    """
    prompt, rest = Prompt(model, ids[:, :context]), ids[:, context:-1]
    target = ids[0, context + 1 :]
    exact = torch.cat(list(follow(model, prompt.read("full"), rest, chunk)))  # (T, vocab)
    full = _nll(exact, target)
    for spec in specs:
        cache, done, kl, same, nll = prompt.read(spec), 0, [], [], []
        for other in follow(model, cache, rest, chunk):
            ref, goal = exact[done : done + len(other)], target[done : done + len(other)]
            done += len(other)
            kl.append((ref.exp() * (ref - other)).sum(-1))
            same.append(ref.argmax(-1) == other.argmax(-1))
            nll.append(_nll(other, goal))
        kl, same, nll = torch.cat(kl), torch.cat(same), torch.cat(nll)
        miss = (~same).nonzero()
        yield spec, {
            "nll": float(nll.mean()), "rise": float(nll.mean() - full.mean()), "kl": float(kl.mean()),
            "same": float(same.float().mean()), "parted": int(miss[0]) if len(miss) else None, **held(cache),
        }  # fmt: skip
        tick()


def question(model, specs: list[str], sample, chunk: int = 16, tick: Callable = lambda: None) -> Iterator:
    """Yield (spec, mode, record) for a tasks.Sample: exact (all right), right (share of tokens), nll (per token)."""
    context, asked, answer = (torch.tensor([ids]) for ids in (sample.context, sample.question, sample.answer))
    prompt = Prompt(model, context)
    for spec in specs:
        for mode in ("agnostic", "aware"):
            cache = prompt.read(spec, asked[:, :-1] if mode == "aware" else None)
            size = held(cache)
            rest = torch.cat([asked[:, -1:] if mode == "aware" else asked, answer[:, :-1]], 1)
            found = torch.cat(list(follow(model, cache, rest, chunk)))[-answer.shape[1] :]
            right = found.argmax(-1) == answer[0]
            yield spec, mode, {
                "exact": bool(right.all()), "right": float(right.float().mean()),
                "nll": float(_nll(found, answer[0]).mean()), **size,
            }  # fmt: skip
            tick()


def _nll(logp: Tensor, target: Tensor) -> Tensor:
    return -logp.gather(-1, target[:, None])[:, 0]


def held(cache: KVCache) -> dict[str, int]:
    """Return bytes: held in all, payload, overhead (all else that is held), and what a full cache would hold."""
    total = cache.ledger()["total"]
    return {"held": total["held"], "payload": total["payload"], "overhead": total["held"] - total["payload"],
            "full": total["full"]}  # fmt: skip
