"""The commands of `recoup`: take options, call the client, print.

The HTTP library is loaded inside a command, so `recoup --help` answers at once. What each
does around its work, exit codes among it, stands in `_session.py`.
"""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from recoup import __version__, _render, _uploads
from recoup._completion import completion
from recoup._deploy import chat, deploy, deployments, rollback, undeploy
from recoup._diagnose import diagnose
from recoup._doctor import doctor
from recoup._session import Id, Json, connected, console, dump, echo, show, show_state
from recoup._submit import dry_run, pair_of, submit
from recoup._watch import follow
from recoup.schemas import Damage, Outcome, State

app = typer.Typer(
    name="recoup",
    help="Restore a damaged language model from its healthy original. "
    "The server is RECOUP_BASE_URL (default http://127.0.0.1:8321), the key RECOUP_API_KEY.",
    epilog="Exit codes: 0 done; 1 the job failed or was cancelled; 2 wrong usage, or the server refused; "
    "3 the server is out of reach or does not answer as it should; 130 interrupted, the job goes on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"recoup {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(submit)
app.command()(dry_run)
app.command()(diagnose)


@app.command()
def watch(id: Id, json: Json = False) -> None:
    """Show a job's progress until it ends, then its verdict. Ctrl-C leaves the job running."""
    with connected(json) as client:
        follow(client, id, json)


@app.command(name="list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="Only those that came to this.")] = None,
    damage: Annotated[Damage | None, typer.Option(help="Only those whose request names it.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only those with this pair; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """List the recoveries, newest first."""
    pairs = dict(map(pair_of, metadata or []))
    with connected(json) as client:
        asked = client.recoveries.list(
            limit=min(limit, 100), state=state, outcome=outcome, damage=damage, metadata=pairs
        )
        found = [*islice(asked, limit)]
        if json:
            dump(found)
        else:
            console().print(_render.jobs_table(found))


@app.command(name="show")
def show_(id: Id, json: Json = False) -> None:
    """Show one recovery as it stands."""
    with connected(json) as client:
        recovery = client.recoveries.get(id)
        show(recovery, json, "\n".join(_render.job_lines(recovery)))


@app.command()
def cancel(id: Id, json: Json = False) -> None:
    """Ask a recovery to stop for good."""
    with connected(json) as client:
        show_state(client.recoveries.cancel(id), json)


@app.command()
def pause(id: Id, json: Json = False) -> None:
    """Ask a recovery to give its device back and to wait."""
    with connected(json) as client:
        show_state(client.recoveries.pause(id), json)


@app.command()
def resume(id: Id, json: Json = False) -> None:
    """Let a paused recovery go on."""
    with connected(json) as client:
        show_state(client.recoveries.resume(id), json)


@app.command()
def retry(id: Id, json: Json = False) -> None:
    """Repeat a recovery that failed or was cancelled as a new one; prints that one."""
    with connected(json) as client:
        show_state(client.recoveries.retry(id), json)


@app.command()
def report(
    id: Id,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the report as a page.")] = None,
    json: Json = False,
) -> None:
    """Print the verdict and what was measured."""
    with connected(json) as client:
        if html is not None:
            html.write_text(client.recoveries.report_html(id), encoding="utf-8")
        answer = client.recoveries.report(id)
        if json:
            show(answer, json, "")
        else:
            _render.print_verdict(answer, console())


@app.command()
def samples(
    id: Id,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    json: Json = False,
) -> None:
    """Print answers of the teacher and of the student, before and after, side by side."""
    with connected(json) as client:
        found = client.recoveries.report(id).samples[:limit]
        if json:
            dump(found)
        else:
            typer.echo("\n\n".join("\n".join(_render.sample_lines(sample)) for sample in found))


@app.command()
def recipe(
    id: Id,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there instead.")] = None,
    json: Json = False,
) -> None:
    """Print a Python script that repeats the training with transformers and peft alone."""
    with connected(json) as client:
        script = client.recoveries.recipe(id)
        if output is not None:
            output.write_text(script, encoding="utf-8")
        elif json:
            echo({"recipe": script})
        else:
            typer.echo(_render.clean(script), nl=False)


@app.command()
def download(
    id: Id,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    json: Json = False,
) -> None:
    """Fetch all files of a recovery and verify them; start it again to resume."""
    with connected(json) as client:
        paths = [str(path) for path in client.recoveries.download(id, folder)]
        if json:
            echo(paths)
        else:
            typer.echo("\n".join(paths))


app.command()(deploy)
app.command()(undeploy)
app.command()(rollback)
app.command()(deployments)
app.command()(chat)
app.add_typer(_uploads.app)
app.command()(doctor)
app.command()(completion)
