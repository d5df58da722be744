"""`recoup submit` and `recoup dry-run`: options and files become a request."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from pydantic import BaseModel

from recoup import _render
from recoup._session import Json, connected, show
from recoup._watch import follow
from recoup.schemas import CreateRecovery, Match

if TYPE_CHECKING:
    from recoup.client import Client

HARNESS = "NAME[:LIMIT]"
TASK = "NAME=FILE[:exact|contains|number]"
FILE = "FILE|ID"
_UPLOADED = re.compile(r"file-[0-9a-f]{24}")
_UNSENT = f"file-{'0' * 24}"
"""The id of a file that is not uploaded yet."""


@dataclass(frozen=True)
class Asked:
    """A request whose files are yet to be uploaded."""

    fields: dict[str, Any]
    sets: dict[str, str | Path]
    """Prompts by the field that names them: an uploaded file's id, or a path."""
    tasks: list[tuple[dict[str, str], str | Path]]
    teach: dict[str, str | Path] = field(default_factory=dict)
    """Demonstrations, and those held out, by their field of `teach`."""

    def check(self, request: type[BaseModel] = CreateRecovery) -> None:
        """Raises ValidationError before a file is uploaded for nothing."""
        request.model_validate(self.fields)

    def sent(self, upload: Callable[[Path], str]) -> dict[str, Any]:
        """The fields, once `upload` has made an id of each path."""

        def place(found: str | Path) -> str:
            return upload(found) if isinstance(found, Path) else found

        sets = {name: {"file": place(found)} for name, found in self.sets.items()}
        tasks = [spec | {"file": place(found)} for spec, found in self.tasks]
        evaluation = self.fields.get("evaluation", {}) | given(tasks=tasks or None)
        teach = self.fields.get("teach", {}) | {name: place(found) for name, found in self.teach.items()}
        return self.fields | sets | given(evaluation=evaluation, teach=teach)


def _asked(
    student: Annotated[
        str, typer.Option(help="The damaged model, as the server names it; with --teach, a healthy one.")
    ],
    teacher: Annotated[
        str | None, typer.Option(help="Its healthy original; with --teach the student itself, if left out.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar=FILE, help="JSONL of general prompts, or an uploaded one; default: built in."),
    ] = None,
    compose: Annotated[
        int | None, typer.Option(help="Let the teacher write so many prompts itself instead.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar=FILE, help="JSONL of prompts of a skill to keep.")
    ] = None,
    teach: Annotated[
        str | None,
        typer.Option(metavar=FILE, help="JSONL of demonstrations of a skill that the student is to learn."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar=FILE, help="JSONL of demonstrations that decide; default: a fifth of --teach."),
    ] = None,
    match: Annotated[
        Match | None, typer.Option(help="When an answer to a held-out demonstration is right.")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option(help="With --teach: hold the model to what it was on general prompts.")
    ] = True,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar=TASK, help="JSONL of prompts with right answers to measure; may be repeated."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(metavar=HARNESS, help="Task of lm-evaluation-harness at the server; may be repeated."),
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
    servable: Annotated[
        bool | None, typer.Option("--servable", help="Refuse what vLLM could not serve, before training.")
    ] = None,
) -> Asked:
    taught = given(file=place_of(teach, "--teach"), held_out=place_of(held_out, "--held-out"))
    if teach is None and (teacher is None or held_out or match):
        raise typer.BadParameter("a recovery needs a teacher; --held-out and --match belong to --teach.")
    if prompts is not None and compose is not None:
        raise typer.BadParameter("--prompts gives them, --compose has them written: not both.")
    fields = given(
        prompts=given(compose=compose),
        student={"source": student},
        teacher={"source": teacher or student},
        teach=_teach(taught, match, rehearse),
        damage=damage,
        method=given(type=method),
        training=given(mode=mode, steps=steps, learning_rate=learning_rate, batch_size=batch_size),
        generation=given(max_new_tokens=max_new_tokens),
        evaluation=measured(task, harness),
        output=given(name=name, servable=servable),
        seed=seed,
        priority=priority,
    )
    sets = given(prompts=place_of(prompts, "--prompts"), keep=place_of(keep, "--keep"))
    return Asked(fields, sets, [*map(task_of, task or [])], taught)


def _teach(taught: dict[str, str | Path], match: Match | None, rehearse: bool) -> dict[str, Any]:
    """The field `teach` without its files, which are yet to be uploaded."""
    if not taught:
        return {}
    unsent = {name: f"file-{number:024x}" for number, name in enumerate(taught)}
    return unsent | given(match=match, rehearse=None if rehearse else False)


def with_request(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose first argument is made of the options that describe a recovery."""
    _, *own = signature(command).parameters.values()
    parameters = [*signature(_asked).parameters.values(), *own]

    @wraps(command)
    def run(**options: Any) -> None:
        mine = {parameter.name: options.pop(parameter.name) for parameter in own}
        command(_asked(**options), **mine)

    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@with_request
def submit(
    asked: Asked,
    watch: Annotated[bool, typer.Option("--watch", help="Stay, show progress and the verdict.")] = False,
    json: Json = False,
) -> None:
    """Submit a recovery."""
    with connected(json) as client:
        asked.check()
        recovery = client.recoveries.create(**asked.sent(lambda path: client.files.create(path).id))
        if watch:
            follow(client, recovery.id, json)
        else:
            show(recovery, json, f"{recovery.id} {recovery.state}\nwatch it with: recoup watch {recovery.id}")


@with_request
def dry_run(asked: Asked, json: Json = False) -> None:
    """Print what a recovery would do and cost, and what is wrong with it; queue nothing.

    Files that are here are uploaded for it, and removed again.
    """
    uploaded: list[str] = []

    def upload(client: "Client", path: Path) -> str:
        uploaded.append(client.files.create(path).id)
        return uploaded[-1]

    with connected(json) as client:
        asked.check()
        try:
            found = client.recoveries.dry_run(**asked.sent(partial(upload, client)))
        finally:
            for id in uploaded:
                client.files.delete(id)
        show(found, json, "\n".join(_render.dry_run_lines(found)))
        if found.findings:
            raise typer.Exit(2)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None and value != {}}


def measured(task: list[str] | None, harness: list[str] | None) -> dict[str, Any]:
    """The field `evaluation`; files of tasks are yet to be uploaded."""
    tasks = [spec for spec, _ in map(task_of, task or [])]
    return given(tasks=tasks or None, harness=[*map(harness_of, harness or [])] or None)


def place_of(option: str | None, name: str) -> str | Path | None:
    """The id of an uploaded file, or a path to one that is to be uploaded."""
    if option is None or _UPLOADED.fullmatch(option):
        return option
    if not Path(option).is_file():
        raise typer.BadParameter(
            f"'{option}' is no file here, and no id such as {_UNSENT}.", param_hint=f"'{name}'"
        )
    return Path(option)


def pair_of(option: str) -> tuple[str, str]:
    """`KEY=VALUE`."""
    key, found, value = option.partition("=")
    if not (key and found):
        raise typer.BadParameter(f"'{option}' is no KEY=VALUE.", param_hint="'--metadata'")
    return key, value


def task_of(option: str) -> tuple[dict[str, str], str | Path]:
    """`NAME=FILE[:MATCH]` as a task whose file is yet to be uploaded, and that file."""
    name, _, place = option.partition("=")
    path, _, match = place.rpartition(":")
    if match not in get_args(Match):
        path, match = place, "exact"
    if not (_UPLOADED.fullmatch(path) or Path(path).is_file()):
        raise typer.BadParameter(f"'{path}' is no file; expected {TASK}.", param_hint="'--task'")
    found = path if _UPLOADED.fullmatch(path) else Path(path)
    return {"name": name, "file": _UNSENT, "match": match}, found


def harness_of(option: str) -> dict[str, Any]:
    """`NAME[:LIMIT]`."""
    name, _, limit = option.partition(":")
    if limit and not limit.isdecimal():
        raise typer.BadParameter(f"'{option}' is no {HARNESS}.", param_hint="'--harness'")
    return given(name=name, limit=int(limit) if limit else None)
