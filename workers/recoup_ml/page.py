"""The report as one HTML page: what a person reads to decide whether to deploy.

The page stands alone: no script, no font, no picture is fetched, and its own content policy forbids
it. Prompts and answers come from models and are untrusted: Jinja escapes everything but the charts,
and control characters are made visible. The layout is `page.html.jinja`; here is what it needs in
words and places. Numbers are computed elsewhere; nothing here judges.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from recoup.schemas import Estimate, Outcome, Report, Stopped
from recoup_ml import plots
from recoup_ml.plan import Form


@dataclass(frozen=True)
class Verdict:
    """An outcome in words; `tone` picks colour and icon."""

    word: str
    tone: str
    meaning: str


VERDICTS: Final[dict[Outcome, Verdict]] = {
    "recovered": Verdict("Recovered", "good", "The lost ability is back, by more than the gate asks."),
    "partial": Verdict(
        "Partly recovered", "part", "Some of the lost ability is back, less than the gate asks."
    ),
    "no_gain": Verdict("No gain", "none", "Any gain is within the noise of the measurement."),
    "regressed": Verdict("Regressed", "bad", "Training made the model worse. Its weights were not kept."),
    "not_needed": Verdict(
        "Not needed", "calm", "The student is as good as its teacher. Nothing was trained."
    ),
    "taught": Verdict("Taught", "good", "The new skill is there, and the model stayed what it was."),
    "taught_with_forgetting": Verdict(
        "Taught, with forgetting",
        "part",
        "The new skill is there, but the model is not what it was.",
    ),
    "not_taught": Verdict("Not taught", "none", "The skill was not learnt. Its weights were not kept."),
}

PHASES: Final = {
    "teacher": "the teacher's answers",
    "student": "the student's own answers",
    "demonstrated": "the student's own answers, scored by a teacher that was shown the references",
    "rewrites": "references in the teacher's words",
    "references": "references as they are",
}
FORMS: Final[dict[Form, str]] = {
    "adapter": "an adapter beside the packed weights",
    "merged": "both in one model of plain numbers",
    "requantized": "that model, packed again",
}
STOPPED: Final[dict[Stopped, str]] = {
    "steps": "all steps taken",
    "gap_closed": "the gap was closed",
    "regression": "validation was worse than before training",
    "plateau": "validation stopped getting better",
    "diverged": "the loss was not finite",
}


def html_page(report: Report) -> str:
    """One self-contained page; the same report gives the same bytes."""
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            gate=report.gate,
            verdict=VERDICTS[report.outcome],
            primary=next((measure for measure in report.measures if measure.name == "kl"), None),
            loss_svg=_inline(plots.loss_curve(report.training)) if report.training else None,
            diagonal_svg=_inline(plots.alignment_diagonal(report.alignment)),
            trajectory=report.training.trajectory if report.training else None,
            trajectory_svg=_trajectory(report),
            heatmap_svg=_inline(plots.alignment_heatmap(report.alignment)),
            ink=plots.INK,
            FORMS=FORMS,
            PHASES=PHASES,
            STOPPED=STOPPED,
        )
    )


@cache  # which keeps the template's compiled form
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("recoup_ml", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=size,
        day=day,
        duration=duration,
        fold=fold,
        number=number,
        percent=percent,
        scale=scale,
        visible=visible,
    )
    return environment


def _trajectory(report: Report) -> Markup | None:
    known = report.training and report.training.trajectory
    return _inline(plots.trajectory_curves(known)) if known else None


def _inline(svg: str) -> Markup:
    """The `<svg>` element without the XML prolog; drawn by us, so it is not escaped."""
    return Markup(svg[svg.index("<svg") :])


def number(value: float | None) -> str:
    """Three significant digits: 0.702, 0.0081, 18.0, 1,024; a dash for null."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}".removesuffix(".") if abs(value) >= 0.1 else f"{value:.3g}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A fraction as a whole percentage: 86 %."""
    if value is None:
        return "–"
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%".replace("-", "−") if math.isfinite(value) else "not finite"


def duration(seconds: float) -> str:
    """42 s, 12 min 30 s, 3 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Bytes in binary units: 4.1 GiB."""
    power = min(4, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def day(unix_seconds: float) -> str:
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def visible(text: str) -> str:
    """Control characters as their pictures (NUL as ␀); line ends and tabs stay."""
    return text.translate(
        {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
    )


def fold(text: str, length: int = 320) -> tuple[str, str]:
    """The first `length` characters or so, cut at a word, and the rest, empty if little would be left."""
    if len(text) <= 1.25 * length:
        return text, ""
    cut = text.rfind(" ", length // 2, length)
    cut = cut if cut > 0 else length
    return text[:cut], text[cut:]


@dataclass(frozen=True)
class Scale:
    """A track on which recovered fractions stand: from 0 to 1, longer where an interval reaches past."""

    start: float
    end: float

    def place(self, fraction: float) -> float:
        """Percent of the track's width; what lies beyond an end stands at that end."""
        return round(100 * min(1.0, max(0.0, (fraction - self.start) / (self.end - self.start))), 2)


def scale(estimates: Iterable[Estimate | None]) -> Scale:
    """One scale for all of them, from -1 to 2 at most."""
    ends = [end for x in estimates if x for end in (x.value, x.low, x.high) if end is not None]
    return Scale(start=max(-1.0, min(0.0, *ends, 0.0)), end=min(2.0, max(1.0, *ends, 1.0)))
