"""From results to tables: means over windows and questions, with their errors."""

import math
import statistics

from rich import box
from rich.table import Table

T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]  # fmt: skip


def t975(df: int) -> float:
    """Return the 97.5 % point of Student's t distribution with df degrees of freedom, to three digits."""
    return T975[df - 1] if df <= len(T975) else 1.96 + 2.5 / df


def error(values: list[float]) -> float:
    """Return the standard error of the mean, nan for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its 95 % interval's half width (Student's t; nan for fewer than two values)."""
    n = len(values)
    return statistics.fmean(values), t975(n - 1) * error(values) if n > 1 else math.nan


def wilson(k: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share k / n (Wilson)."""
    z2, p = 1.96**2, k / n
    mid, half = p + z2 / (2 * n), 1.96 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (mid - half) / (1 + z2 / n), (mid + half) / (1 + z2 / n)


def failures(records: list[dict]) -> list[str]:
    """Return one line for each setting that failed on a task."""
    bad = {(r["setting"], r["task"], r["context"], r["error"]): None for r in records if "error" in r}
    return [f"failed: {setting} on {task}, {n} tokens: {what}" for setting, task, n, what in bad]


def summarise(records: list[dict]) -> list[dict]:
    """Return one row per setting, by bytes held: shares of the full cache's bytes, text and retrieval scores."""
    rows, records = [], [r for r in records if "error" not in r]
    for setting in dict.fromkeys(r["setting"] for r in records):
        mine = [r for r in records if r["setting"] == setting]
        prose, asked = [r for r in mine if r["task"] == "text"], [r for r in mine if r["task"] != "text"]
        row = {"setting": setting, "method": setting.split()[0]}
        if prose:
            row["held"] = statistics.fmean(r["held"] / r["full"] for r in prose)
            row["start"], row["end"] = (statistics.fmean(r[f"held_{at}"] for r in prose) for at in ("start", "end"))
            row["overhead"] = statistics.fmean(r["overhead"] / r["held"] for r in prose)
            for name in ("rise", "kl", "same"):
                row[name], row[name + "_ci"] = mean([r[name] for r in prose])
            row["below"] = row["rise"] < -BELOW and all(r["rise"] < 0 for r in prose)
        for mode in ("agnostic", "aware"):
            if of := [r for r in asked if r["mode"] == mode]:
                row[mode], row[mode + "_n"] = sum(r["exact"] for r in of), len(of)
                row[mode + "_nll"], row[mode + "_nll_ci"] = mean([r["nll"] for r in of])
                row[mode + "_held"] = statistics.fmean(r["held"] / r["full"] for r in of)
                row.setdefault("held", row[mode + "_held"])
        rows.append(row)
    return sorted(rows, key=lambda r: (-r["held"], r["setting"]))


BELOW = 0.02  # nats below the full cache's NLL, in the mean over windows, that no loss explains
COLUMNS = {
    "setting": "setting", "held": "bytes held", "mib": "MiB at start, end", "overhead": "of these not payload",
    "rise": "NLL rise, nats", "kl": "KL, nats", "same": "same top token", "agnostic": "found, question unseen",
    "agnostic_nll": "NLL", "aware": "found, question seen", "aware_nll": "NLL",
}  # fmt: skip
NOTE = ("Bytes held: mean over the continuation of the text (without text: after the prompt), share of a full cache of "
        "the same tokens, spare slots and all. ± is a 95 % interval over windows (Student's t), the range behind a "
        "count is one of the share (Wilson).")  # fmt: skip


def count(k: int, n: int) -> str:
    """Return a count with its interval, such as "6/12 (25-75 %)"."""
    low, high = wilson(k, n)
    return f"{k}/{n} ({100 * low:.0f}-{100 * high:.0f} %)"


def cells(row: dict) -> list[str]:
    """Return a row's cells as text, "-" for what was not measured."""

    def with_error(name, digits):
        if name not in row:
            return "-"
        half = row[name + "_ci"]
        return f"{row[name]:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    def share(name):
        return count(row[name], row[name + "_n"]) if name in row else "-"

    rise = with_error("rise", 3) + (" (below full: looks ahead?)" if row.get("below") else "")
    mib = f"{row['start'] / 2**20:.1f}, {row['end'] / 2**20:.1f}" if "start" in row else "-"
    return [row["setting"], f"{row['held']:.1%}", mib, f"{row['overhead']:.1%}" if "overhead" in row else "-",
            rise, with_error("kl", 4), f"{row['same']:.1%}" if "same" in row else "-",
            share("agnostic"), with_error("agnostic_nll", 2), share("aware"), with_error("aware_nll", 2)]  # fmt: skip


def by_task(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: what each setting found of every task and length, question unseen and seen."""
    asked = [r for r in records if "error" not in r and r["task"] != "text"]
    names = sorted({(r["task"], r["context"], r["mode"]) for r in asked})
    out = []
    for row in summarise(asked):
        line = [row["setting"]]
        for name in names:
            of = [r for r in asked if (r["task"], r["context"], r["mode"], r["setting"]) == (*name, row["setting"])]
            line.append(f"{sum(r['exact'] for r in of)}/{len(of)}, {statistics.fmean(r['nll'] for r in of):.2f}"
                        if of else "-")  # fmt: skip
        out.append(line)
    return ["setting", *(f"{task} {n:,}, {'seen' if mode == 'aware' else 'unseen'}" for task, n, mode in names)], out


def against(records: list[dict], base: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: what each setting has more than `base`, on the same windows and questions.

    `base` is a setting, or a method, which is then taken at each setting's own strength. Differences tell methods apart
    that means do not, since windows differ more than methods. ValueError if nothing can be compared with it.
    """
    found: dict[str, dict] = {}
    for r in records:
        if "error" not in r:
            parts = r["key"].split("|")  # as run.Unit.key joins them: the last but one names the setting
            found.setdefault(r["setting"], {})[tuple(parts[:-2] + parts[-1:])] = r
    out = []
    for setting, mine in found.items():
        other = base if base in found else " ".join([base, *setting.split()[1:]])
        if other == setting or other not in found:
            continue
        line = []
        for name, mode in (("kl", None), ("rise", None), ("nll", "agnostic"), ("nll", "aware")):
            pairs = [(mine[k], r) for k, r in found[other].items() if k in mine and r.get("mode") == mode]
            line.append(_more([a[name] - b[name] for a, b in pairs]))
        if set(line) != {"-"}:
            out.append([setting, other, *line])
    if not out:
        raise ValueError(f"nothing can be compared with {base!r} among {', '.join(sorted(found)) or 'no results'}")
    header = ["setting", "less", "KL, nats", "NLL rise, nats", "NLL of facts, question unseen", "question seen"]
    return header, sorted(out)


def _more(differences: list[float]) -> str:
    """Return a mean difference, with its interval if there are two, and * if that excludes 0."""
    if not differences:
        return "-"
    more, half = mean(differences)
    text = f"{more:+.3f}"
    if math.isnan(half):
        return text
    return f"{text} ± {half:.3f}" + (" *" if abs(more) > half and abs(more) >= 0.0005 else "")


def terminal(header: list[str], rows: list[list[str]], title: str) -> Table:
    """Return rows for a terminal."""
    out = Table(title=title, box=box.SIMPLE)
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if i else "left")
    for row in rows:
        out.add_row(*row)
    return out


def lines(header: list[str], rows: list[list[str]]) -> str:
    """Return rows as a Markdown table."""
    body = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(row) + " |\n" for row in body)


def table(rows: list[dict], title: str) -> Table:
    """Return a summary for a terminal."""
    return terminal(list(COLUMNS.values()), [cells(row) for row in rows], title)


def markdown(rows: list[dict]) -> str:
    """Return a summary as a Markdown table."""
    return lines(list(COLUMNS.values()), [cells(row) for row in rows])
