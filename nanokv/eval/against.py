"""This checkout against another one, step by step in turns: python -m nanokv.eval against DIR [SPEC ...]

Each checkout, another commit's worktree for instance, runs in a process of its own (worker.py); the two take turns, so
that whatever else the machine does hits both. Printed is how many times as fast this one is: the median over pairs of
turns, with the interval in which nine of ten medians of resampled pairs lie.
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

SPECS = ["full", "full --compile", "kivi(bits=2)", "snapkv", "streamingllm(budget=512)", "h2o", "tova", "keydiff",
         "cake", "keepkv"]  # fmt: skip


class Checkout:
    """A process that runs the code in a folder."""

    def __init__(self, folder, model: str, threads: int, dtype: str, backend: str = "auto"):
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), model, str(threads), dtype, backend]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.folder = folder
        self.process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def ask(self, **order) -> list[float]:
        """Send an order and return the seconds it took; RuntimeError if it cannot be obeyed."""
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            answer = {"error": "its process has ended"}
        if isinstance(answer, dict):
            raise RuntimeError(f"{self.folder}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def interval(ratios: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Return the median of ratios, and the 5 % and 95 % points of the medians of resampled ones."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[draws // 20], medians[-draws // 20 - 1]


def turns(pair: list[Checkout], n: int, orders: list[dict]) -> list[list[float]]:
    """Give each of two checkouts its order n times, in turns; return the median seconds of each turn, n x 2."""
    out = []
    for i in range(n):
        seconds = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):  # neither is always the first
            seconds[j] = statistics.median(pair[j].ask(**orders[j]))
        out.append(seconds)
    return out


def compare(pair: list[Checkout], specs: list[str], context: int, prompts: int, rounds: int, steps: int) -> dict:
    """Return the seconds of each turn of two checkouts: {"prompt": prompts x 2, "step": rounds x 2}."""
    begin = [{"spec": spec, "context": context, "steps": steps * (rounds + 1)} for spec in specs]
    read = turns(pair, prompts, begin)
    turns(pair, 1, [{"steps": steps}] * 2)  # warm up
    return {"prompt": read, "step": turns(pair, rounds, [{"steps": steps}] * 2)}


def cells(pairs: list[list[float]]) -> list[str]:
    """Return medians of theirs and ours in ms, and how many times as fast ours is, as text."""
    middle, low, high = interval([a / b for a, b in pairs])
    there, here = (f"{1000 * statistics.median(p[i] for p in pairs):.1f}" for i in (0, 1))
    return [there, here, f"{middle:.2f} ({low:.2f} to {high:.2f})"]


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval against", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="DIR", help="another checkout of this project")
    parser.add_argument("methods", nargs="*", default=SPECS, metavar="SPEC",
                        help=f"'HERE|THERE' where they differ; --compile behind a spec is for this checkout alone; "
                        f"default: {', '.join(SPECS)}")  # fmt: skip
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32, bfloat16")
    parser.add_argument("--contexts", nargs="+", type=int, default=[16, 1024, 4096])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--backend", default="auto", choices=("auto", "torch"), help="of this checkout")
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("--steps", type=int, default=6, help="decode steps in a turn")
    parser.add_argument("--json", metavar="FILE", help="write what was measured")
    args = parser.parse_intermixed_args(argv)
    if not (Path(args.folder) / "nanokv").is_dir():
        print(f"against: error: {args.folder} is not a checkout of this project", file=sys.stderr)
        return 2
    if min(args.rounds, args.steps, args.prompts, args.threads, *args.contexts) < 1:
        print("against: error: numbers must be at least 1", file=sys.stderr)
        return 2
    found = []
    try:
        for record in measure(args):
            found.append(record)
    except RuntimeError as error:
        print(f"against: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:  # what was measured until then is not lost
        report(found, args)
    return 0


def measure(args):
    """Yield a record for each dtype, context and method: {"dtype", "context", "spec", "prompt", "step"}."""
    jobs = [(d, n, s) for d in args.dtype for n in args.contexts for s in args.methods]
    pair, now = [], None
    try:
        for dtype, n, spec in track(jobs, console=Console(stderr=True), transient=True):
            if dtype != now:
                for checkout in pair:
                    checkout.close()
                where = (args.folder, "auto"), (Path(__file__).parents[2], args.backend)
                pair, now = [Checkout(f, args.model, args.threads, dtype, b) for f, b in where], dtype
            here, _, there = spec.partition("|")
            specs = [there or here.removesuffix(" --compile"), here]
            seconds = compare(pair, specs, n, args.prompts, args.rounds, args.steps)
            yield {"dtype": dtype, "context": n, "spec": here} | seconds
    finally:
        for checkout in pair:
            checkout.close()


def report(found: list[dict], args) -> None:
    """Print a table, and write what was measured where that was asked for."""
    if not found:
        return
    title = f"{args.model}, batch 1, {args.threads} threads, backend {args.backend}: here against {args.folder}"
    table = Table(title=title)
    for column in ("dtype", "context", "method", "step there, ms", "here", "times as fast", "prompt there, ms", "here",
                   "times as fast"):  # fmt: skip
        table.add_column(column)
    for r in found:
        table.add_row(r["dtype"], str(r["context"]), r["spec"], *cells(r["step"]), *cells(r["prompt"]))
    Console(width=max(150, Console().width)).print(table)
    if args.json:
        from nanokv.files import write_json

        write_json(args.json, found)


if __name__ == "__main__":
    sys.exit(main())
