"""`recoup diagnose`: how a model is damaged, without a recovery."""

from typing import Annotated

import typer

from recoup import _render
from recoup._session import Json, connected, console, show
from recoup._submit import FILE, HARNESS, TASK, Asked, given, measured, place_of, task_of
from recoup._watch import count
from recoup.schemas import CreateDiagnosis, Progress


def diagnose(
    student: Annotated[str, typer.Option(help="The model to examine, as the server names it.")],
    teacher: Annotated[str, typer.Option(help="Its healthy original.")],
    prompts: Annotated[
        str | None,
        typer.Option(metavar=FILE, help="JSONL of general prompts, or an uploaded one; default: built in."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar=TASK, help="JSONL of prompts with right answers to measure; may be repeated."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar=HARNESS, help="Task of lm-evaluation-harness at the server; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Where the teacher's answer is cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    json: Json = False,
) -> None:
    """Say how a model is damaged, without training it. Ctrl-C leaves the job running."""
    fields = given(
        student={"source": student},
        teacher={"source": teacher},
        generation=given(max_new_tokens=max_new_tokens),
        evaluation=measured(task, harness),
        seed=seed,
    )
    asked = Asked(fields, given(prompts=place_of(prompts, "--prompts")), [*map(task_of, task or [])])
    with connected(json) as client:
        asked.check(CreateDiagnosis)
        job = client.diagnoses.create(**asked.sent(lambda path: client.files.create(path).id))
        found = client.diagnoses.wait(job.id, on_progress=None if json else _say)
        if json:
            show(found, json, "")
        elif found.report is not None:
            _render.print_diagnosis(found.report, console())
    if found.report is None:
        typer.echo(f"{found.id} was {found.state}.", err=True)
        raise typer.Exit(1)


def _say(progress: Progress) -> None:
    """On stderr, so that stdout holds the answer alone."""
    typer.echo(f"{progress.stage}: {count(progress)}", err=True)
