"""The commands of `recoup`: take options, call the client, print.

The HTTP library is loaded inside a command, so `recoup --help` answers at once.

Exit codes: 0 done; 1 the job failed or was cancelled; 2 wrong usage, or the request was
refused; 3 the server cannot be reached, or does not answer as it should; 130 interrupted
(a job that was watched goes on).
"""

import json as jsonlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from recoup import _render, errors
from recoup._watch import watch as watch_job
from recoup.schemas import CreateDiagnosis, CreateRecovery, Match, Progress, Recovery

if TYPE_CHECKING:
    from recoup.client import Client

app = typer.Typer(
    name="recoup",
    help="Restore a damaged language model from its healthy original. "
    "The server is RECOUP_BASE_URL (default http://127.0.0.1:8321), the key RECOUP_API_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Id = Annotated[str, typer.Argument(help="The recovery's id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
_FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "metavar": "FILE"}
_TASK = "NAME=FILE[:exact|contains|number]"
_UNSENT = f"file-{'0' * 24}"
"""The id of a file that is not uploaded yet."""


@app.command()
def submit(
    student: Annotated[str, typer.Option(help="The damaged model, as the server names it.")],
    teacher: Annotated[str, typer.Option(help="Its healthy original.")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of general prompts; default: built in.", **_FILE)
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="JSONL of prompts of a skill to keep.", **_FILE)] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar=_TASK, help="JSONL of prompts with right answers to measure; may be repeated."),
    ] = None,
    damage: Annotated[str | None, typer.Option(help="finetuning, quantization, pruning or auto.")] = None,
    method: Annotated[str | None, typer.Option(help="off_policy or auto.")] = None,
    mode: Annotated[str | None, typer.Option(help="lora, full or auto.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences an optimizer step.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Where the teacher's answer is cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the recovered model.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, show progress and the verdict.")] = False,
    json: Json = False,
) -> None:
    """Submit a recovery."""
    training = _given(mode=mode, steps=steps, learning_rate=learning_rate, batch_size=batch_size)
    tasks = [_task(option) for option in task or []]
    fields = _given(
        student={"source": student},
        teacher={"source": teacher},
        damage=damage,
        method=_given(type=method),
        training=training,
        generation=_given(max_new_tokens=max_new_tokens),
        evaluation=_given(tasks=[spec for spec, _ in tasks] or None),
        output=_given(name=name),
        seed=seed,
    )
    with _connected() as client:
        CreateRecovery.model_validate(fields)  # before a file is uploaded for nothing
        fields |= _uploaded(client, prompts=prompts, keep=keep)
        if tasks:
            sent = [spec | {"file": client.files.create(path).id} for spec, path in tasks]
            fields |= {"evaluation": {"tasks": sent}}
        recovery = client.recoveries.create(**fields)
        if not watch:
            then = f"watch it with: recoup watch {recovery.id}"
            _show(recovery, json, f"{recovery.id} {recovery.state}\n{then}")
        else:
            _watch(client, recovery.id, json)


@app.command()
def diagnose(
    student: Annotated[str, typer.Option(help="The model to examine, as the server names it.")],
    teacher: Annotated[str, typer.Option(help="Its healthy original.")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of general prompts; default: built in.", **_FILE)
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar=_TASK, help="JSONL of prompts with right answers to measure; may be repeated."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Where the teacher's answer is cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    json: Json = False,
) -> None:
    """Say how a model is damaged, without training it. Ctrl-C leaves the job running."""
    tasks = [_task(option) for option in task or []]
    fields = _given(
        student={"source": student},
        teacher={"source": teacher},
        generation=_given(max_new_tokens=max_new_tokens),
        evaluation=_given(tasks=[spec for spec, _ in tasks] or None),
        seed=seed,
    )
    with _connected() as client:
        CreateDiagnosis.model_validate(fields)  # before a file is uploaded for nothing
        fields |= _uploaded(client, prompts=prompts)
        if tasks:
            sent = [spec | {"file": client.files.create(path).id} for spec, path in tasks]
            fields |= {"evaluation": {"tasks": sent}}
        found = client.diagnoses.wait(client.diagnoses.create(**fields).id, on_progress=_say)
        if found.report is None:
            _complain(f"{found.id} was {found.state}.", 1)
        elif json:
            typer.echo(found.model_dump_json(indent=2))
        else:
            _render.print_diagnosis(found.report, _console())


@app.command()
def watch(id: Id, json: Json = False) -> None:
    """Show a job's progress until it ends, then its verdict. Ctrl-C leaves the job running."""
    with _connected() as client:
        _watch(client, id, json)


@app.command()
def report(
    id: Id,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the report as a page.")] = None,
    json: Json = False,
) -> None:
    """Print the verdict and what was measured."""
    with _connected() as client:
        if html is not None:
            html.write_text(client.recoveries.report_html(id), encoding="utf-8")
        answer = client.recoveries.report(id)
        if json:
            typer.echo(answer.model_dump_json(indent=2))
        else:
            _render.print_verdict(answer, _console())


@app.command()
def recipe(
    id: Id,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead.")] = None,
) -> None:
    """Print a Python script that repeats the training with transformers and peft alone."""
    with _connected() as client:
        script = client.recoveries.recipe(id)
        if output is None:
            typer.echo(_render.clean(script), nl=False)
        else:
            output.write_text(script, encoding="utf-8")


@app.command(name="list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    json: Json = False,
) -> None:
    """List the recoveries."""
    with _connected() as client:
        found = [*islice(client.recoveries.list(limit=min(limit, 100)), limit)]
        if json:
            typer.echo(jsonlib.dumps([recovery.model_dump(mode="json") for recovery in found], indent=2))
        else:
            _console().print(_render.jobs_table(found))


@app.command()
def show(id: Id, json: Json = False) -> None:
    """Show one recovery as it stands."""
    with _connected() as client:
        recovery = client.recoveries.get(id)
        _show(recovery, json, "\n".join(_render.job_lines(recovery)))


@app.command()
def cancel(id: Id, json: Json = False) -> None:
    """Ask a recovery to stop."""
    with _connected() as client:
        recovery = client.recoveries.cancel(id)
        _show(recovery, json, f"{recovery.id} {recovery.state}")


@app.command()
def download(
    id: Id,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    json: Json = False,
) -> None:
    """Fetch all files of a recovery and verify them; start it again to resume."""
    with _connected() as client:
        paths = [str(path) for path in client.recoveries.download(id, folder)]
        typer.echo(jsonlib.dumps(paths, indent=2) if json else "\n".join(paths))


def _say(progress: Progress) -> None:
    """On stderr, so that stdout holds the answer alone."""
    typer.echo(f"{progress.stage}: {progress.done}/{progress.total} {_render.clean(progress.unit)}", err=True)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _uploaded(client: "Client", **paths: Path | None) -> dict[str, Any]:
    """The fields of the request that name uploaded files."""
    return {field: {"file": client.files.create(path).id} for field, path in paths.items() if path}


def _task(option: str) -> tuple[dict[str, str], Path]:
    """`NAME=FILE[:MATCH]` as a task whose file is yet to be uploaded, and that file."""
    name, _, place = option.partition("=")
    path, _, match = place.rpartition(":")
    if match not in get_args(Match):
        path, match = place, "exact"
    if not Path(path).is_file():
        raise typer.BadParameter(f"'{path}' is no file; expected {_TASK}.", param_hint="'--task'")
    return {"name": name, "file": _UNSENT, "match": match}, Path(path)


def _watch(client: "Client", id: str, json: bool) -> None:
    try:
        recovery = _stream(client, id) if json else watch_job(client, id, _console())
    except KeyboardInterrupt:
        typer.echo(f"\n{id} goes on; watch it again with: recoup watch {id}", err=True)
        raise typer.Exit(130) from None
    if recovery.state == "cancelled":
        typer.echo(f"{id} was cancelled.", err=True)
        raise typer.Exit(1)
    if not json:
        _render.print_verdict(client.recoveries.report(id), _console())


def _stream(client: "Client", id: str) -> Recovery:
    """Every event as a line of JSON, and the recovery as the last one."""

    def say(value: BaseModel) -> None:
        typer.echo(value.model_dump_json())

    try:
        recovery = client.recoveries.wait(id, on_event=say)
    except errors.JobFailedError as error:
        say(error.recovery)
        raise
    say(recovery)
    return recovery


def _show(recovery: Recovery, json: bool, text: str) -> None:
    typer.echo(recovery.model_dump_json(indent=2) if json else text)


def _console() -> Console:
    """Standard output; wide where no terminal limits it, so that a log keeps whole rows."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


@contextmanager
def _connected() -> Iterator["Client"]:
    """A client whose errors become a sentence on stderr and an exit code."""
    from recoup.client import Client

    try:
        with Client() as client:
            yield client
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ValidationError as error:
        _complain("\n".join(_render.validation_lines(error)), 2)
    except (errors.RecoupError, OSError) as error:
        _complain(str(error), _exit_code(error))


def _complain(text: str, code: int) -> None:
    typer.echo(_render.clean(text), err=True)
    raise typer.Exit(code)


def _exit_code(error: Exception) -> int:
    match error:
        case errors.JobFailedError():
            return 1
        case errors.APIConnectionError() | errors.InternalServerError() | errors.InvalidAnswerError():
            return 3
        case errors.ChecksumError() | errors.UnsafePathError():
            return 3
        case _:
            return 2
