"""Watching a job: bars by stage on a terminal, plain lines elsewhere, with `--json` a line an event."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from recoup import _session
from recoup._render import clean, print_verdict, span
from recoup.errors import JobFailedError
from recoup.schemas import Event, Progress, Recovery

if TYPE_CHECKING:
    from recoup.client import Client


class View(Protocol):
    """Something that shows what happens to a job."""

    def event(self, event: Event) -> None:
        """A line was added to the job's history."""

    def progress(self, progress: Progress) -> None:
        """The running stage got further."""


def follow(client: "Client", id: str, json: bool) -> None:
    """Show the job until it ends, then its verdict. Interrupting this leaves the job running."""
    try:
        recovery = _dumped(client, id) if json else watch(client, id, _session.console())
    except KeyboardInterrupt:
        typer.echo(f"\n{id} goes on; watch it again with: recoup watch {id}", err=True)
        raise typer.Exit(130) from None
    if recovery.state == "cancelled":
        typer.echo(f"{id} was cancelled; `recoup retry {id}` runs it again.", err=True)
        raise typer.Exit(1)
    if not json:
        print_verdict(client.recoveries.report(id), _session.console())


def watch(client: "Client", id: str, console: Console) -> Recovery:
    """Show the job's progress on the console until it ends; the job as it ended.

    Raises JobFailedError if it failed. Interrupting this leaves the job running.
    """
    if not console.is_terminal:
        return _wait(client, id, LineView(console))
    with BarView(console) as bars:
        return _wait(client, id, bars)


def _wait(client: "Client", id: str, view: View) -> Recovery:
    return client.recoveries.wait(id, on_progress=view.progress, on_event=view.event)


def _dumped(client: "Client", id: str) -> Recovery:
    """Every event as a line of JSON, and the recovery as the last one."""

    def say(value: BaseModel) -> None:
        typer.echo(value.model_dump_json())

    try:
        recovery = client.recoveries.wait(id, on_event=say)
    except JobFailedError as error:
        say(error.recovery)
        raise
    say(recovery)
    return recovery


class BarView:
    """A live bar a stage, with the last figures of training beside it."""

    def __init__(self, console: Console) -> None:
        columns = ("{task.description:<10}", "{task.fields[count]}", "{task.fields[figures]}")
        stage, *rest = (TextColumn(column, markup=False) for column in columns)
        self._bars = Bars(stage, BarColumn(bar_width=30), *rest, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._figures: dict[str, Any] = {}

    def __enter__(self) -> "BarView":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def event(self, event: Event) -> None:
        if event.type == "stage":
            self._stage(str(event.data.get("stage")), str(event.data.get("status")))
        elif event.type == "metric":
            self._figures |= event.data
            for task in [*self._tasks.values()][-1:]:
                self._bars.update(task, figures=figures(self._figures))
        else:
            self._bars.console.print(Text(line(event)))

    def progress(self, progress: Progress) -> None:
        task = self._task(progress.stage)
        self._bars.update(task, completed=progress.done, total=progress.total, count=count(progress))

    def _stage(self, stage: str, status: str) -> None:
        task = self._task(stage)
        if status == "committed":
            self._bars.update(task, total=1, completed=1, count="done")

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(clean(stage), total=None, count="", figures="")
        return self._tasks[stage]


class LineView:
    """A line an event; of those that come with every step, at most one in `every` seconds."""

    def __init__(
        self, console: Console, every: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._every = every
        self._clock = clock
        self._last: dict[str, float] = {}

    def event(self, event: Event) -> None:
        if event.data.get("name") != "train" or self._is_due("train"):
            self._print(line(event))

    def progress(self, progress: Progress) -> None:
        if self._is_due(progress.stage):
            self._print(f"{progress.stage}: {count(progress)}")

    def _is_due(self, subject: str) -> bool:
        now = self._clock()
        if now - self._last.get(subject, -self._every) < self._every:
            return False
        self._last[subject] = now
        return True

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def line(event: Event) -> str:
    """One event in words."""
    data = event.data
    match event.type:
        case "state":
            text = f"state: {data.get('state')}"
        case "stage":
            text = f"{data.get('stage')}: {data.get('status')}"
        case "metric":
            others = ", ".join(f"{key} {value}" for key, value in data.items() if key != "name")
            text = f"{data.get('name')}: {figures(data) or others}"
        case "log":
            text = str(data.get("message"))
    return clean(text)


def count(progress: Progress) -> str:
    """How far a stage is: `12/64 answers, 40 s left`."""
    left = f", {span(progress.eta_seconds)} left" if progress.eta_seconds else ""
    return f"{progress.done}/{progress.total} {clean(progress.unit)}{left}"


def figures(data: dict[str, Any]) -> str:
    """The figures of a metric event that a watcher wants: `step 12, loss 0.42, KL 0.31, alignment 0.9`."""
    names = {"step": "step", "loss": "loss", "kl": "KL", "alignment": "alignment"}
    known = [(name, data[key]) for key, name in names.items() if isinstance(data.get(key), int | float)]
    return ", ".join(f"{name} {value if name == 'step' else f'{value:.4f}'}" for name, value in known)
