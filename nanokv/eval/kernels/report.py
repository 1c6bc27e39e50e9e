"""What every kernel costs on GPUs that are not there: python -m nanokv.eval.kernels.report

Each kernel is compiled ahead of time for several targets, disassembled and counted. Instructions of its inner loop (of
the tiles that are codes throughout, where some are not), per warp and entry, are set against the bytes an entry needs:
a GPU moves so many bytes a second and issues so many instructions, and the slower of the two bounds the time.
Everything here is computed, nothing is measured.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from nanokv.files import write_json

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# bytes/s of memory, processors, instructions each issues per clock, clock in Hz: data sheets of A100 80GB SXM, H100 SXM
# and MI300X; the clock is the one they name for the peak of arithmetic
GPUS = {
    "A100": ("sm_80", 2.04e12, 108, 4, 1.41e9),
    "H100": ("sm_90", 3.35e12, 132, 4, 1.755e9),
    "MI300X": ("gfx942", 5.30e12, 304, 4, 2.1e9),
}
# left out unless asked for: other types, sizes and packings of kernels that are in the table already
RARE = re.compile(
    r"bf16|8-bit|D=80|D=96|M=8|M=16|M=64|fp32 D=128|D=7|D=256|combine D=128|fp32 2-bit|fp32 4-bit D=128"
    r"|^pack.*([34]-bit|fp32)"
)
# caches in the tables: what an entry is held as, and the share of entries that are kept
KINDS = {"full": ("full", 1.0), "kivi 4-bit": ("4", 1.0), "kivi 2-bit": ("2", 1.0), "25 % kept": ("full", 0.25)}
# query heads per KV head, KV heads, head_dim of the models in the second table
MODELS = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (4, 8, 128)}


def measure(name: str, target: str) -> dict:
    """Compile one configuration for one target; return its cost, `per_token` included where there is a loop."""
    from nanokv.eval.kernels import aot

    case = aot.cases()[name]
    out = aot.cost(aot.compile(case, target), case.loop)
    out |= {"case": name.removesuffix(" (AMD)"), "target": target, "widest": max(out["loads"], default=0)}
    tile = case.constants.get("BT")  # entries of an iteration
    if tile and out["loop"]:
        out["per_token"] = out["loop"] * case.options[aot.kind(target)]["num_warps"] / tile
    return out


def held(kind: str, D: int) -> float:
    """Return the bytes an entry of one KV head needs in fp16: keys and values, or codes with fp16 scales and minima."""
    return 4.0 * D if kind == "full" else 2 * D * int(kind) / 8 + 2 * 4 * D / 32


def moved(ideal: float, G: int, D: int, T: int, rows: int) -> float:
    """Return the bytes that are moved per entry: what is held, and the splits' fp32 results, written and read."""
    from nanokv.kernels.decode import cut

    return ideal + 2 * 4 * G * (D + 1) * cut(T, rows, 128)[0] / T


def bound(gpu: str, per_entry: float, per_token: float | None, entries: int) -> tuple[float, str]:
    """Return the least microseconds for so many entries (times KV heads), and what sets it: memory or issue.

    memory: bytes / (bytes per second); issue: warp instructions / (processors * instructions per clock * clock).
    """
    _, bandwidth, processors, per_clock, clock = GPUS[gpu]
    memory = entries * per_entry / bandwidth
    issue = entries * (per_token or 0) / (processors * per_clock * clock)
    return max(memory, issue) * 1e6, "memory" if memory >= issue else "issue"


def bounds(records: list[dict]) -> list[dict]:
    """Return the bound of one layer's attention, batch 1, for full, kivi 4 and 2 bits and 25 % kept, 4k and 32k."""
    loops = {(r["case"], r["target"]): r.get("per_token") for r in records}
    out = []
    for gpu, (target, *_) in GPUS.items():
        for model, (G, Hkv, D) in MODELS.items():
            for T in (4096, 32768):
                for name, (kind, share) in KINDS.items():
                    case = "decode fp16" if kind == "full" else f"kivi fp16 {kind}-bit"
                    loop, n = loops.get((f"{case} D={D} M={G}", target)), int(T * share)
                    us, limit = bound(gpu, moved(held(kind, D), G, D, n, Hkv), loop, n * Hkv)
                    out.append({"gpu": gpu, "model": model, "context": T, "cache": name, "us": us, "limit": limit})
    return out


def table(title: str, columns: tuple, left: tuple) -> Table:
    """Return an empty table whose columns are aligned to the right, but for those of `left`."""
    out = Table(title=title, box=box.SIMPLE)
    for column in columns:
        out.add_column(column, justify="left" if column in left else "right")
    return out


def tables(records: list[dict]) -> list[Table]:
    """Return the costs by kernel and target, and the bounds, as tables."""
    columns = ("kernel", "target", "registers", "spills", "shared KB", "widest load B", "loop", "per token and head")
    first = table("Static cost (computed, not measured)", columns, ("kernel", "target"))
    for r in records:
        loop = f"{r['per_token']:.1f}" if "per_token" in r else "-"
        sizes = f"{r['shared'] / 1024:.0f}", str(r["widest"]), str(r["loop"] or "-")
        first.add_row(r["case"], r["target"], str(r["registers"]), str(r["spills"]), *sizes, loop)
    rows = bounds(records)
    columns = ("GPU", "model", "context", *KINDS)
    second = table("Bound of one layer's attention, batch 1, fp16, microseconds (computed)", columns, ("GPU", "model"))
    for gpu, model, T in dict.fromkeys((r["gpu"], r["model"], r["context"]) for r in rows):
        group = [r for r in rows if (r["gpu"], r["model"], r["context"]) == (gpu, model, T)]
        cells = [f"{r['us']:.2f}" + ("*" if r["limit"] == "issue" else "") for r in group]
        second.add_row(gpu, model, f"{T:,}", *cells)
    second.caption = "* bound by instructions, else by memory. Launches, latency and weights are not in it."
    columns = ("cache", "held", "moved", "ideal / moved")
    third = table("Bytes per entry and KV head, fp16, G = 3, D = 64, 4,096 entries", columns, ("cache",))
    for name, (kind, share) in KINDS.items():
        if share < 1:
            continue
        ideal = held(kind, 64)
        all_ = moved(ideal, 3, 64, 4096, 3)
        third.add_row(name, f"{ideal:.0f}", f"{all_:.1f}", f"{ideal / all_:.0%}")
    return [first, third, second]


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval.kernels.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", metavar="TEXT", default="", help="kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help="rarer configurations too, some minutes")
    parser.add_argument("--json", metavar="FILE", help="- is standard output, without tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("report: error: kernels cannot be compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("report: error: Triton is not installed", file=sys.stderr)
        return 2
    from nanokv.eval.kernels import aot

    chosen = {n: c for n, c in aot.cases().items() if args.only in n and (args.all or args.only or not RARE.search(n))}
    work = [(n, t) for n, case in chosen.items() for t in args.targets if aot.kind(t) in case.options]
    if not work:
        print(f"report: error: no kernel's name contains {args.only!r}", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(max(1, args.jobs), mp_context=get_context("spawn")) as pool:
        done = pool.map(measure, *zip(*work, strict=True))
        records = list(track(done, "compiling", len(work), console=Console(stderr=True), transient=True))
    if args.json == "-":
        print(json.dumps(records))
        return 0
    console = Console(width=max(120, Console().width))
    for each in tables(records):
        console.print(each)
    if args.json:
        try:
            write_json(args.json, records)
        except OSError as error:
            print(f"report: error: cannot write {args.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
