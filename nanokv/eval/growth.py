"""Bytes held while tokens are generated, as a table and a picture: python -m nanokv.eval bytes [SPEC ...]"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from nanokv import KVCache
from nanokv.engine import prefill
from nanokv.eval import plots, score, summary
from nanokv.files import write_json

SPECS = ["full", "kivi(bits=4)", "xquant(bits=4)", "pca(rank=32)", "snapkv(budget=256)", "streamingllm(budget=256)",
         "streamingllm(budget=256)+kivi(bits=4)"]  # fmt: skip


def measure(model, spec: str, ids: torch.Tensor, context: int, step: int = 8) -> list[tuple[int, int]]:
    """Return (tokens generated, bytes held) after the prompt, ids (1, T) up to `context`, and every `step` tokens."""
    cache = KVCache(model, spec)
    prefill(model, cache, ids[:, :context])
    out, n, total = [(0, cache.nbytes)], 0, ids.shape[1] - context
    for logp in score.follow(model, cache, ids[:, context:]):
        n += logp.shape[1]
        if n % step == 0 or n == total:
            out.append((n, cache.nbytes))
    return out


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    from nanokv.eval.compare import fits, prose
    from weights import LoadError, load

    parser = argparse.ArgumentParser(prog="python -m nanokv.eval bytes", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="SPEC", help=f"default: {' '.join(SPECS)}")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=320, help="tokens generated after it")
    parser.add_argument("--out", metavar="STEM", default="eval-bytes", help="STEM.json, STEM.png, STEM.svg")
    args = parser.parse_args(argv)
    specs, stem = args.methods or SPECS, Path(args.out)
    try:
        if args.context < 1 or args.tokens < 1:
            raise ValueError("--context and --tokens must be at least 1")
        model, tokenizer = load(args.model, args.dtype)
        for spec in specs:
            fits(KVCache(model, spec), args.context + args.tokens)
        ids = prose(tokenizer, args.context + args.tokens)
        bar = track(specs, console=Console(stderr=True), transient=True)
        series = {spec: measure(model, spec, ids, args.context) for spec in bar}
        about = {"model": args.model, "dtype": args.dtype, "context": args.context}
        made = [write_json(stem.with_name(f"{stem.name}.json"), {"about": about, "bytes": series})]
    except (LoadError, ValueError, NotImplementedError, OSError) as error:
        print(f"bytes: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    rows = [[s, *(f"{b / 2**20:.2f}" for b in (p[0][1], p[-1][1]))] for s, p in series.items()]
    header = ["method", "MiB after the prompt", f"MiB {args.tokens} tokens later"]
    Console().print(summary.terminal(header, rows, f"{args.model}, {args.dtype}, a prompt of {args.context} tokens"))
    if find_spec("matplotlib"):
        labels = f"tokens generated after a prompt of {args.context:,}", f"bytes held, MiB ({args.dtype})"
        made += plots.curves({s: [(n, b / 2**20) for n, b in p] for s, p in series.items()}, labels, stem)
    else:
        print("bytes: no picture without matplotlib: pip install matplotlib", file=sys.stderr)
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
