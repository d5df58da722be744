"""`recoup files`: data sets on the server."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from recoup import _render
from recoup._session import Json, connected, console, dump, show

app = typer.Typer(name="files", help="Data sets on the server.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="The file's id.")]


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="JSONL.")],
    json: Json = False,
) -> None:
    """Upload a data set; the server checks it line by line."""
    with connected(json) as client:
        file = client.files.create(path)
        show(file, json, f"{file.id} {file.rows} rows")


@app.command(name="list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20, json: Json = False
) -> None:
    """List the files, newest first."""
    with connected(json) as client:
        found = [*islice(client.files.list(limit=min(limit, 100)), limit)]
        if json:
            dump(found)
        else:
            console().print(_render.files_table(found))


@app.command(name="show")
def show_(id: Id, json: Json = False) -> None:
    """Describe one file."""
    with connected(json) as client:
        file = client.files.get(id)
        show(file, json, "\n".join(_render.file_lines(file)))


@app.command()
def content(
    id: Id,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    json: Json = False,
) -> None:
    """Fetch what was uploaded."""
    with connected(json) as client:
        output.write_bytes(client.files.content(id))
        file = client.files.get(id)
        show(file, json, str(output))


@app.command()
def delete(id: Id, json: Json = False) -> None:
    """Remove a file that no running recovery names."""
    with connected(json) as client:
        file = client.files.get(id)
        client.files.delete(id)
        show(file, json, f"{id} deleted")
