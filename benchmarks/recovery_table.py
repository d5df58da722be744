"""The tables and correlations of docs/03-methods.md, made from the rows of the grid."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

Row = dict[str, Any]
Pair = tuple[float, float]
"""Alignment and recovery."""
ORDER = ("auto", "forward_kl", "reverse_kl", "jsd", "on_policy", "two_stage", "rewrite_sft", "sft")
RESAMPLES, FEWEST = 2000, 5
SAME_STUDENT = 1e-3
"""Of the gap: two machines round one checkpoint a little differently."""


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a table a damage and stage, then how alignment went with recovery."""
    parts = []
    for stage in ("final", "check", "screen"):
        for damage in dict.fromkeys(row["damage"] for row in rows if row["stage"] == stage):
            chosen = [row for row in rows if (row["stage"], row["damage"]) == (stage, damage)]
            parts.append(f"### {damage}, {stage}\n\n{_table(chosen)}")
    return "\n\n".join([*parts, correlations(rows), along(rows)])


def _table(rows: Sequence[Row]) -> str:
    names = (
        *(
            "method",
            "on",
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
    for device in dict.fromkeys(map(_device, rows)):
        mine = [row for row in rows if _device(row) == device]
        before = mine[0]["measures"]
        lines.append(_line(["*before*", device, "", "", *_values(before, 1), *_cka(mine[:1], 0), "", "", ""]))
        for method in sorted({row["method"] for row in mine}, key=_place):
            lines.append(_method(method, device, [row for row in mine if row["method"] == method]))
        autos = [row for row in mine if row["method"] == "auto" and row["baseline"]]
        for label in dict.fromkeys(row["baseline"]["label"] for row in autos):
            lines.append(_repair(label, device, [r for r in autos if r["baseline"]["label"] == label]))
    return "\n".join([*lines, *_leads(rows)])


def _device(row: Row) -> str:
    """Rows of before it was asked are of CPUs."""
    return str(row.get("device", "cpu")).removeprefix("NVIDIA ")


def _leads(rows: Sequence[Row]) -> list[str]:
    """How far `auto` is ahead of each other method, of the same seed and on the same test sequences."""
    autos = [row for row in rows if row["method"] == "auto" and row.get("sequences")]
    found = []
    for other in rows:
        rivals = [auto for auto in autos if auto["seed"] == other["seed"]]
        if other["method"] == "auto" or not other.get("sequences") or not rivals:
            continue
        ours = min(rivals, key=lambda auto: (_device(auto) != _device(other), _apart(auto, other)))
        value = lead(ours, other)
        if value:
            text = f"{other['method']} {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
            found.append(text + _remarks(ours, other))
    return ["", f"`auto` is ahead, paired over test sequences, of: {'; '.join(found)}."] if found else []


def _apart(ours: Row, theirs: Row) -> float:
    """How far the gaps before two runs differ: one recipe of damage gives two students on two machines."""
    here, there = (sum(row["sequences"]["before"]) for row in (ours, theirs))
    return abs(math.log(here / there))


def _remarks(ours: Row, theirs: Row) -> str:
    said = [
        f"seed {theirs['seed']}" if theirs["seed"] else "",
        f"{_device(theirs)} behind {_device(ours)}" if _device(theirs) != _device(ours) else "",
        "students of two machines" if _apart(ours, theirs) > SAME_STUDENT else "",
    ]
    return f" ({', '.join(filter(None, said))})" if any(said) else ""


def lead(ours: Row, theirs: Row) -> Any:
    """How much more of its gap our run won than theirs of its own, over the same test sequences."""
    import numpy as np

    from recoup.schemas import Estimate

    if ours["sequences"]["tokens"] != theirs["sequences"]["tokens"]:
        return None
    here, there = (
        np.array([row["sequences"][name] for name in ("floor", "before", "after")]) for row in (ours, theirs)
    )
    drawn = np.random.default_rng(0).integers(0, here.shape[1], (RESAMPLES, here.shape[1]))

    def share(kl: Any) -> Any:
        floor, before, after = kl.sum(-1)
        return (before - after) / (before - floor)

    low, high = np.quantile(share(here[:, drawn]) - share(there[:, drawn]), (0.025, 0.975))
    return Estimate(value=float(share(here) - share(there)), low=float(low), high=float(high))


def _repair(label: str, device: str, rows: Sequence[Row]) -> str:
    """The best training-free repair of some runs, and how far training is ahead of it."""
    found = [row["baseline"] for row in rows]
    keys = ("kl", "agreement", None, "bits_per_character", None, "keep")
    values = [
        f"{fmean(item[key] for item in found):.3f}"
        if key and all(item[key] is not None for item in found)
        else "–"
        for key in keys
    ]
    leads = [item["lead"] for item in found if item["lead"]]
    ahead = f"; behind by {_spread(leads)}" if leads else ""
    shares = [item["recovered"] for item in found if item["recovered"]]
    name = f"*{label}{ahead}*"
    return _line([name, device, str(len(rows)), _spread(shares), *values, "–", "–", "0", "", ""])


def _spread(estimates: Sequence[Row]) -> str:
    """Their mean, and the widest that their intervals reach."""
    if not estimates:
        return "–"
    low, high = min(item["low"] for item in estimates), max(item["high"] for item in estimates)
    return f"{fmean(item['value'] for item in estimates):.3f} [{low:.3f}, {high:.3f}]"


def _place(method: str) -> tuple[int, str]:
    return ORDER.index(method) if method in ORDER else len(ORDER), method


def _method(method: str, device: str, rows: Sequence[Row]) -> str:
    share = _spread([row["recovered"] for row in rows if row["recovered"]])
    mean = {
        key: [fmean(_number(row["measures"][key][at]) for row in rows) for at in range(3)]
        for key in rows[0]["measures"]
    }
    cost = [
        f"{fmean(row['tokens'] for row in rows):,.0f}",
        f"{fmean(row['cpu_minutes'] for row in rows):.1f}",
        f"{max(row['peak_gib'] for row in rows):.1f}",
    ]
    return _line([method, device, str(len(rows)), share, *_values(mean, 2), *_cka(rows, 1), *cost])


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


def along(rows: Sequence[Row]) -> str:
    """The same over the points of every training, on validation; trainings are resampled, not points."""
    kinds: dict[str, Callable[[Row, Row], float]] = {
        "last layer, raw change": lambda point, first: point["last"] - first["last"],
        "last layer, share of headroom": lambda point, first: _headroom(point["last"], first["last"]),
        "mean of layers, raw change": lambda point, first: point["mean"] - first["mean"],
        "mean of layers, share of headroom": lambda point, first: _headroom(point["mean"], first["mean"]),
    }
    runs = [row for row in rows if row.get("points")]
    groups = {name: [row for row in runs if row["damage"] == name] for name in _damages(runs)}
    lines = ["### Alignment and recovery along the trainings", ""]
    lines += [_line(["damage", "trainings", "points", *kinds]), "|" + "---|" * 7]
    for name, group in [*groups.items(), ("pooled", runs)]:
        clusters = {kind: [_course(row["points"], value) for row in group] for kind, value in kinds.items()}
        points = sum(map(len, next(iter(clusters.values()))))
        found = [_rank(courses) for courses in clusters.values()]
        lines.append(_line([name, str(len(group)), str(points), *found]))
    return "\n".join(lines)


def _course(points: Sequence[Row], value: Callable[[Row, Row], float]) -> list[Pair]:
    """(alignment, share of the KL won) at each point of a training after its first."""
    keys = ("validation_kl", "last", "mean")
    measured = [point for point in points if all(point[key] is not None for key in keys)]
    if not measured:
        return []
    first, *later = measured
    return [(value(point, first), 1 - point["validation_kl"] / first["validation_kl"]) for point in later]


def _headroom(now: float, before: float) -> float:
    return (now - before) / (1 - before)


def _damages(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["damage"] for row in rows))


def _shown(pairs: Sequence[Pair]) -> str:
    return _rank([[pair] for pair in pairs])


def _rank(clusters: Sequence[Sequence[Pair]]) -> str:
    """Spearman's correlation of all pairs; its interval is from resampled clusters."""
    if len(clusters) < FEWEST:
        return "–"
    draw = random.Random(0)
    drawn = (draw.choices(clusters, k=len(clusters)) for _ in range(RESAMPLES))
    found = sorted(map(_spearman, drawn))
    low, high = found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]
    return f"{_spearman(clusters):+.2f} [{low:+.2f}, {high:+.2f}]"


def _spearman(clusters: Sequence[Sequence[Pair]]) -> float:
    """0 where one side is constant."""
    from recoup_ml.rank_correlation import spearman

    x, y = zip(*(pair for cluster in clusters for pair in cluster), strict=True)
    found = spearman(x, y)
    return found.value if found else 0.0
