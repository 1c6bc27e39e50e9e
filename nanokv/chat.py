"""Conversations over one living cache, and a full cache that runs beside another one for comparison."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanokv.cache import KVCache
from nanokv.engine import generate, prefill

MARK = "\N{WHITE SQUARE}reply\N{WHITE SQUARE}"  # stands for a reply in a template, to find what follows one


class Conversation:
    """Turns that share a cache: what was said stays in it and is never read again.

    Goes on where `cache` stands, so that a saved conversation continues. Each turn ends as a prompt does, which is when
    most policies act.
    """

    def __init__(self, model, tokenizer, cache: KVCache, system: str | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.unread: list[int] = []  # the last token of a reply that was cut short is not in the cache yet

    def ids(self, text: str) -> list[int]:
        """Return the tokens to read for a user's next message: what is unread, the end of the last turn, this one.

        ValueError where the template makes no such text.
        """
        user = {"role": "user", "content": text}
        if not self.cache.B:
            return self.tokenizer.encode(self.tokenizer.chat([*self.system, user]))
        before = [*self.system, {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}]
        _, found, after = self.tokenizer.chat([*before, user]).partition(MARK)
        if not found:
            raise ValueError("the chat template leaves out or alters what was said before, so that turns cannot follow")
        return self.unread + self.tokenizer.encode(after)

    def say(self, text: str, max_new_tokens: int = 200, **options) -> Iterator[int]:
        """Read a message and yield the tokens of the reply; options as in `generate`. May be left at any token."""
        ids, start, reply = self.ids(text), self._read(), []
        try:
            for token in generate(self.model, self.cache, ids, max_new_tokens, **options):
                reply.append(token)
                yield token
        finally:
            if self._read() > start:
                self.unread = reply[self._read() - start - len(ids) :]

    def reset(self) -> None:
        """Forget the conversation."""
        self.cache.reset()
        self.unread = []

    def settle(self) -> None:
        """Read what is unread, so that the cache holds the whole conversation: before it is saved."""
        for token in self.unread:
            self.model(torch.tensor([[token]]), self.cache, last=True)
        self.unread = []

    def _read(self) -> int:
        return self.cache.next_position[0] if self.cache.B else 0


class Beside:
    """Run the full cache on the same tokens and note how far the predictions part. Give it as `watch` to `generate`.

    `before` (n,) are the tokens that the other cache has read already, see `KVCache.ids`.
    """

    def __init__(self, model, before: Tensor | None = None):
        self.model, self.cache = model, KVCache(model, "full")
        if before is not None:
            prefill(model, self.cache, before[None])
        self.kl: list[float] = []  # nats, KL(full || other), after the prompt and after every token
        self.same: list[bool] = []  # do both find the same token likeliest?

    def __call__(self, ids: Tensor, logits: Tensor) -> None:
        """Read ids (1, T) too and compare the prediction with logits (1, vocab)."""
        exact = prefill(self.model, self.cache, ids)[0].double().log_softmax(-1)
        other = logits[0].double().log_softmax(-1)
        self.kl.append(float((exact.exp() * (exact - other)).sum()))
        self.same.append(bool(exact.argmax() == other.argmax()))

    @property
    def parted(self) -> int | None:
        """Return the index of the first new token at which greedy text would part, or None."""
        return self.same.index(False) if False in self.same else None
