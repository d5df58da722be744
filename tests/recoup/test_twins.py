"""`Client` and `AsyncClient` are twins: the same methods, of the same signatures, typed, sent alike."""

import asyncio
import inspect
import subprocess
import sys
from importlib.util import find_spec

import pytest

import recoup
from recoup import AsyncClient, Client, _calls

UNBOUND = {"await_change", "stream", "get_artifact", "next_page"}
"""Descriptions that flows use, and no method."""


def methods(thing: object, prefix: str = "") -> dict[str, inspect.Signature]:
    """All public methods of a client and of its resources."""
    found = {}
    for name in (name for name in dir(thing) if not name.startswith("_") and hasattr(thing, name)):
        value = getattr(thing, name)
        if name in {"deployments", "diagnoses", "files", "recoveries"}:
            found |= methods(value, f"{prefix}{name}.")
        elif callable(value):
            found[prefix + name] = inspect.signature(value)
    return found


def things(client: Client) -> list[object]:
    """A client and its resources."""
    return [client, client.recoveries, client.diagnoses, client.deployments, client.files]


@pytest.fixture
def twins():
    clients = Client(), AsyncClient()
    yield clients
    clients[0].close()
    asyncio.run(clients[1].close())


def test_twins_have_the_same_methods_with_the_same_signatures(twins):
    one, other = (methods(client) for client in twins)
    assert one.keys() == other.keys()
    apart = {name for name in one if one[name] != other[name]}
    assert apart == {"with_options"}  # which returns its own kind
    assert one["with_options"].parameters == other["with_options"].parameters
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_raw_twins_have_the_methods_of_one_call(twins):
    one, other = (methods(client.with_raw_response) for client in twins)
    assert one == other
    several = {f"{kind}.{name}" for kind in ("recoveries", "diagnoses") for name in ("wait", "events")}
    several |= {"recoveries.download", "deployments.wait"}
    assert methods(twins[0]).keys() - one.keys() == several | {"close", "with_options"}


def test_every_description_is_a_method(twins):
    described = {
        name
        for place in (_calls, _calls.Jobs)
        for name, value in vars(place).items()
        if inspect.isfunction(value) and value.__module__ == _calls.__name__ and not name.startswith("_")
    }
    bound = {
        value.__wrapped__.__name__
        for thing in things(twins[0])
        for name in dir(thing)
        if not name.startswith("_") and hasattr(value := getattr(thing, name), "__wrapped__")
    }
    assert described - bound == UNBOUND


def test_every_method_says_what_it_does(twins):
    for thing in things(twins[0]):
        for name in dir(thing):
            assert name.startswith("_") or inspect.getdoc(getattr(thing, name)), name


def test_callbacks_of_an_async_client_are_awaited(service):
    async def watch() -> list[int]:
        seen: list[int] = []

        async def on_event(event: recoup.Event) -> None:
            await asyncio.sleep(0)
            seen.append(event.seq)

        async with AsyncClient(service.url) as client:
            job = await client.recoveries.create(student="damaged", teacher="healthy")
            await client.recoveries.wait(job.id, on_event=on_event)
        return seen

    assert asyncio.run(watch()) == [*range(1, 10)]


def test_an_async_client_waits_for_many_jobs_at_once(service):
    async def watch() -> list[str | None]:
        async with AsyncClient(service.url) as client:
            jobs = [await client.recoveries.create(student="damaged", teacher="healthy") for _ in range(5)]
            ended = await asyncio.gather(*(client.recoveries.wait(job.id) for job in jobs))
            return [job.outcome for job in ended]

    assert asyncio.run(watch()) == ["recovered"] * 5


TYPED = """
from collections.abc import AsyncIterator, Iterator
from typing import assert_type
from recoup import AsyncClient, Client, Deployment, Diagnosis, Event, File, RawResponse, Recovery

def one(client: Client) -> None:
    assert_type(client.recoveries.get("rec_1"), Recovery)
    assert_type(client.recoveries.list(state="queued"), Iterator[Recovery])
    assert_type(client.recoveries.events("rec_1", after=3), Iterator[Event])
    assert_type(client.recoveries.wait("rec_1", timeout=3.0, on_event=print), Recovery)
    assert_type(client.diagnoses.wait("dia_1"), Diagnosis)
    assert_type(client.deployments.wait("dep_1"), Deployment)
    assert_type(client.files.create("a.jsonl"), File)
    assert_type(client.with_raw_response.recoveries.get("rec_1"), RawResponse[Recovery])

async def other(client: AsyncClient) -> None:
    assert_type(await client.recoveries.get("rec_1"), Recovery)
    assert_type(client.recoveries.list(state="queued"), AsyncIterator[Recovery])
    assert_type(client.recoveries.events("rec_1", after=3), AsyncIterator[Event])
    assert_type(await client.recoveries.wait("rec_1", timeout=3.0, on_event=print), Recovery)
    assert_type(await client.diagnoses.wait("dia_1"), Diagnosis)
    assert_type(await client.files.create("a.jsonl"), File)
    assert_type(await client.with_raw_response.recoveries.get("rec_1"), RawResponse[Recovery])
"""
WRONG = """
from recoup import Client

client = Client()
client.recoveries.get(7)
client.recoveries.get(ID="rec_1")
client.recoveries.list(state="asleep")
client.with_raw_response.recoveries.wait("rec_1")
client.recoveries.get("rec_1").state = "queued"
"""


def test_a_type_checker_sees_every_method_as_it_is(tmp_path):
    if find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "wrong.py").write_text(WRONG)
    check = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "mypy.ini"]
    (tmp_path / "mypy.ini").write_text("[mypy]\nplugins = pydantic.mypy\n")
    found = subprocess.run(
        [*check, "typed.py", "wrong.py"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    places = [line.split(": ")[0] for line in found.stdout.splitlines() if ": error: " in line]
    assert places == [f"wrong.py:{line}" for line in range(5, 10)], found.stdout
