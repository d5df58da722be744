"""`recoup submit`: options and files become a request."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from recoup._session import Json, connected, show
from recoup._watch import follow
from recoup.schemas import CreateRecovery, Match

if TYPE_CHECKING:
    from recoup.client import Client

_TASK = "NAME=FILE[:exact|contains|number]"
_FILE = "FILE|ID"
_UPLOADED = re.compile(r"file-[0-9a-f]{24}")
_UNSENT = f"file-{'0' * 24}"
"""The id of a file that is not uploaded yet."""


def submit(
    student: Annotated[str, typer.Option(help="The damaged model, as the server names it.")],
    teacher: Annotated[str, typer.Option(help="Its healthy original.")],
    prompts: Annotated[
        str | None,
        typer.Option(metavar=_FILE, help="JSONL of general prompts, or an uploaded one; default: built in."),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar=_FILE, help="JSONL of prompts of a skill to keep.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar=_TASK, help="JSONL of prompts with right answers to measure; may be repeated."),
    ] = None,
    damage: Annotated[str | None, typer.Option(help="finetuning, quantization, pruning or auto.")] = None,
    method: Annotated[str | None, typer.Option(help="off_policy, on_policy, two_stage, … or auto.")] = None,
    mode: Annotated[str | None, typer.Option(help="lora, dora, full, norms or auto.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences an optimizer step.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Where the teacher's answer is cut.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    priority: Annotated[int | None, typer.Option(help="The highest is claimed first.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the recovered model.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, show progress and the verdict.")] = False,
    json: Json = False,
) -> None:
    """Submit a recovery."""
    tasks = [_task(option) for option in task or []]
    fields = _given(
        student={"source": student},
        teacher={"source": teacher},
        damage=damage,
        method=_given(type=method),
        training=_given(mode=mode, steps=steps, learning_rate=learning_rate, batch_size=batch_size),
        generation=_given(max_new_tokens=max_new_tokens),
        evaluation=_given(tasks=[spec for spec, _ in tasks] or None),
        output=_given(name=name),
        seed=seed,
        priority=priority,
    )
    sets = {"prompts": _place(prompts, "--prompts"), "keep": _place(keep, "--keep")}
    with connected(json) as client:
        CreateRecovery.model_validate(fields)  # before a file is uploaded for nothing
        fields |= {field: {"file": _sent(client, place)} for field, place in sets.items() if place}
        if tasks:
            fields |= {
                "evaluation": {"tasks": [spec | {"file": _sent(client, path)} for spec, path in tasks]}
            }
        recovery = client.recoveries.create(**fields)
        if watch:
            follow(client, recovery.id, json)
        else:
            show(recovery, json, f"{recovery.id} {recovery.state}\nwatch it with: recoup watch {recovery.id}")


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _place(option: str | None, name: str) -> str | Path | None:
    """The id of an uploaded file, or a path to one that is to be uploaded."""
    if option is None or _UPLOADED.fullmatch(option):
        return option
    if not Path(option).is_file():
        raise typer.BadParameter(
            f"'{option}' is no file here, and no id such as {_UNSENT}.", param_hint=f"'{name}'"
        )
    return Path(option)


def _sent(client: "Client", place: str | Path) -> str:
    """The id of the file, once it is on the server."""
    return client.files.create(place).id if isinstance(place, Path) else place


def _task(option: str) -> tuple[dict[str, str], str | Path]:
    """`NAME=FILE[:MATCH]` as a task whose file is yet to be uploaded, and that file."""
    name, _, place = option.partition("=")
    path, _, match = place.rpartition(":")
    if match not in get_args(Match):
        path, match = place, "exact"
    if not (_UPLOADED.fullmatch(path) or Path(path).is_file()):
        raise typer.BadParameter(f"'{path}' is no file; expected {_TASK}.", param_hint="'--task'")
    found = path if _UPLOADED.fullmatch(path) else Path(path)
    return {"name": name, "file": _UNSENT, "match": match}, found
