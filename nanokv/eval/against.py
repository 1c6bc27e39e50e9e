"""This checkout against another one, step by step in turns: python -m nanokv.eval against DIR [SPEC ...]

Each checkout, another commit's worktree for instance, runs in a process of its own that takes orders line by line; the
two take turns, so that whatever else the machine does hits both. Printed is how many times as fast this one is, the
median over pairs of turns with a 90 % interval from resampling them; the same for prompts.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

WORKER = r"""
import inspect, json, os, sys, time
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(int(sys.argv[2]))
import weights, nanokv
from nanokv.engine import prefill
options = {"fast": sys.argv[4] != "torch"} if "fast" in inspect.signature(weights.load).parameters else {}
model, tokenizer = weights.load(sys.argv[1], dtype=sys.argv[3], progress=False, **options)
nanokv.kernels.use(sys.argv[4])
from pydoc_data.topics import topics
text = tokenizer.encode("\n\n".join(topics[k] for k in sorted(topics))[:120000])
run, cache = model, None
with torch.no_grad():
    for line in sys.stdin:
        order, start = json.loads(line), time.perf_counter()
        if "spec" in order:
            spec, n = order["spec"], order["context"]
            whole = spec.endswith(" --compile")
            cache = nanokv.KVCache(model, spec.removesuffix(" --compile"))
            prefill(model, cache, torch.tensor([text[:n]]))
            seconds = [time.perf_counter() - start]
            run = model
            if whole:
                from nanokv import fast_cpu
                run = fast_cpu.compiled(model, cache, n + order["steps"])
        else:
            seconds = []
            for i in range(order["steps"]):
                start = time.perf_counter()
                run(torch.tensor([[text[i]]]), cache, last=True)
                seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)
"""


class Checkout:
    """A process that runs the code in a folder."""

    def __init__(self, folder, model: str, threads: int, dtype: str, backend: str = "auto"):
        command = [sys.executable, "-c", WORKER, model, str(threads), dtype, backend]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def ask(self, **order) -> list[float]:
        """Send an order and return the seconds it took; RuntimeError if the process has ended."""
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError("a contestant has ended; what it said stands above") from error

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Return the median of ratios, and the 5 % and 95 % points of the medians of resampled ones."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[draws // 20], medians[-draws // 20]


def compare(mine: Checkout, other: Checkout, spec: tuple[str, str], context: int, rounds: int, steps: int) -> dict:
    """Return medians of seconds per step and per prompt of both, and the ratios of paired turns."""
    total = steps * (rounds + 1)
    firsts = []
    for _ in range(2):
        theirs, ours = (c.ask(spec=s, context=context, steps=total) for c, s in ((other, spec[1]), (mine, spec[0])))
        firsts.append((theirs[0], ours[0]))
    for c in (mine, other):
        c.ask(steps=steps)  # warm up
    turns = []
    for _ in range(rounds):
        turns.append(tuple(statistics.median(c.ask(steps=steps)) for c in (other, mine)))
    return {
        "step": [statistics.median(t[i] for t in turns) for i in (0, 1)],
        "ratio": interval([a / b for a, b in turns]),
        "prompt": statistics.median(a / b for a, b in firsts),
    }


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval against", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="another checkout of this project")
    parser.add_argument("methods", nargs="*", default=["full"], metavar="SPEC", help="'HERE|THERE' where they differ")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, bfloat16")
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 1024, 4096])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", default="auto", help="of this checkout: auto, torch")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("--steps", type=int, default=6, help="decode steps in a turn")
    args = parser.parse_args(argv)
    if not (Path(args.folder) / "nanokv").is_dir() or min(args.rounds, args.steps, *args.contexts) < 1:
        print("against: error: DIR must be a checkout, and numbers at least 1", file=sys.stderr)
        return 2
    table = Table(title=f"{args.model}, batch 1, {args.threads} threads, backend {args.backend}, against {args.folder}")
    for column in ("dtype", "context", "method", "there, ms", "here, ms", "decode, times as fast", "prompt"):
        table.add_column(column)
    jobs = [(d, n, s) for d in args.dtype for n in args.contexts for s in args.methods]
    pair, now = [], None
    try:
        for dtype, n, spec in track(jobs, console=Console(stderr=True), transient=True):
            if dtype != now:
                for c in pair:
                    c.close()
                where = ((Path(__file__).parents[2], args.backend), (args.folder, "auto"))
                pair, now = [Checkout(f, args.model, args.threads, dtype, b) for f, b in where], dtype
            here, _, there = spec.partition("|")
            r = compare(*pair, (here, there or here.removesuffix(" --compile")), n, args.rounds, args.steps)
            middle, low, high = r["ratio"]
            step = (f"{1000 * s:.1f}" for s in r["step"])
            table.add_row(dtype, str(n), here, *step, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{r['prompt']:.2f}")
    except RuntimeError as error:
        print(f"against: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for c in pair:
            c.close()
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
