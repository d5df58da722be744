"""Memory of who asks for a million answers of which nearly all are cached.

    python benchmarks/cached.py [--rows 1000000] [--missing 10000] [--tokens 64]

`AnswerCache` is filled with an answer to all questions but some. Then all are asked anew, in a process of its
own, from an iterator: what the cache knows is read from it, what is missing is asked of a server on loopback
by `Generator`, and appended. Printed is that process' peak beside what it held once torch and transformers
were loaded: the difference is the client's. A recovery holds on to the answers that it learns from; that is
not measured here.
"""

import argparse
import asyncio
import multiprocessing
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from recoup_ml.answer_cache import AnswerCache, CachedAnswer, Manner
from recoup_ml.vllm_engine import Generator, Patience, Question, Sampling

MANNER = Manner("0a1b", {"temperature": 0.0})
PROMPT_TOKENS, BATCH = 32, 1000


def prompt(place: int) -> tuple[int, ...]:
    """Of no other place: it begins with the number of its own."""
    return *divmod(place, 49_152), *((place * 7919 + at * 104_729) % 49_152 for at in range(2, PROMPT_TOKENS))


def answer(place: int, tokens: int) -> tuple[int, ...]:
    return tuple((place + at) % 49_152 for at in range(tokens))


def upstream(listener: socket.socket, tokens: int) -> None:
    """Serves until it is ended."""

    async def models(_: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def complete(request: Request) -> Response:
        ids = (await request.json())["prompt"]
        choice = {"index": 0, "text": "", "token_ids": answer(ids[0], tokens), "finish_reason": "length"}
        return JSONResponse({"choices": [choice]})

    async def health(_: Request) -> Response:
        return PlainTextResponse("")

    routes = [Route("/v1/models", models), Route("/health", health)]
    app = Starlette(routes=[*routes, Route("/v1/completions", complete, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listener])


def fill(folder: str, rows: int, tokens: int) -> None:
    with AnswerCache(Path(folder)) as cache:
        for start in range(0, rows, BATCH):
            places = range(start, min(rows, start + BATCH))
            cache.append(
                CachedAnswer(MANNER.key(prompt(place)), answer(place, tokens), "length") for place in places
            )


def ask(folder: str, rows: int, tokens: int, url: str) -> None:
    """All questions once; prints what it took."""
    held, began, known = _peak_mib(), time.monotonic(), 0
    with AnswerCache(Path(folder)) as cache:

        def missing() -> Iterator[Question]:
            nonlocal known
            for place in range(rows):
                if cache.get(MANNER.key(prompt(place))):
                    known += 1
                else:
                    yield Question(place, prompt(place))

        async def run() -> None:
            coming: list[CachedAnswer] = []
            async for row in Generator([url], Patience()).rows(missing(), Sampling(tokens)):
                coming.append(CachedAnswer(MANNER.key(prompt(row.place)), row.ids, row.finish))
                if len(coming) == BATCH:
                    cache.append(coming)
                    coming.clear()
            cache.append(coming)

        asyncio.run(run())
        print(f"{known:,} of {rows:,} answers were cached; all are now: {len(cache) == rows}")
    print(f"{time.monotonic() - began:.0f} s; peak {_peak_mib():.0f} MiB, loaded libraries {held:.0f} MiB")
    print(f"the client's own memory: {_peak_mib() - held:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--missing", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    spawn = multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("fork").Process(target=upstream, args=(listener, asked.tokens))
    server.start()
    while not _answers(url):
        time.sleep(0.1)
    with tempfile.TemporaryDirectory() as folder:
        for work in (
            spawn.Process(target=fill, args=(folder, asked.rows - asked.missing, asked.tokens)),
            spawn.Process(target=ask, args=(folder, asked.rows, asked.tokens, url)),
        ):
            work.start()
            work.join()
    server.terminate()


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").is_success
    except httpx2.TransportError:
        return False


if __name__ == "__main__":
    main()
