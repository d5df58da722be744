"""The tables and correlations of docs/03-methods.md, made from the rows of the grid."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

Row = dict[str, Any]
ORDER = ("auto", "forward_kl", "reverse_kl", "jsd", "on_policy", "two_stage", "rewrite_sft", "sft")
RESAMPLES = 2000


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a table a damage and stage, then how alignment went with recovery."""
    parts = []
    for stage in ("final", "screen"):
        for damage in dict.fromkeys(row["damage"] for row in rows if row["stage"] == stage):
            chosen = [row for row in rows if (row["stage"], row["damage"]) == (stage, damage)]
            parts.append(f"### {damage}, {stage}\n\n{_table(chosen)}")
    return "\n\n".join([*parts, correlations(rows)])


def _table(rows: Sequence[Row]) -> str:
    names = (
        *(
            "method",
            "seeds",
            "recovered [95 %]",
            "KL",
            "agreement",
            "ppl answers",
            "bits/char",
            "capitals",
            "new skill",
        ),
        *("CKA last", "CKA mean", "tokens", "CPU min", "GiB"),
    )
    lines = [_line(names), "|" + "---|" * len(names)]
    before = rows[0]["measures"]
    lines.append(_line(["*before*", "", "", *_values(before, 1), *_cka(rows[:1], 0), "", "", ""]))
    methods = dict.fromkeys(row["method"] for row in rows)
    for method in sorted(methods, key=_place):
        lines.append(_method(method, [row for row in rows if row["method"] == method]))
    lines += [_repair(row) for row in rows if row["baseline"]]
    return "\n".join(lines)


def _repair(row: Row) -> str:
    """The best training-free repair of one run, and how far training is ahead of it."""
    found, share, lead = row["baseline"], row["baseline"]["recovered"], row["baseline"]["lead"]
    keys = ("kl", "agreement", None, "bits_per_character", None, "keep")
    values = [f"{found[key]:.3f}" if key and found[key] is not None else "–" for key in keys]
    interval = f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]" if share else "–"
    ahead = f"; behind by {lead['value']:.3f} [{lead['low']:.3f}, {lead['high']:.3f}]" if lead else ""
    name = f"*{found['label']}, seed {row['seed']}{ahead}*"
    return _line([name, "1", interval, *values, "–", "–", "0", "", ""])


def _place(method: str) -> tuple[int, str]:
    return ORDER.index(method) if method in ORDER else len(ORDER), method


def _method(method: str, rows: Sequence[Row]) -> str:
    recovered = [row["recovered"] for row in rows if row["recovered"]]
    share = (
        f"{fmean(item['value'] for item in recovered):.3f} "
        f"[{min(item['low'] for item in recovered):.3f}, {max(item['high'] for item in recovered):.3f}]"
        if recovered
        else "–"
    )
    mean = {
        key: [fmean(_number(row["measures"][key][at]) for row in rows) for at in range(3)]
        for key in rows[0]["measures"]
    }
    cost = [
        f"{fmean(row['tokens'] for row in rows):,.0f}",
        f"{fmean(row['cpu_minutes'] for row in rows):.1f}",
        f"{max(row['peak_gib'] for row in rows):.1f}",
    ]
    return _line([method, str(len(rows)), share, *_values(mean, 2), *_cka(rows, 1), *cost])


def _values(measures: dict[str, Sequence[float]], at: int) -> list[str]:
    keys = ("kl", "agreement", "perplexity_answers", "bits_per_character", "task:capitals", "keep")
    return [f"{measures[key][at]:.3f}" if key in measures else "–" for key in keys]


def _cka(rows: Sequence[Row], at: int) -> list[str]:
    return [f"{fmean(_number(row[key][at]) for row in rows):.3f}" for key in ("cka_last", "cka_mean")]


def _number(value: float | None) -> float:
    """Of what was not measured, or not finite: not a number."""
    return math.nan if value is None else value


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def correlations(rows: Sequence[Row]) -> str:
    """Spearman's rank correlation of alignment won with the share of the KL gap won, by damage and pooled."""
    measured = [row for row in rows if row["recovered"] and row["headroom_last"] and row["cka_last"][1]]
    kinds: dict[str, Callable[[Row], float]] = {
        "last layer, raw change": lambda row: row["cka_last"][1] - row["cka_last"][0],
        "last layer, share of headroom": lambda row: row["headroom_last"]["value"],
        "mean of layers, raw change": lambda row: row["cka_mean"][1] - row["cka_mean"][0],
        "mean of layers, share of headroom": lambda row: row["headroom_mean"]["value"],
    }
    groups = {name: [row for row in measured if row["damage"] == name] for name in _damages(measured)}
    lines = ["### Alignment and recovery", "", _line(["damage", "runs", *kinds]), "|" + "---|" * 6]
    for name, group in [*groups.items(), ("pooled", measured)]:
        pairs = [[(value(row), row["recovered"]["value"]) for row in group] for value in kinds.values()]
        lines.append(_line([name, str(len(group)), *(_shown(pair) for pair in pairs)]))
    return "\n".join(lines)


def _damages(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["damage"] for row in rows))


def _shown(pairs: Sequence[tuple[float, float]]) -> str:
    if len(pairs) < 5:
        return "–"
    draw = random.Random(0)
    found = sorted(spearman(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
    return f"{spearman(pairs):+.2f} [{low:+.2f}, {high:+.2f}]"


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation of the ranks, ties sharing their mean rank; 0 where one side is constant."""
    x, y = (_ranks(side) for side in zip(*pairs, strict=True))
    mx, my = fmean(x), fmean(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return sxy / (sxx * syy) ** 0.5 if sxx and syy else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: index for index, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) - 1) / 2 for value in values]
