"""What methods hold and how far their predictions are from the full cache's: python -m nanokv.eval.compare SPEC ...

A prompt of English prose is read and compressed, then its true continuation goes token by token through the compressed
cache: attention in one pass over everything would see the exact prompt and measure nothing.
"""

import argparse
import sys

import torch
from rich.console import Console
from rich.progress import track

from nanokv import KVCache
from nanokv.chat import Beside
from nanokv.engine import prefill


def prose(tokenizer, n: int) -> torch.Tensor:
    """Return the first n tokens, (1, n), of the standard library's documentation of the language."""
    from pydoc_data.topics import topics

    ids = tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))[: 8 * n])
    if len(ids) < n:
        raise ValueError(f"the standard library's documentation has {len(ids)} tokens, not {n}")
    return torch.tensor([ids[:n]])


def fits(cache: KVCache, n: int) -> None:
    """Raise ValueError if n tokens are more than the model's context, unless the cache renumbers."""
    if n > cache.config.context and not cache.renumbers:
        raise ValueError(f"{n} tokens are more than this model's context, {cache.config.context}")


def measure(model, spec: str, ids: torch.Tensor, context: int) -> dict:
    """Return bytes held after `context` tokens of ids (1, T), and KL and agreement over the tokens that follow."""
    cache, beside = KVCache(model, spec), Beside(model)
    beside(ids[:, :context], prefill(model, cache, ids[:, :context]))
    beside.kl.clear(), beside.same.clear()  # the prompt's own prediction saw the exact prompt
    for i in range(context, ids.shape[1]):
        beside(ids[:, i : i + 1], model(ids[:, i : i + 1], cache)[:, -1])
    total, n = cache.ledger()["total"], len(beside.kl)
    return {"spec": spec, "held": total["held"], "full": total["full"], "kl": sum(beside.kl) / n,
            "same": sum(beside.same) / n}  # fmt: skip


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    from weights import LoadError, load

    parser = argparse.ArgumentParser(prog="python -m nanokv.eval.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="+", metavar="SPEC")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(argv)
    try:
        if args.context < 1 or args.tokens < 1:
            raise ValueError("--context and --tokens must be at least 1")
        model, tokenizer = load(args.model)
        for cache in [KVCache(model, spec) for spec in [*args.methods, "full"]]:  # what is wrong is said at once
            fits(cache, args.context + args.tokens)
        ids = prose(tokenizer, args.context + args.tokens)
        print("| method | MiB held | times smaller | KL, nats per token | same top token |\n|---|---|---|---|---|")
        for spec in track(args.methods, console=Console(stderr=True), transient=True):
            r = measure(model, spec, ids, args.context)
            numbers = f"{r['held'] / 2**20:.1f} | {r['full'] / r['held']:.1f} | {r['kl']:.4f} | {r['same']:.0%}"
            print(f"| `{spec}` | {numbers} |", flush=True)
    except (LoadError, ValueError, NotImplementedError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
