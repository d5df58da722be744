"""What the command line prints: tables and lines made of the service's answers.

Whatever a server or a model wrote passes through `clean` before it reaches a terminal.
"""

from collections.abc import Sequence
from datetime import datetime
from statistics import fmean

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recoup.schemas import (
    Alignment,
    AlignmentState,
    Baseline,
    Cost,
    CostEstimate,
    DamageReport,
    Deployment,
    DiagnosisReport,
    DryRun,
    Estimate,
    File,
    Measure,
    OutputForm,
    Recovery,
    Report,
    Sample,
    Teaching,
    TrainingReport,
)

NONE = "–"


def print_verdict(report: Report, console: Console) -> None:
    """The verdict in lines, the table of what was measured, and the report's remarks."""
    for line in verdict_lines(report):
        console.print(Text(line), soft_wrap=True)
    console.print(verdict_table(report))
    for line in (*form_lines(report.forms), *trajectory_lines(report.training)):
        console.print(Text(line), soft_wrap=True)
    for remark in report.remarks:
        console.print(Text(f"note: {clean(remark)}"), soft_wrap=True)


def verdict_lines(report: Report) -> list[str]:
    """The outcome, why, and the recovered fraction with its interval, or what was learnt."""
    fraction = _estimate(report.recovered) if report.recovered else "not measured"
    said = [f"outcome: {report.outcome}", f"reason: {clean(report.reason)}"]
    if report.teaching:
        return [*said, *_teaching_lines(report.teaching)]
    return [
        *said,
        f"recovered fraction: {fraction}",
        *_baseline_lines(report.baseline),
    ]


def _teaching_lines(taught: Teaching) -> list[str]:
    """What was learnt, what was lost over it, and what costs no training beside it."""
    changes = {"loss on held-out demonstrations": taught.loss, "answered rightly": taught.right}
    shown = taught.in_context
    return [
        *(
            f"{name}: {_number(item.before)} → {_number(item.after)}, change {_estimate(item.change)}"
            for name, item in changes.items()
        ),
        f"drift from what it was: {_estimate(taught.drift)}",
        *(
            [
                f"untaught, with {shown.shots} demonstrations in its context: loss {_number(shown.loss)}, "
                f"right {_number(shown.right)}; lead of the training over it: {_estimate(shown.lead)}"
            ]
            if shown
            else []
        ),
    ]


def _baseline_lines(baseline: Baseline | None) -> list[str]:
    """What costs no training, beside it."""
    if baseline is None:
        return []
    kept = "" if baseline.keep is None else f", new skill {_number(baseline.keep)}"
    return [
        f"best without training: {clean(baseline.label)}: {_estimate(baseline.recovered)}{kept}",
        f"lead over it: {_estimate(baseline.lead)}",
    ]


def print_diagnosis(report: DiagnosisReport, console: Console) -> None:
    """What was found in the weights, what student and teacher measure, and how alike their layers are."""
    needed = "there is something to recover" if report.needed else "there is nothing to recover"
    console.print(Text(f"damage: {report.damage.kind}; {needed}"), soft_wrap=True)
    for sentence in report.damage.evidence:
        console.print(Text(f"  {clean(sentence)}"), soft_wrap=True)
    console.print(_exam_table(report.measures))
    console.print(_layers_table(report.damage, report.alignment))
    for remark in report.remarks:
        console.print(Text(f"note: {clean(remark)}"), soft_wrap=True)


def _exam_table(measures: Sequence[Measure]) -> Table:
    table = Table("measure", "teacher", "student", "n")
    for measure in measures:
        name, teacher, student, *_ = _measure_row(measure)
        table.add_row(name, teacher, student, str(measure.n))
    return table


def _layers_table(damage: DamageReport, alignment: Alignment) -> Table:
    """A line for each pair of corresponding layers: how far apart their weights, how alike their states."""
    table = Table("student", "teacher", "weight distance", "CKA [95 %]", "ceiling", "floor")
    distances = [None, *damage.distance_by_layer]
    for place, (mine, theirs) in enumerate(alignment.layer_map):
        names = alignment.student_layers[mine], alignment.teacher_layers[theirs]
        values = alignment.ceiling[place], alignment.floor[place]
        table.add_row(
            *map(clean, names),
            _number(distances[mine] if mine < len(distances) else None),
            _estimate(alignment.before.diagonal[place]),
            *map(_number, values),
        )
    return table


def form_lines(forms: Sequence[OutputForm]) -> list[str]:
    """What each form of a packed student's recovery would be worth, and how large it is."""
    return [
        f"as {form.form}: recovered {_estimate(form.recovered)}, {form.bytes / 2**20:,.1f} MiB"
        f"{', handed over' if form.handed_over else ''}"
        for form in forms
    ]


def trajectory_lines(training: TrainingReport | None) -> list[str]:
    """How alignment went with recovery along the training, where that was measured."""
    found = training.trajectory.correlations if training and training.trajectory else []
    return [
        f"along the training, alignment ({clean(item.alignment)}) with recovery: "
        f"Spearman {_estimate(item.spearman)}, Kendall {_estimate(item.kendall)}, n = {item.n}"
        for item in found
    ]


def verdict_table(report: Report) -> Table:
    """Each measure of the teacher, before and after; then the alignment; in the caption what it cost."""
    title = f"{'Teaching' if report.teaching else 'Recovery'} {clean(report.recovery)}"
    table = Table(title=Text(title), caption=Text(_cost(report.cost, report.training)))
    for column in ("measure", "teacher", "before", "after", "recovered [95 %]"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for measure in report.measures:
        table.add_row(*_measure_row(measure), style="red" if measure.worse else None)
    table.add_section()
    for row in _alignment_rows(report.alignment):
        table.add_row(*row)
    return table


def jobs_table(recoveries: Sequence[Recovery]) -> Table:
    """One row a job."""
    table = Table("id", "state", "stage", "outcome", "student", "created")
    for job in recoveries:
        id, student = Text(clean(job.id)), Text(clean(job.request.student.source))
        table.add_row(id, state(job), job.stage, job.outcome, student, _moment(job.created_at))
    return table


def deployments_table(found: Sequence[Deployment]) -> Table:
    """One row a deployment."""
    table = Table("id", "name", "state", "recovery", "servers", "created")
    for one in found:
        ready = sum(replica.state == "ready" for replica in one.replicas)
        id, name, recovery = (Text(clean(text)) for text in (one.id, one.name, one.lineage.recovery))
        servers = f"{ready} of {len(one.replicas)}" if one.replicas else "none"
        table.add_row(id, name, one.state, recovery, servers, _moment(one.created_at))
    return table


def deployment_lines(one: Deployment) -> list[str]:
    """Where it stands, and how to use it once it is live."""
    lines = [clean(f"{one.id} {one.state}: {one.name}, of {one.lineage.recovery}")]
    if one.reason:
        lines.append(clean(f"{one.reason.message} ({one.reason.code})"))
    if one.state == "pending" and one.reason and one.kind == "model":
        folder = f"<RECOUP_HOME>/{one.launch.arguments[0]}"
        lines.append(clean(f"start it with: recoup-server teacher --model {folder} --port …"))
    if one.state == "live":
        lines.append(clean(f"ask it with: recoup chat {one.name} '…', or as model {one.name} at /v1"))
    return lines


def dry_run_lines(found: DryRun) -> list[str]:
    """What would be done, what it would cost, what it would be refused for, and what is to be known."""
    return [
        *(clean(f"{choice.name}: {choice.value} ({choice.why})") for choice in found.plan),
        *([f"estimate: {estimate_line(found.estimate)}"] if found.estimate else []),
        *(clean(f"refused: {item.pointer or '/'}: {item.message}") for item in found.findings),
        *(clean(f"warning: {item.pointer or '/'}: {item.message}") for item in found.warnings),
    ]


def estimate_line(cost: CostEstimate) -> str:
    known = "no time, as this class of machine has finished no recovery yet"
    if cost.seconds is not None:
        known = f"{span(cost.seconds)} by {cost.calibrated_on} finished recoveries"
    return (
        f"{known}, {cost.tokens:,} tokens at most, "
        f"{cost.memory_bytes / 2**30:.1f} GiB of memory, {cost.disk_bytes / 2**30:.1f} GiB of disk"
    )


def files_table(files: Sequence[File]) -> Table:
    """One row a data set."""
    table = Table("id", "name", "purpose", "rows", "bytes", "created")
    for file in files:
        id, name, purpose = (Text(clean(text)) for text in (file.id, file.filename, file.purpose))
        table.add_row(id, name, purpose, f"{file.rows:,}", f"{file.bytes:,}", _moment(file.created_at))
    return table


def file_lines(file: File) -> list[str]:
    """One data set, a line a fact."""
    facts = {
        "id": file.id,
        "name": clean(file.filename),
        "purpose": clean(file.purpose),
        "rows": file.rows,
        "bytes": file.bytes,
        "sha256": file.sha256,
        "created": _moment(file.created_at),
    }
    return [f"{name}: {value}" for name, value in facts.items()]


def sample_lines(sample: Sample) -> list[str]:
    """One prompt, and what teacher and student answer to it."""
    answers = {
        "prompt": sample.prompt,
        "teacher": sample.teacher,
        "before": sample.before,
        "after": sample.after,
    }
    said = [f"{name + ':':<9}{_indented(text)}" for name, text in answers.items() if text is not None]
    return [f"[{clean(sample.kind)}]", *said]


def job_lines(job: Recovery) -> list[str]:
    """One job, a line a fact that is known."""
    progress = job.progress and f"{job.progress.done}/{job.progress.total} {clean(job.progress.unit)}"
    facts = {
        "id": job.id,
        "state": state(job),
        "stage": job.stage,
        "progress": progress,
        "outcome": job.outcome,
        "error": job.error and clean(f"{job.error.message} ({job.error.code})"),
        "retry of": job.retry_of and clean(job.retry_of),
        "failures": job.failures,
        "losses": job.losses,
        "student": clean(job.request.student.source),
        "teacher": clean(job.request.teacher.source),
        "created": _moment(job.created_at),
        "started": job.started_at and _moment(job.started_at),
        "finished": job.finished_at and _moment(job.finished_at),
    }
    return [f"{name}: {value}" for name, value in facts.items() if value]


def state(job: Recovery) -> str:
    """Its state, and whether it is about to pause."""
    return f"{job.state}, pausing" if job.pausing else job.state


def _indented(text: str) -> str:
    return clean(text.strip()).replace("\n", "\n" + " " * 9)


def validation_lines(error: ValidationError) -> list[str]:
    """A line a field that cannot be sent."""
    lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return ["The request was not sent:", *(f"  {line}" for line in lines)]


def clean(text: str) -> str:
    """The text without characters that could steer a terminal; line ends stay."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def span(seconds: float) -> str:
    """A duration for a reader: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _measure_row(measure: Measure) -> list[Text]:
    name = f"{measure.label} ({measure.unit})" if measure.unit else measure.label
    cells = [_number(measure.teacher), _number(measure.before), _number(measure.after)]
    gain = f"kept {_estimate(measure.retained)}" if measure.retained else _estimate(measure.recovered)
    return [Text(cell) for cell in (clean(name), *cells, gain)]


def _alignment_rows(alignment: Alignment) -> list[list[str]]:
    """CKA of the last layer and its mean over the layers; the teacher's column is the ceiling."""
    layers = (alignment.ceiling, _diagonal(alignment.before), _diagonal(alignment.after))
    last, mean = alignment.headroom_recovered_last, alignment.headroom_recovered_mean
    return [
        ["alignment, last layer", *(_mean(values[-1:]) for values in layers), _estimate(last)],
        ["alignment, mean", *(_mean(values) for values in layers), _estimate(mean)],
    ]


def _diagonal(state: AlignmentState | None) -> list[float | None]:
    return [layer.value if layer else None for layer in state.diagonal] if state else []


def _mean(values: list[float | None]) -> str:
    """The mean where CKA is defined."""
    known = [value for value in values if value is not None]
    return _number(fmean(known) if known else None)


def _cost(cost: Cost, training: TrainingReport | None) -> str:
    seconds = span(sum(cost.stage_seconds.values()))
    steps = f"{training.steps} steps on {cost.tokens_trained:,} tokens" if training else "no training"
    memory = f"{cost.peak_memory_bytes / 2**30:.1f} GiB"
    spent = f"{steps}, {cost.tokens_generated:,} generated; {seconds} and {memory} on {clean(cost.device)}"
    return f"{spent}\nexpected: {estimate_line(cost.estimate)}" if cost.estimate else spent


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return NONE
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds")
