"""Time the decode kernels on a GPU: python -m nanokv.kernels.bench

Kernels and PyTorch's scaled_dot_product_attention take turns on the same random cache; medians of CUDA events; the
bytes a kernel needs to read, over its time, as a share of the bandwidth measured in the same run.
"""

import argparse
import statistics
import sys

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from nanokv.files import write_json
from nanokv.kernels.report import MODELS, table


def contestants(model: str, T: int, B: int, dtype, device) -> dict:
    """Return name -> (function of nothing, bytes it has to read) for one shape."""
    from nanokv.kernels.decode import decode_triton
    from nanokv.kernels.decode_kivi import decode_kivi_triton
    from nanokv.quant import PerChannel, PerToken

    (G, Hkv, D), generator = MODELS[model], torch.Generator(device).manual_seed(0)
    R, scale = B * Hkv, D**-0.5

    def noise(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    q, k, v = noise(R, G, D), noise(R, T, D), noise(R, T, D)
    start, length = torch.arange(R, device=device) * T, torch.full((R,), T, dtype=torch.int32, device=device)
    rows, short, whole = (k.flatten(0, 1), v.flatten(0, 1), start), length // 4, k.nbytes + v.nbytes
    q4, k4, v4 = (x.view(B, -1, x.shape[-2], D) for x in (q.view(B, Hkv * G, 1, D), k, v))
    out = {
        "sdpa": (lambda: F.scaled_dot_product_attention(q4, k4, v4, enable_gqa=True), whole),
        "decode": (lambda: decode_triton(q, *rows, length, scale=scale, most=T), whole),
        "decode, 1/4 kept": (lambda: decode_triton(q, *rows, short, scale=scale, most=T // 4), whole // 4),
    }
    for bits in (4, 2):
        keys, values, n = PerChannel(R, bits, 32), PerToken(R, bits, 32), T // 32 * 32
        keys.add(list(range(R)), k[:, :n])
        values.add(list(range(R)), v[:, :n])
        none = torch.zeros(R, dtype=torch.int64, device=device)
        fields = keys.for_kernel(device) | values.for_kernel(device)
        fields |= {"k_new": noise(16, D), "k_new_start": none, "v_new": noise(16, D), "v_new_start": none}
        fields |= {"length": fields["k_len"], "bits": bits, "group": 32, "scale": scale, "most": n}
        held = keys.rows.used("code", "scale", "low") + values.codes.used() + values.stats.used()
        out[f"kivi {bits}-bit"] = (lambda fields=fields: decode_kivi_triton(q, **fields)), held
    return out


def time_all(field: dict, rounds: int) -> dict[str, float]:
    """Return the median microseconds of each contestant; they take turns."""
    times = {name: [] for name in field}
    for run, _ in field.values():  # compile
        run()
    for _ in range(rounds):
        for name, (run, _) in field.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            a.record()
            run()
            b.record()
            b.synchronize()
            times[name].append(a.elapsed_time(b) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanokv.kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(
            "bench: error: this needs a GPU; python -m nanokv.kernels.report computes costs without one",
            file=sys.stderr,
        )
        return 2
    from nanokv.eval.speed import bandwidth

    device, records = torch.device("cuda"), []
    peak = bandwidth(device, 2048)
    work = [(m, T, B) for m in MODELS for T in args.contexts for B in args.batch]
    for model, T, B in track(work, "timing", console=Console(stderr=True), transient=True):
        field = contestants(model, T, B, getattr(torch, args.dtype), device)
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
