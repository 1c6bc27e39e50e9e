"""Reading a prompt in parts, the decode loop, and choosing the next token."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nanokv.cache import KVCache

CHUNK = 2048  # prompt tokens per pass in fp32, twice as many in 16 bits: bounds activations, keeps a processor busy


def prefill(
    model, cache: KVCache, ids: Tensor, chunk: int | None = None, progress: Callable | None = None, pads=None
) -> Tensor:
    """Read a prompt ids (B, T) in parts of at most `chunk` tokens (None: see CHUNK); return the last logits (B, vocab).

    The cache treats the parts as one prompt. `progress` is called with the number of tokens read after each part.
    `pads` are the tokens of padding at the beginning of each sequence.
    """
    chunk = chunk or CHUNK * 4 // model.embed.weight.element_size()
    step = min(c for c in (chunk, cache.chunk, ids.shape[1]) if c)
    with cache.prompt(ids.shape[1], pads):
        for part in ids.split(step, dim=1):
            logits = model(part, cache, last=True)
            if progress:
                progress(part.shape[1])
    return logits[:, -1]


def generate(model, cache: KVCache, ids, max_new_tokens: int = 128, **options) -> Iterator[int]:
    """Read the prompt `ids` (a list of token ids) into the cache and yield the tokens that follow, one at a time.

    Ends after max_new_tokens, before a token of `stop`, or when the model's context is full (never, where the cache
    renumbers). Unless a stop token ended the text, the last token yielded has not been read into the cache: pass it
    first to go on. Options and errors are those of `generate_batch`.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() > 1 and len(ids) != 1:
        raise ValueError(f"generate continues one prompt, not {len(ids)}; use generate_batch")
    for (token,) in generate_batch(model, cache, [ids.flatten().tolist()], max_new_tokens, **options):
        yield token


def generate_batch(
    model,
    cache: KVCache,
    prompts: list[list[int]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Iterable[int] = (),
    chunk: int | None = None,
    progress: Callable | None = None,
    watch: Callable | None = None,
) -> Iterator[list[int | None]]:
    """Continue several prompts together; yield per step one token for each, None for those that have ended.

    With max_new_tokens 0 the prompts are read, and that is all.

    Each sequence gets what it would get alone (a method that cannot promise this refuses prompts of unequal lengths).
    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off; with a seed, every sequence draws as
    it would alone. `watch` is called after every pass with the ids that were read (B, T), padding included, and the
    logits that follow them (B, vocab). Raises ValueError for an empty or too long prompt and for options out of range.
    """
    longest = max(map(len, prompts), default=0)
    _check(cache, min(map(len, prompts), default=0), longest, temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 0 or (chunk is not None and chunk < 1):
        raise ValueError("max_new_tokens must be at least 0, and chunk at least 1")
    if bad := [t for p in prompts for t in p if not (isinstance(t, int) and 0 <= t < model.config.vocab)]:
        raise ValueError(f"a token id must be a whole number from 0 to {model.config.vocab - 1}, got {bad[0]}")
    pads = [longest - len(p) for p in prompts]
    device = model.embed.weight.device
    ids = torch.tensor([[0] * n + list(p) for n, p in zip(pads, prompts, strict=True)], device=device)
    seen = [set(p) if repetition_penalty != 1 else set() for p in prompts]
    stop, done = set(stop), [False] * len(prompts)
    draws = [_generator(seed) if temperature > 0 else None for _ in prompts]
    logits = prefill(model, cache, ids, chunk, progress, pads)
    for i in range(max_new_tokens):
        if i > 0:
            if not cache.renumbers and cache.next_position >= cache.config.context:
                return
            logits = model(ids, cache, last=True)[:, -1]
        if watch:
            watch(ids, logits)
        tokens = []
        for b, row in enumerate(logits):
            token = sample(row, temperature, top_k, top_p, min_p, repetition_penalty, seen[b], draws[b])
            done[b] = done[b] or token in stop
            tokens.append(None if done[b] else token)
            seen[b].add(token)
        if all(done):
            return
        yield tokens
        ids = torch.tensor([[token or 0] for token in tokens], device=device)


def _generator(seed: int | None) -> torch.Generator:
    rng = torch.Generator()
    rng.seed() if seed is None else rng.manual_seed(seed)
    return rng


def _check(cache, shortest, n, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    if shortest == 0:
        raise ValueError("the prompt is empty")
    context = cache.config.context
    if not cache.renumbers and cache.next_position + n > context:
        held = f" after the {cache.next_position} already read" if cache.next_position else ""
        raise ValueError(
            f"the prompt has {n} tokens{held}, the model's context {context}; methods that renumber positions, "
            "such as streamingllm, have no such limit"
        )
    for name, ok, what in (
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k >= 0, "at least 0"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= min_p < 1, "at least 0 and below 1"),
        ("repetition_penalty", 0.01 <= repetition_penalty <= 100, "from 0.01 to 100"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {what}")


def sample(logits: Tensor, temperature, top_k, top_p, min_p, repetition_penalty, seen, rng) -> int:
    """Choose a token from logits (vocab,); `seen` are the ids that the repetition penalty applies to.

    The penalty divides positive logits and multiplies negative ones (arXiv 1909.05858); then temperature, top-k,
    top-p (the fewest tokens whose mass reaches top_p) and min-p (at least min_p times the likeliest), in this order.
    """
    logits = logits.float().cpu()
    if repetition_penalty != 1 and seen:
        at = torch.tensor(sorted(seen))
        old = logits[at]
        logits = logits.index_copy(0, at, torch.where(old > 0, old / repetition_penalty, old * repetition_penalty))
    if temperature == 0:
        return int(logits.argmax())
    order = logits.argsort(descending=True, stable=True)
    p = ((logits[order] - logits.max()).double() / temperature).softmax(0)
    if top_k:
        p[top_k:] = 0
        p /= p.sum()
    if top_p < 1:
        p[p.cumsum(0) - p >= top_p] = 0
        p /= p.sum()
    if min_p:
        p[p < min_p * p[0]] = 0
    return int(order[torch.multinomial(p, 1, generator=rng)])


def text(tokens: Iterable[int], tokenizer, stop: Iterable[str] = ()) -> Iterator[str]:
    """Turn tokens into text as they come, ending before the first stop string.

    Holds back what may still become a stop string, and incomplete UTF-8.
    """
    stop, stream, held = [s for s in stop if s], tokenizer.stream(), ""
    for token in tokens:
        held += stream.push(token)
        cut = min((held.find(s) for s in stop if s in held), default=-1)
        if cut >= 0:
            if cut:
                yield held[:cut]
            return
        keep = max((n for s in stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        if len(held) > keep:
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    held += stream.flush()
    cut = min((held.find(s) for s in stop if s in held), default=len(held))
    if held[:cut]:
        yield held[:cut]
