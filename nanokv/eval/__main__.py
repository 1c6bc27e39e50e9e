"""Compare methods on this machine: python -m nanokv.eval quick

quick               every method at two strengths, some minutes
full                a grid of methods, strengths, text windows and retrieval tasks; goes on where it was interrupted
compare SPEC ...    what specs hold and how far they are from the full cache
speed SPEC ...      time to first token and tokens per second, side by side
against DIR ...     decode and prompt speed against another checkout of this project, in turns
bytes [SPEC ...]    bytes held while tokens are generated, as a picture
plot                tables and pictures from what quick or full found
"""

import argparse
import os
import sys
import time
from concurrent.futures import BrokenExecutor
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from nanokv.eval import plots, run, summary, tasks
from nanokv.files import write

OWN = ("compare", "speed", "bytes", "against")  # commands with options of their own, in files of their own


def main(argv=None) -> int:
    """Run the command line; return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in OWN:
        from nanokv.eval import against, compare, growth, speed

        files = {"compare": compare, "speed": speed, "bytes": growth, "against": against}
        return files[argv[0]].main(argv[1:])
    args = _parser().parse_args(argv)
    path = Path(args.out or f"eval-{'full' if args.command == 'plot' else args.command}.jsonl")
    if args.command == "plot":
        return plot(path, args.against)
    start = time.monotonic()
    try:
        if args.against is not None:
            raise ValueError("--against belongs to plot, which reads what was measured")
        records = measure(args, path)
    except (ValueError, NotImplementedError, OSError) as error:  # weights.LoadError is a ValueError
        print(f"eval: error: {error}", file=sys.stderr)
        return 2
    except BrokenExecutor:
        print(f"eval: error: a process ended suddenly, perhaps for want of memory; --jobs 1 takes less; what was "
              f"measured is in {path}, and the same command goes on there", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print(
            f"\neval: interrupted; what was measured is in {path}, and the same command goes on there", file=sys.stderr
        )
        return 130
    title = f"{args.model}, {args.dtype}, {(time.monotonic() - start) / 60:.1f} minutes"
    show(records, path, title)
    failed = summary.failures(records)
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    wide = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m nanokv.eval", description=__doc__.split("\n\n")[0],
                                     epilog=__doc__.split("\n\n", 1)[1], formatter_class=wide)  # fmt: skip
    parser.add_argument("command", choices=("quick", "full", "plot", *OWN))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 prose instead of the standard library's documentation:\n"
                        "a file, wikitext2, or hub:OWNER/NAME/FILE for a file of a data set on the hub")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="results, one JSON line each (default: eval-COMMAND.jsonl)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1),
                        help="processes of one thread, of 4 GB or more (default: one per core, at most 4)")  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, and full")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"only these of text, {', '.join(tasks.TASKS)};\n"
                        "those that the command would leave out are asked as its passkey is")  # fmt: skip
    parser.add_argument("--against", metavar="METHOD", help="plot: also print what each setting has more than this\n"
                        "one, or than this method at the same strength, on the same windows and questions")  # fmt: skip
    return parser


def measure(args, path: Path) -> list[dict]:
    """Return the records that a command asks for. ValueError and others, in one line, for what a user got wrong."""
    from weights import load

    if args.jobs < 1:
        raise ValueError("--jobs must be at least 1")
    tasks.prose(args.text)  # what is wrong with the text is said before the model is loaded
    model, tokenizer = load(args.model, args.dtype)
    grid = choose(plan(args.command, model.config), args.methods, args.tasks)
    grid = run.check(model, tokenizer, grid, tasks.corpus(tokenizer, args.text), args.text)
    del model
    return run.run(grid, path, args.model, args.dtype, args.text, args.jobs)


def plan(command: str, config) -> dict[run.Unit, list[run.Setting]]:
    """Return the units of a command and the settings for each."""
    chosen = run.settings(config, budgets=[0.5, 0.25], bits=[4, 2], ranks=[0.75, 0.5])
    if command == "quick":
        return dict.fromkeys(run.units("text", 512, 2, 32) + run.units("passkey", 512, 2), chosen)
    more = run.settings(config, budgets=[0.5, 0.25, 0.1], bits=[8, 4, 2], ranks=[0.75, 0.5, 0.25])
    asked = [(1024, "passkey"), (1024, "needle"), *((512, t) for t in tasks.TASKS if t != "needle")]
    units = [u for n, task in asked for u in run.units(task, n, 6)]
    # at a tenth of the entries all lose what was hidden: strengths as in quick
    return dict.fromkeys(run.units("text", 2048, 6, 128), more) | dict.fromkeys(units, chosen)


def choose(grid: dict, methods: list[str] | None, only: list[str] | None) -> dict:
    """Return the part of a grid with these methods, and full, and these tasks. ValueError for names not known."""
    if only:
        if bad := [t for t in only if t not in ("text", *tasks.TASKS)]:
            raise ValueError(f"no task {bad[0]!r}; there are text, {', '.join(tasks.TASKS)}")
        asked = {u: chosen for u, chosen in grid.items() if u.task in only}
        for task in [t for t in dict.fromkeys(only) if t not in {u.task for u in grid}]:
            like = max((u for u in grid if u.task == "passkey"), key=lambda u: u.context)
            asked |= dict.fromkeys(run.units(task, like.context, like.count), grid[like])
        grid = asked
    if methods:
        known = {s.name or s.method for chosen in grid.values() for s in chosen}
        if bad := [m for m in methods if m not in known]:
            raise ValueError(f"no method {bad[0]!r} here; there are {', '.join(sorted(known))}")
        grid = {u: [s for s in chosen if (s.name or s.method) in (*methods, "full")] for u, chosen in grid.items()}
    return grid


def show(records: list[dict], path: Path, title: str, base: str | None = None) -> None:
    """Print the table and write it, and what was found of every task, as Markdown beside the results.

    With `base` also the differences from this setting or method.
    """
    rows, (header, found) = summary.summarise(records), summary.by_task(records)
    differences = None if base is None else summary.against(records, base)
    if not rows:
        return
    Console(width=max(190, Console().width)).print(summary.table(rows, title))
    most = max((r.get("peak") or 0 for r in records), default=0)
    note = summary.NOTE + (f" Largest process: {most / 2**30:.1f} GiB, weights and all." if most else "")
    text = summary.markdown(rows) + f"\n{note}\n"
    if found:
        text += (
            f"\nFound, and NLL of the answer in nats per token, by task and tokens:\n\n{summary.lines(header, found)}"
        )
    if differences:
        header, lines = differences
        console = Console(width=max(190, Console().width))
        console.print(summary.terminal(header, lines, "differences with 95 % intervals, * where these exclude 0"))
        text += f"\nDifferences, 95 % intervals, * where these exclude 0:\n\n{summary.lines(header, lines)}"
    write(path.with_suffix(".md"), text)


def plot(path: Path, base: str | None = None) -> int:
    """Draw what is in a results file, and print it; with `base` also the differences from this setting or method."""
    records = run.read(path)
    if not records:
        print(f"eval: error: {path} holds no results; run quick or full first, or give --out", file=sys.stderr)
        return 2
    if not find_spec("matplotlib"):
        print("eval: error: plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 2
    rows, stem = summary.summarise(records), path.with_suffix("")
    try:
        show(records, path, str(path), base)
    except ValueError as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 2
    made = []
    for x, y, label, name in (
        ("held", "kl", "KL from the full cache, nats per token", "quality"),
        ("agnostic_held", "agnostic_nll", "NLL of hidden facts, question unseen, nats per token", "retrieval"),
        ("aware_held", "aware_nll", "NLL of hidden facts, question seen, nats per token", "retrieval-aware"),
    ):
        if any(x in r and y in r for r in rows):
            when = "mean over the continuation" if y == "kl" else "after the prompt"
            labels = f"bytes held, share of the full cache, {when}", label
            made += plots.pareto(rows, x, y, labels, stem.with_name(f"{stem.name}-{name}"))
    for mode in run.MODES:
        if some := [r["setting"] for r in rows if mode in r and _in_heat(r["setting"])]:
            made += plots.heat(records, sorted(some), mode, stem.with_name(f"{stem.name}-depth-{mode}"))
    print("\n".join(map(str, made)))
    return 0


def _in_heat(setting: str) -> bool:
    return setting == "full" or setting.endswith((" 50%", "bits=4", "bits=2", "rank=32"))


if __name__ == "__main__":
    sys.exit(main())
