"""Time the decode kernels on a GPU: python -m nanokv.eval.kernels.bench

Kernels and PyTorch's scaled_dot_product_attention take turns. Each is recorded once as a CUDA graph that attends to
several copies of a random cache, one after the other, so that neither Python nor the launches are timed and no copy is
still in the L2 cache when its turn comes again. Medians of CUDA events; the bytes a kernel needs to read, over its
time, as a share of the bandwidth measured in the same run.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from nanokv.eval.kernels.report import MODELS, table
from nanokv.files import write_json

FLUSHES = 3  # copies are as many as fill the L2 cache so often
MOST_COPIES = 256


def contestants(model: str, T: int, B: int, dtype, device, copies: int = 1) -> dict:
    """Return name -> (functions of nothing, one per copy of the cache, and the bytes that each has to read)."""
    from nanokv.kernels.decode import decode
    from nanokv.kernels.decode_codes import Codes, Exact, decode_codes
    from nanokv.kernels.pack import encode_naive

    (G, Hkv, D), generator = MODELS[model], torch.Generator(device).manual_seed(0)
    R, scale, n = B * Hkv, D**-0.5, T // 32 * 32  # tokens that fill groups

    def noise(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    q = noise(R, G, D)
    every, start = torch.arange(R, device=device), torch.arange(R, device=device) * T
    length = torch.full((R,), T, dtype=torch.int32, device=device)
    none = Exact(noise(1, D), torch.zeros(R, dtype=torch.int64, device=device))
    out: dict[str, tuple[list, int]] = {}

    def add(name, run, held):
        out.setdefault(name, ([], held))[0].append(run)

    for _ in range(copies):
        k, v = noise(R, T, D), noise(R, T, D)
        q4, k4, v4 = (x.view(B, -1, x.shape[-2], D) for x in (q.view(B, Hkv * G, 1, D), k, v))
        rows, whole = (q, k.flatten(0, 1), v.flatten(0, 1), start), k.nbytes + v.nbytes
        add("sdpa", lambda x=(q4, k4, v4): F.scaled_dot_product_attention(*x, enable_gqa=True), whole)
        add("decode", lambda x=rows: decode(*x, length, scale=scale, most=T), whole)
        add("decode, 1/4 kept", lambda x=rows: decode(*x, length // 4, scale=scale, most=T // 4), whole // 4)
        for bits in (4, 2):
            keys = encode_naive(k[:, :n].reshape(-1, 32, D), bits)
            values = encode_naive(v[:, :n].reshape(-1, 1, D), bits, 32)
            old = (
                Codes(*keys, every * (n // 32), torch.full_like(length, n // 32), bits),
                Codes(*values, every * n, torch.full_like(length, n), bits),
            )
            run = lambda old=old: decode_codes(q, *old, none, none, old[1].n, scale=scale, most=n)  # noqa: E731
            add(f"kivi {bits}-bit", run, sum(x.nbytes for x in (*keys, *values)))
    return out


def needed(held: int, L2: int) -> int:
    """Return how many copies of a cache of `held` bytes flush a cache of L2 bytes, at least two."""
    return max(2, min(MOST_COPIES, -(-FLUSHES * L2 // held)))


def record(runs: list) -> torch.cuda.CUDAGraph:
    """Return a graph of all calls in a row; they have been compiled before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def time_all(field: dict, rounds: int) -> dict[str, float]:
    """Return the median microseconds of one call of each contestant; they take turns."""
    graphs, times = {name: record(runs) for name, (runs, _) in field.items()}, {name: [] for name in field}
    for _ in range(rounds):
        for name, graph in graphs.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            a.record()
            graph.replay()
            b.record()
            b.synchronize()
            times[name].append(a.elapsed_time(b) * 1e3 / len(field[name][0]))
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval.kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        why = "this needs a GPU; python -m nanokv.eval.kernels.report computes costs without one"
        print(f"bench: error: {why}", file=sys.stderr)
        return 2
    from nanokv.eval.speed import bandwidth

    device, dtype, records = torch.device("cuda"), getattr(torch, args.dtype), []
    peak, L2 = bandwidth(device, 2048), torch.cuda.get_device_properties(device).L2_cache_size
    work = [(m, T, B) for m in MODELS for T in args.contexts for B in args.batch]
    for model, T, B in track(work, "timing", console=Console(stderr=True), transient=True):
        _, Hkv, D = MODELS[model]
        least = 2 * B * Hkv * T * D * dtype.itemsize // 16  # bytes of the smallest cache, in fp16 that of 2-bit codes
        field = contestants(model, T, B, dtype, device, needed(least, L2))
        for name, us in time_all(field, args.rounds).items():
            share = field[name][1] / (us * 1e-6) / peak
            records.append({"model": model, "context": T, "batch": B, "name": name, "us": us, "share": share})
    about = {"gpu": torch.cuda.get_device_name(), "bandwidth": peak, "torch": torch.__version__, "dtype": args.dtype}
    columns = ("model", "context", "batch", "kernel", "us", "x sdpa", "of the bandwidth")
    out = table(f"{about['gpu']}, {peak / 1e9:.0f} GB/s read, {args.dtype}, medians", columns, ("model", "kernel"))
    for r in records:
        sdpa = [x for x in records if x["name"] == "sdpa"]
        base = next(x["us"] for x in sdpa if all(x[k] == r[k] for k in ("model", "context", "batch")))
        out.add_row(r["model"], f"{r['context']:,}", str(r["batch"]), r["name"], f"{r['us']:.1f}",
                    f"{base / r['us']:.2f}", f"{r['share']:.0%}")  # fmt: skip
    Console(width=max(100, Console().width)).print(out)
    if args.json:
        try:
            write_json(args.json, {"about": about, "records": records})
        except OSError as error:
            print(f"bench: error: cannot write {args.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
