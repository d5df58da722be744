"""What every command does around its work: connect, print an answer, end with the right code.

Exit codes: 0 done; 1 the job failed or was cancelled; 2 wrong usage, or the request was
refused; 3 the server cannot be reached, or does not answer as it should; 130 interrupted
(a job that was watched goes on). An error is told on standard error: as a sentence and
what to do about it, or with `--json` as one JSON object.
"""

import json as jsonlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console

from recoup import _render, errors
from recoup.schemas import Recovery

if TYPE_CHECKING:
    from recoup.client import Client

Id = Annotated[str, typer.Argument(help="The recovery's id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@contextmanager
def connected(json: bool) -> Iterator["Client"]:
    """A client whose errors become a sentence on stderr and an exit code."""
    from recoup.client import Client  # the HTTP library; `--help` answers without it

    try:
        with Client() as client:
            yield client
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except ValidationError as error:
        complain(error, "\n".join(_render.validation_lines(error)), json)
    except (errors.RecoupError, OSError) as error:
        complain(error, str(error), json)


def complain(error: Exception, text: str, json: bool) -> NoReturn:
    """Tell of an error, and end with its code."""
    code, what_to_do = exit_code(error), advice(error)
    if json:
        problem = error.problem.model_dump(mode="json") if isinstance(error, errors.APIStatusError) else None
        known = {"type": type(error).__name__, "message": text, "advice": what_to_do, "exit_code": code}
        typer.echo(jsonlib.dumps({"error": known | {"problem": problem}}), err=True)
    else:
        typer.echo(_render.clean(f"{text}\n{what_to_do}" if what_to_do else text), err=True)
    raise typer.Exit(code)


def show(value: BaseModel, json: bool, text: str) -> None:
    """One answer, as JSON or as its text."""
    typer.echo(value.model_dump_json(indent=2) if json else text)


def dump(values: Sequence[BaseModel]) -> None:
    """Several answers as one JSON array."""
    echo([value.model_dump(mode="json") for value in values])


def echo(value: Any) -> None:
    """Anything else as JSON."""
    typer.echo(jsonlib.dumps(value, indent=2))


def show_state(recovery: Recovery, json: bool) -> None:
    """What a verb made of a job."""
    show(recovery, json, f"{recovery.id} {_render.state(recovery)}")


def console() -> Console:
    """Standard output; wide where no terminal limits it, so that a log keeps whole rows."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def exit_code(error: Exception) -> int:
    """The code that a command ends with."""
    match error:
        case errors.JobFailedError() | errors.DeploymentFailedError():
            return 1
        case errors.APIConnectionError() | errors.InternalServerError() | errors.InvalidAnswerError():
            return 3
        case errors.ChecksumError() | errors.UnsafePathError():
            return 3
        case _:
            return 2


def advice(error: Exception) -> str | None:
    """What to do about it, where that is known."""
    text: str | None = None
    match error:
        case errors.APIConnectionError() | errors.InvalidAnswerError():
            text = (
                "Start a server with `recoup-server up` or set RECOUP_BASE_URL; `recoup doctor` checks both."
            )
        case errors.AuthenticationError():
            text = "Set RECOUP_API_KEY to a key of this server."
        case errors.PermissionDeniedError():
            text = "Use a key that may do this: set RECOUP_API_KEY."
        case errors.NotFoundError(code="recovery_not_found"):
            text = "`recoup list` shows the recoveries that are there."
        case errors.NotFoundError(code="deployment_not_found" | "model_not_found"):
            text = "`recoup deployments` shows the deployments that are there."
        case errors.NotFoundError(code="file_not_found"):
            text = "`recoup files list` shows the files that are there."
        case errors.ConflictError(code="not_finished"):
            text = "Wait for its end with `recoup watch ID`."
        case errors.RateLimitError(retry_after=float(seconds)):
            text = f"Try again in {_render.span(seconds)}."
        case errors.JobFailedError(recovery=Recovery() as recovery):
            text = f"`recoup show {recovery.id}` has the details, `recoup retry {recovery.id}` runs it again."
        case errors.ChecksumError():
            text = "Start the download again; files that arrived whole are kept."
        case errors.InternalServerError():
            text = "Try again; if it stays so, `recoup doctor` shows what the server says of itself."
    return text
