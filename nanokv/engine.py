"""Reading prompts in parts, the decode loop, and choosing the next token."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from nanokv.cache import KVCache

CHUNK = 2048  # prompt tokens per pass in fp32, twice as many in 16 bits: bounds activations, keeps a processor busy


@torch.no_grad()
def prefill(model, cache: KVCache, prompts, chunk: int | None = None, progress: Callable | None = None) -> Tensor:
    """Read one prompt per sequence, lists of token ids or a tensor (B, T), in parts; return the last logits (B, vocab).

    An empty list reads nothing. Prompts are cut into parts of at most `chunk` tokens (None: see CHUNK), each prompt as
    it would be alone, and end together. `progress` is called with the number of tokens read after each part.
    """
    prompts = [list(p) for p in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
    if not any(prompts):
        raise ValueError("the prompt is empty")
    if chunk is not None and chunk < 1:
        raise ValueError("chunk must be at least 1")
    chunk = chunk or CHUNK * 4 // model.embed_tokens.weight.element_size()
    step = min(c for c in (chunk, cache.chunk) if c)
    parts = [[p[i : i + step] for i in range(0, len(p), step)] for p in prompts]
    n = max(map(len, parts))
    for i in range(n):
        here = [own[i - n + len(own)] if i >= n - len(own) else [] for own in parts]
        phase = None if n == 1 else "last" if i == n - 1 else "prompt"
        logits = model(_batch(here), cache, phase, last=True)
        if progress:
            progress(max(map(len, here)))
    return logits[:, -1]


def generate(model, cache: KVCache, ids, max_new_tokens: int = 128, **options) -> Iterator[int]:
    """Read the prompt `ids` (a list of token ids) into the cache and yield the tokens that follow, one at a time.

    Ends after max_new_tokens, before a token of `stop`, or when the model's context is full (never, where the cache
    renumbers). Unless a stop token ended the text, the last token yielded has not been read into the cache: pass it
    alone to go on, which is a step and not a new prompt. Options and errors are those of `generate_batch`.
    """
    ids = torch.as_tensor(ids)
    if ids.dim() > 1 and len(ids) != 1:
        raise ValueError(f"generate continues one prompt, not {len(ids)}; use generate_batch")
    for (token,) in generate_batch(model, cache, [ids.flatten().tolist()], max_new_tokens, **options):
        yield token


@torch.no_grad()
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

    Each sequence gets what it would get alone. One that has ended is not fed, and can go on later with a prompt of its
    own; one whose later prompt is empty pauses. With max_new_tokens 0 the prompts are read, and that is all.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off; with a seed, every sequence draws as
    it would alone. The repetition penalty applies to all that the cache has read. `watch` is called after every pass
    with the ids that were read (B, T), -1 where a sequence read nothing, and the logits that follow them (B, vocab).
    Raises ValueError for an empty batch, an empty or too long prompt and for options out of range, FloatingPointError
    where the model's numbers are none.
    """
    prompts = [p.tolist() if isinstance(p, Tensor) else list(p) for p in prompts]
    _check_prompts(cache, prompts)
    _check_options(max_new_tokens, chunk, temperature, top_k, top_p, min_p, repetition_penalty)
    done, stop = [not p for p in prompts], set(stop)
    draws = [_generator(seed) if temperature > 0 else None for _ in prompts]
    ids, tokens, logits = _batch(prompts), [], _read(model, cache, prompts, chunk, progress)
    for i in range(max_new_tokens):
        if i > 0:
            full = [not cache.renumbers and n >= cache.config.context for n in cache.next_position]
            done = [ended or over for ended, over in zip(done, full, strict=True)]
            if all(done):
                return
            ids = torch.tensor([[-1 if ended else token] for ended, token in zip(done, tokens, strict=True)])
            logits = model(ids, cache, last=True)[:, -1]
        if watch:
            watch(ids, logits)
        _check_logits(logits, done)
        if temperature == 0 and repetition_penalty == 1:
            tokens = logits.argmax(-1).tolist()  # on the device: only tokens are copied to the host
        else:
            rows = zip(logits, cache.ids, draws, strict=True)
            tokens = [sample(row, temperature, top_k, top_p, min_p, repetition_penalty, *more) for row, *more in rows]
        done = [ended or token in stop for ended, token in zip(done, tokens, strict=True)]
        if all(done):
            return
        yield [None if ended else token for ended, token in zip(done, tokens, strict=True)]


def _batch(prompts: list[list[int]]) -> Tensor:
    """Return prompts as one tensor (B, T), -1 in front of shorter ones."""
    longest = max(map(len, prompts))
    return torch.tensor([[-1] * (longest - len(p)) + p for p in prompts])


def _read(model, cache, prompts, chunk, progress) -> Tensor:
    """Read prompts, of which a single token is a step for a sequence that has read others, as it would be alone."""
    steps = [p if len(p) == 1 and any(cache.next_position) else [] for p in prompts]
    if not any(steps) or all(len(p) < 2 for p in prompts):
        return prefill(model, cache, prompts, chunk, progress)
    stepped = prefill(model, cache, steps, chunk, progress)
    read = prefill(model, cache, [p if len(p) > 1 else [] for p in prompts], chunk, progress)
    return torch.stack([a if step else b for step, a, b in zip(steps, stepped, read, strict=True)])


def _generator(seed: int | None) -> torch.Generator:
    rng = torch.Generator()
    rng.seed() if seed is None else rng.manual_seed(seed)
    return rng


def _check_prompts(cache: KVCache, prompts: list[list[int]]) -> None:
    if not prompts:
        raise ValueError("the batch is empty")
    if not any(prompts) or (not cache.B and not all(prompts)):
        raise ValueError("the prompt is empty")
    if bad := [t for p in prompts for t in p if not (isinstance(t, int) and 0 <= t < cache.config.vocab)]:
        raise ValueError(f"a token id must be a whole number from 0 to {cache.config.vocab - 1}, got {bad[0]}")
    context = cache.config.context
    for prompt, read in zip(prompts, cache.next_position or [0] * len(prompts), strict=False):
        if not cache.renumbers and prompt and read + len(prompt) > context:
            held = f" after the {read} already read" if read else ""
            raise ValueError(
                f"the prompt has {len(prompt)} tokens{held}, the model's context {context}; methods that renumber "
                "positions, such as streamingllm, have no such limit"
            )


def _check_options(max_new_tokens, chunk, temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    for name, ok, what in (
        ("max_new_tokens", max_new_tokens >= 0, "at least 0"),
        ("chunk", chunk is None or chunk >= 1, "at least 1"),
        ("temperature", temperature >= 0, "at least 0"),
        ("top_k", top_k >= 0, "at least 0"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("min_p", 0 <= min_p < 1, "at least 0 and below 1"),
        ("repetition_penalty", 0.01 <= repetition_penalty <= 100, "from 0.01 to 100"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {what}")


def _check_logits(logits: Tensor, done: list[bool]) -> None:
    finite = logits.amax(-1).isfinite().tolist()  # an infinite or undefined number is the largest of all
    if bad := [b for b, (ok, ended) in enumerate(zip(finite, done, strict=True)) if not (ok or ended)]:
        dtype = str(logits.dtype).removeprefix("torch.")
        raise FloatingPointError(
            f"the model's logits for the next token{f' of text {bad[0]}' if len(done) > 1 else ''} are not finite in "
            f"{dtype}; another dtype may help, or the model's weights are damaged"
        )


def sample(logits: Tensor, temperature, top_k, top_p, min_p, repetition_penalty, seen: Tensor, rng) -> int:
    """Choose a token from logits (vocab,); `seen` are the ids (n,) that the repetition penalty applies to.

    The penalty divides positive logits and multiplies negative ones (arXiv 1909.05858); then temperature, top-k,
    top-p (the fewest tokens whose mass reaches top_p) and min-p (at least min_p times the likeliest), in this order.
    """
    logits = logits.float().cpu()
    if repetition_penalty != 1 and len(seen):
        at = seen.long().unique()
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
