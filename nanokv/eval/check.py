"""The harness checked: what another tool measured on the same model, windows and questions, beside what is here.

Their methods cut a cache once, when the prompt is in, and forget nothing while text is generated; the settings below
say the same in this project's parameters. Figures of the other tool are in reference.py.
"""

import math
import statistics

from nanokv.eval import reference, run, summary, tasks

AS_SNAPKV = "window=64,kernel=5,pooling='avg'"
METHODS = {  # name: (method, parameters) that do what the other tool's does by default
    "random": ("random", ""),
    "streamingllm": ("keydiff", "n_sink=4,window={past_sinks},decode_update=False"),
    "knorm": ("knorm", ""),
    "keydiff": ("keydiff", "decode_update=False"),
    "tova": ("tova", "decode_update=False"),
    "snapkv": ("snapkv", AS_SNAPKV),
    "pyramidkv": ("pyramidkv", AS_SNAPKV + ",mode='kvpress'"),
    "adakv": ("adakv", AS_SNAPKV + ",variant='kvpress'"),
    "expected_attention": ("expected_attention", "window=0"),
}
SLIDING = run.Setting("streamingllm", "budget", 0, "reindex=False", "streamingllm, forgetting in every step")
WHY = {
    "random": "other draws; which heads keep the first token is drawn once for all windows, so that errors miss it",
    "kivi": "theirs rounds the prompt once; ours goes on packing while text is generated, with fp16 scales",
    SLIDING.name: "its window slides on during question and answer, theirs stays and grows",
}


def _setting(name: str, removed: float) -> run.Setting:
    method, more = METHODS[name]
    return run.Setting(method, "budget", 1 - removed, more, name)


def settings() -> list[run.Setting]:
    """Return the full cache and what the other tool measured, in this project's words."""
    out = [run.Setting("full")] + [_setting(name, r) for name in METHODS for r in reference.REMOVED]
    return out + [run.Setting("kivi", "bits", b, modes=("agnostic",)) for b in reference.KIVI]


def sliding() -> list[run.Setting]:
    """Return this project's own streamingllm at the same strengths, for its hit rate."""
    return [run.Setting(SLIDING.method, "budget", 1 - r, SLIDING.more, SLIDING.name, ("agnostic",))
            for r in reference.REMOVED]  # fmt: skip


def plan() -> dict[run.Unit, list[run.Setting]]:
    """Return the same windows and questions as theirs, and the settings for each."""
    out = {u: settings() for u in run.units("text", 2048, 8, 256, batch=4)}
    out |= {u: settings() + sliding() for u in run.units("passkey", 2048, 12, seed=2048 + 7, batch=4)}
    return out | {u: [run.Setting("full", modes=("agnostic",))] for u in run.units("passkey", 1024, 20, batch=5)}


def judge(ours: float, theirs: float, error: float, why: str = "", least: float = 0.0015) -> tuple[str, str]:
    """Return the difference in standard errors, and "equal" (to rounding), "within error" (two), or what differs."""
    off = abs(ours - theirs)
    if off <= least:
        return "-", "equal"
    if not error or math.isnan(error):
        return "-", "one value, no error"
    z = f"{(ours - theirs) / error:+.1f}"
    if off <= 2 * error:
        return z, "within error" + (f": {why}" if why else "")
    return z, why or "NOT EXPLAINED"


def rises(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the table of NLL rises: header and rows."""
    header = ["method", "strength", "spec here", "rise here, nats", "rise there", "difference", "in errors", "verdict"]
    rows = []
    for name, what, label, theirs, their_error in _points():
        of = [r for r in records if r["setting"] == label and r["task"] == "text" and "error" not in r]
        if not of:
            continue
        values = [r["rise"] for r in of]
        ours, own = statistics.fmean(values), summary.error(values)
        z, verdict = judge(ours, theirs, own, WHY.get(name, ""))
        there = f"{theirs:+.4f}" if name == "kivi" else f"{theirs:+.3f}"
        there += f" ± {their_error:.4f}" if their_error else ""
        rows.append([name, what, f"`{of[0]['spec']}`", f"{ours:+.4f} ± {own:.4f}",
                     there, f"{ours - theirs:+.4f}", z, verdict])  # fmt: skip
    return header, rows


def _points():
    """Yield method, strength, label, their rise and its standard error or None."""
    for name, theirs in reference.RISE.items():
        errors = dict(zip((0.5, 0.9), reference.RISE_ERROR[name], strict=True))
        for removed, value in zip(reference.REMOVED, theirs, strict=True):
            yield name, f"{removed:.0%} removed", _setting(name, removed).label, value, errors.get(removed)
    for bits, (value, error) in reference.KIVI.items():
        yield "kivi", f"{bits} bits", run.Setting("kivi", "bits", bits).label, value, error


def passkeys(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the table of passkeys: header and rows."""
    header = ["method", "strength", "question", "found here", "there", "NLL here", "there", "in errors", "verdict"]
    rows = []
    for name, what, label, mode, n, their in _asked():
        of = [
            r for r in records if (r["setting"], r["task"], r["context"], r.get("mode")) == (label, "passkey", n, mode)
        ]
        of = [r for r in of if "error" not in r]
        if not of:
            continue
        values, (found, total, theirs) = [r["nll"] for r in of], their
        ours, own = statistics.fmean(values), summary.error(values)
        z, verdict = "-", "equal" if sum(r["exact"] for r in of) == found else "NOT EXPLAINED"
        if theirs is not None:
            z, verdict = judge(ours, theirs, own, WHY.get(name, ""), least=0.006)
        rows.append([name, what, "seen" if mode == "aware" else "unseen", f"{sum(r['exact'] for r in of)}/{len(of)}",
                     f"{found}/{total}", f"{ours:.2f} ± {own:.2f}", "-" if theirs is None else f"{theirs:.2f}", z,
                     verdict])  # fmt: skip
    return header, rows


def _asked():
    """Yield method, strength, label, mode, tokens, and their (found, of, NLL per digit or None)."""
    for (_, n), their in reference.FULL.items():
        yield "full", f"{n:,} tokens", "full", "agnostic", n, their
    for mode, table in reference.PASSKEY.items():
        for name, theirs in table.items():
            for removed, (found, nll) in zip(reference.REMOVED, theirs, strict=True):
                yield name, f"{removed:.0%} removed", _setting(name, removed).label, mode, 2048, (found, 12, nll)
    for setting, (found, nll) in zip(sliding(), reference.PASSKEY["agnostic"]["streamingllm"], strict=True):
        yield setting.name, f"{1 - setting.value:.0%} removed", setting.label, "agnostic", 2048, (found, 12, nll)
    for bits, (found, nll) in reference.KIVI_PASSKEY.items():
        yield "kivi", f"{bits} bits", run.Setting("kivi", "bits", bits).label, "agnostic", 2048, (found, 12, nll)


def kept(records: list[dict]) -> list[str]:
    """Return lines that compare what streamingllm finds with what it keeps: it cannot find what it has forgotten."""
    out = []
    for setting in [s for s in settings() if s.name == "streamingllm"] + sliding():
        of = [r for r in records if r["setting"] == setting.label and r.get("mode") == "agnostic" and "error" not in r]
        if of:
            hits, share = sum(r["exact"] for r in of), setting.value
            inside = sum(r["depth"] >= 1 - share for r in of)
            verdict = "equal" if hits == inside else "differs"
            out.append(
                f"{setting.label} kept: found {hits}/{len(of)}, keys inside the window {inside}/{len(of)}: {verdict}"
            )
    return out


def report(records: list[dict]) -> tuple[list[tuple[str, tuple]], list[str]]:
    """Return titled tables and notes."""
    tables = [("NLL rise of 256 tokens after 2,048, nats per token (± standard error over 8 windows)", rises(records)),
              ("Passkey, found and NLL per digit (± standard error over questions)", passkeys(records))]  # fmt: skip
    notes = [f"There: {reference.TOOL}; kivi: {reference.FAKE}."]
    full = [r["nll"] for r in records if r["setting"] == "full" and r["task"] == "text" and "error" not in r]
    if full:
        notes.append(
            f"Perplexity of the full cache: {math.exp(statistics.fmean(full)):.2f}, there {reference.FULL_PPL}."
        )
    if len(tasks.prose()) != reference.TEXT_CHARACTERS:
        notes.append(
            "This Python's documentation is not that of Python 3.11, on which theirs was measured: other windows."
        )
    return [t for t in tables if t[1][1]], notes + kept(records)
