"""What the gateway costs: before a server on loopback that says its tokens at a constant rate.

    python benchmarks/gateway.py [--streams 64] [--tokens 50] [--interval 0.1] [--rounds 3]

The server is a process of its own, and so is the service (uvicorn, SQLite, one deployment placed by hand).
Clients stream from the one and from the other, in interleaved rounds, their starts spread over an interval.
A token carries the time at which it was said; how much later it is read is its lag, and the gateway's
overhead is the difference of the median lags. CPU is that of the service's process tree over a round,
divided by the tokens; and for whole answers, which come at once, by the requests.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx2
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from recoup.schemas import CreateRecovery, Launch, Lineage, ModelRef
from recoup_api.app import create_app
from recoup_jobs.deployments import Deployments, NewDeployment, Placed, new_id
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings

NAME = "bench"
BODY = {"model": NAME, "messages": [{"role": "user", "content": "Say something."}]}


def upstream(port: int, tokens: int, interval: float) -> None:
    """Serves until it is ended."""

    def event(model: str, text: str) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
        told = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model}
        return f"data: {json.dumps(told | {'choices': [choice]}, separators=(',', ':'))}\n\n".encode()

    async def stream(model: str) -> AsyncIterator[bytes]:
        began = time.monotonic()
        for number in range(tokens):
            await asyncio.sleep(max(0.0, began + number * interval - time.monotonic()))
            yield event(model, f"{time.monotonic():.6f}")
        yield b"data: [DONE]\n\n"

    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(stream(body["model"]), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": "word " * tokens}}
        return JSONResponse({"id": "x", "model": body["model"], "choices": [choice]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="error")


def service(port: int, url: str, home: str) -> None:
    """Serves until it is ended."""
    limits = {"requests_per_second": 1e6, "request_burst": 10**6, "max_serving_requests": 10_000}
    settings = Settings(home=Path(home), serve_urls=[url], **limits)
    ledger = open_ledger(settings)
    asked = CreateRecovery(student=ModelRef(source="s"), teacher=ModelRef(source="t"))
    recovery = ledger.create(asked, "gpu.cpu").id
    lineage = Lineage(recovery=recovery, student="s", teacher="t", outcome="recovered")
    launch = Launch(arguments=[], environment={})
    deployments = Deployments(ledger, [url])
    id = deployments.add(NewDeployment(new_id(), "default", NAME, "adapter", lineage, launch), 1).id
    deployments.place(id, Placed(url, "ready"))
    for state in ("probing", "live"):
        deployments.move(id, state)
    uvicorn.run(create_app(settings, ledger, sweep=False), port=port, log_level="error")


async def lags(url: str, streams: int, interval: float) -> list[float]:
    """Seconds from the saying to the reading of each token of `streams` simultaneous answers."""

    async def one(http: httpx2.AsyncClient, place: int) -> list[float]:
        found: list[float] = []
        await asyncio.sleep(interval * place / streams)
        async with http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    told = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"]
                    found.append(time.monotonic() - float(told))
        return found

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
        parts = await asyncio.gather(*(one(http, place) for place in range(streams)))
    return [lag for part in parts for lag in part]


async def whole(url: str, streams: int, requests: int) -> None:
    """So many answers that come at once, `streams` at a time."""
    async with httpx2.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
        for _ in range(requests // streams):
            asked = (http.post("/v1/chat/completions", json=BODY) for _ in range(streams))
            for answer in await asyncio.gather(*asked):
                answer.raise_for_status()


def cpu_ms(process: psutil.Process) -> float:
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return 1000 * sum(time.user + time.system for time in times)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(url: str, process: Any) -> None:
    while True:
        assert process.is_alive(), f"the process of {url} has ended"
        try:
            httpx2.get(f"{url}/healthz", timeout=1, trust_env=False)
        except httpx2.TransportError:
            time.sleep(0.1)
        else:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--interval", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    direct, gateway = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    with tempfile.TemporaryDirectory() as home:
        ports = (int(url.rpartition(":")[2]) for url in (direct, gateway))
        server = spawn.Process(target=upstream, args=(next(ports), asked.tokens, asked.interval))
        ours = spawn.Process(target=service, args=(next(ports), direct, home))
        for process in (server, ours):
            process.start()
        try:
            for url, process in ((direct, server), (gateway, ours)):
                wait_for(url, process)
            compare(asked, direct, gateway, psutil.Process(ours.pid))
        finally:
            for process in (server, ours):
                process.terminate()
                process.join()


def compare(asked: argparse.Namespace, direct: str, gateway: str, process: psutil.Process) -> None:
    """Prints the figures."""
    asyncio.run(whole(gateway, asked.streams, asked.streams))  # warm
    overheads, per_token, per_request = [], [], []
    for _ in range(asked.rounds):
        plain = asyncio.run(lags(direct, asked.streams, asked.interval))
        before = cpu_ms(process)
        through = asyncio.run(lags(gateway, asked.streams, asked.interval))
        per_token.append((cpu_ms(process) - before) / len(through))
        overheads.append(1000 * (median(through) - median(plain)))
        p99 = [1000 * quantiles(found, n=100)[98] for found in (plain, through)]
        requests, before = asked.streams * 10, cpu_ms(process)
        asyncio.run(whole(gateway, asked.streams, requests))
        per_request.append((cpu_ms(process) - before) / requests)
        print(
            f"median lag {1000 * median(plain):.1f} ms direct, {1000 * median(through):.1f} ms through the "
            f"gateway; 99th percentile {p99[0]:.1f} and {p99[1]:.1f} ms"
        )
    print(f"{asked.streams} streams of {asked.tokens} tokens, {1 / asked.interval:g} tokens a second each")
    print(f"p50 overhead: {median(overheads):.2f} ms")
    print(f"CPU per streamed token: {median(per_token):.3f} ms")
    print(f"CPU per request with a whole answer: {median(per_request):.2f} ms")


if __name__ == "__main__":
    main()
