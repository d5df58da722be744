"""`recoup deploy`, `undeploy`, `rollback`, `deployments` and `chat`: a recovered model in service."""

import sys
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from recoup import _render
from recoup._session import Id, Json, connected, console, dump, echo, show
from recoup.schemas import Deployment, DeploymentState

if TYPE_CHECKING:
    from recoup.client import Client

DeploymentId = Annotated[str, typer.Argument(help="The deployment's id.")]


def deploy(
    id: Id,
    name: Annotated[
        str | None, typer.Option(help="What clients pass as `model`. [default: the recovery's name or id]")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Stay until it is live.")] = True,
    json: Json = False,
) -> None:
    """Serve what a recovery handed over, once its effect is proven on the servers."""
    with connected(json) as client:
        made = client.deployments.create(id, name=name)
        if wait:
            made = client.deployments.wait(made.id, on_change=_say)
        _show(made, json)


def undeploy(id: DeploymentId, json: Json = False) -> None:
    """Take a deployment out of service."""
    with connected(json) as client:
        _show(client.deployments.delete(id), json)


def rollback(id: DeploymentId, json: Json = False) -> None:
    """Serve again what had the name before this deployment; prints that one."""
    with connected(json) as client:
        _show(client.deployments.rollback(id), json)


def deployments(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    state: Annotated[DeploymentState | None, typer.Option(help="Only those in this state.")] = None,
    json: Json = False,
) -> None:
    """List the deployments, newest first."""
    with connected(json) as client:
        found = [*islice(client.deployments.list(limit=min(limit, 100), state=state), limit)]
        if json:
            dump(found)
        else:
            console().print(_render.deployments_table(found))


def chat(
    name: Annotated[str, typer.Argument(help="The name of a deployment.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask. [default: lines of standard input]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=32_768, help="Where an answer is cut.")] = 512,
    json: Json = False,
) -> None:
    """Ask a deployment, or talk to it line by line until the end of input."""
    with connected(json) as client:
        said: list[dict[str, str]] = []
        for line in [prompt] if prompt is not None else sys.stdin:
            _turn(client, name, said, line.strip(), max_tokens, json)


def _turn(
    client: "Client", name: str, said: list[dict[str, str]], line: str, max_tokens: int, json: bool
) -> None:
    if not line:
        return
    said.append({"role": "user", "content": line})
    answer = client.deployments.chat(name, said, max_tokens=max_tokens)
    said.append({"role": "assistant", "content": answer})
    if json:
        echo({"answer": answer})
    else:
        typer.echo(_render.clean(answer))


def _say(deployment: Deployment) -> None:
    """On stderr, so that stdout holds the answer alone."""
    typer.echo("\n".join(_render.deployment_lines(deployment)), err=True)


def _show(deployment: Deployment, json: bool) -> None:
    show(deployment, json, "\n".join(_render.deployment_lines(deployment)))
