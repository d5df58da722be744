"""The local engine: a small inference process in vLLM's dialect, for an installation without vLLM.

It listens on a unix socket of this user alone, and serves what the reconciler tells it to load: adapters of
models below the model roots, and whole models, all from the deployments' folder. It answers one request
at a time, a token after another, by transformers and peft; a request whose client has left stops at its next
token. It knows what the gateway and the reconciler send, and no more.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from recoup_jobs.errors import Unprocessable
from recoup_jobs.settings import Settings
from recoup_jobs.sources import locate, model_names
from recoup_worker.loading import loading
from recoup_worker.pieces import Kind, Piece, Shape, pieces, usage_of

if TYPE_CHECKING:
    from recoup_ml.shelf import Speaker

T = TypeVar("T")

OWNER = "recoup-engine"
NAME = re.compile(r"dep_[0-9a-f]{24}")
DEFAULT_TOKENS = 512
"""Where a chat is cut that does not say it."""


class Refusal(Exception):
    """Becomes an answer in OpenAI's shape."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Loaded:
    """A deployment's folder, and the student beside which it is served; None for a whole model."""

    folder: Path
    base: Path | None


@dataclass(frozen=True)
class Asked:
    """A request, read."""

    speaker: "Speaker"
    shape: Shape
    prompts: list[list[int]]
    most: int
    body: dict[str, Any]

    def answers(self) -> Iterator[tuple[int, Iterator[Piece]]]:
        """(index, its parts) of every answer, one prompt after another."""
        from recoup_ml.sampling import Sampling

        given = {
            name: self.body[name] for name in Sampling.__annotations__ if self.body.get(name) is not None
        }
        stop = self.body.get("stop") or []
        stops = [stop] if isinstance(stop, str) else stop
        samples, seed = self.body.get("n") or 1, self.body.get("seed")
        top = self.body.get("top_logprobs") or 0
        if self.shape.kind == "text":
            top = self.body.get("logprobs") or 0
        for place, prompt in enumerate(self.prompts):
            for sample in range(samples):
                own = None if seed is None else seed + sample
                tokens = self.speaker.answer(prompt, self.most, Sampling(**given), own, top)
                yield place * samples + sample, pieces(tokens, stops, self.most)


def serve(settings: Settings, socket: Path) -> None:
    """Answers on the socket until SIGTERM."""
    socket.unlink(missing_ok=True)
    uvicorn.run(create_engine(settings), uds=str(socket), log_level="warning", timeout_graceful_shutdown=2)


def create_engine(settings: Settings) -> Starlette:
    engine = Engine(settings)
    post = ["POST"]
    return Starlette(
        routes=[
            Route("/health", engine.health),
            Route("/v1/models", engine.models),
            Route("/v1/load_lora_adapter", engine.load, methods=post),
            Route("/v1/unload_lora_adapter", engine.unload, methods=post),
            Route("/v1/completions", engine.complete, methods=post),
            Route("/v1/chat/completions", engine.chat, methods=post),
        ],
        exception_handlers={Refusal: _refused},
    )


class Engine:
    """Holds what is loaded, and the one thread in which models run."""

    def __init__(self, settings: Settings) -> None:
        with loading():
            from recoup_ml.shelf import Shelf

        self._settings, self._shelf = settings, Shelf()
        self._loaded: dict[str, Loaded] = {}
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def health(self, _: Request) -> Response:
        return PlainTextResponse("")

    async def models(self, _: Request) -> Response:
        roots = self._settings.model_roots
        cards = [_card(name, locate(name, roots).path) for name in model_names(roots)]
        for name, loaded in self._loaded.items():
            cards.append(_card(name, loaded.folder) | {"parent": loaded.base and str(loaded.base)})
        return JSONResponse({"object": "list", "data": cards})

    async def load(self, request: Request) -> Response:
        """Reads what is to be loaded; models come into memory at their first use."""
        body = await request.json()
        name, folder = str(body.get("lora_name")), Path(str(body.get("lora_path"))).resolve()
        if not NAME.fullmatch(name) or folder != (self._settings.deployments_dir / name).resolve():
            raise Refusal(400, "only deployments are loaded, from the folder of deployments")
        if not folder.is_dir():
            raise Refusal(404, f"there is no folder of {name}")
        self._loaded[name] = Loaded(folder, self._base_of(folder))
        return PlainTextResponse(f"Success: {name} added.")

    async def unload(self, request: Request) -> Response:
        name = str((await request.json()).get("lora_name"))
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            raise Refusal(404, f"{name} is not loaded")
        async with self._turn:
            await self._in_thread(lambda: self._shelf.drop(loaded.folder))
        return PlainTextResponse(f"Success: {name} removed.")

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, await request.json(), "text")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, await request.json(), "chat")

    def _base_of(self, folder: Path) -> Path | None:
        config = folder / "adapter_config.json"
        if not config.exists():
            return None
        source = str(json.loads(config.read_bytes()).get("base_model_name_or_path"))
        try:
            return locate(source, self._settings.model_roots).path
        except Unprocessable as error:
            raise Refusal(400, f"the adapter's base: {error.message}") from None

    async def _speaker(self, name: str) -> "Speaker":
        """Call it holding the turn."""
        from recoup_ml.errors import RecoveryError

        loaded = self._loaded.get(name)
        if loaded is None:
            try:
                base, adapter = locate(name, self._settings.model_roots).path, None
            except Unprocessable:
                raise Refusal(404, f"The model `{name}` does not exist.") from None
        else:
            base, adapter = loaded.base or loaded.folder, loaded.folder if loaded.base else None
        try:
            return await self._in_thread(lambda: self._shelf.speaker(base, adapter))
        except (RecoveryError, OSError, ValueError, RuntimeError) as error:
            self._shelf.clear()
            raise Refusal(500, f"{name} cannot be loaded: {error}") from error

    async def _answer(self, request: Request, body: dict[str, Any], kind: Kind) -> Response:
        if body.get("stream"):
            await self._turn.acquire()
            try:
                asked = await self._read(body, kind)
            except BaseException:
                self._turn.release()
                raise
            return Streamed(self._streamed(asked), self._turn.release)
        async with self._turn:
            asked = await self._read(body, kind)
            answers = [[piece async for piece in self._parts(parts, request)] for _, parts in asked.answers()]
        return JSONResponse(asked.shape.whole(answers, usage_of(_size(asked), answers)))

    async def _read(self, body: dict[str, Any], kind: Kind) -> Asked:
        speaker = await self._speaker(body["model"])
        prompts = _prompts(body, kind, speaker)
        room = speaker.longest - max(map(len, prompts))
        most = min(body.get("max_tokens") or DEFAULT_TOKENS, room)
        if most < 1 or not all(prompts):
            raise Refusal(400, f"a prompt may have 1 to {speaker.longest - 1} tokens")
        vocabulary = speaker.model.config.get_text_config().vocab_size
        if max(map(max, prompts)) >= vocabulary:
            raise Refusal(400, f"token ids are below {vocabulary}")
        wants = bool(body.get("logprobs")) or (kind == "text" and body.get("logprobs") is not None)
        ids = bool(body.get("return_token_ids"))
        shape = Shape.of(kind, body["model"], wants, ids, lambda id: speaker.tokenizer.decode([id]))
        return Asked(speaker, shape, prompts, most, body)

    async def _streamed(self, asked: Asked) -> AsyncIterator[bytes]:
        answers: list[list[Piece]] = []
        for index, parts in asked.answers():
            answers.append([])
            async for piece in self._parts(parts, None):
                first = not answers[-1]
                answers[-1].append(piece)
                if first or piece.text or piece.finish or asked.shape.logprobs:
                    yield _event(asked.shape.chunk(index, piece, first))
        if (asked.body.get("stream_options") or {}).get("include_usage"):
            yield _event(asked.shape.counted(usage_of(_size(asked), answers)))
        yield b"data: [DONE]\n\n"

    async def _parts(self, parts: Iterator[Piece], request: Request | None) -> AsyncIterator[Piece]:
        """One after another, from the model's thread; none any more, where the client has left."""
        while (piece := await self._in_thread(lambda: next(parts, None))) is not None:
            yield piece
            if request is not None and await request.is_disconnected():
                raise Refusal(499, "the client has left")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Waited for even by who is cancelled: the next in turn finds the thread free."""
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            await asyncio.wait({doing})
            raise


class Streamed(StreamingResponse):
    """Gives the turn back however it ends."""

    def __init__(self, content: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._release = release

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


def _prompts(body: dict[str, Any], kind: Kind, speaker: "Speaker") -> list[list[int]]:
    from jinja2 import TemplateError

    from recoup.schemas import Message

    if kind == "chat":
        try:
            return [speaker.ids([Message.model_validate(message) for message in body["messages"]])]
        except (ValueError, TemplateError) as error:  # as pydantic, jinja and transformers say it
            raise Refusal(400, f"the conversation cannot be put into the model's words: {error}") from None
    prompt = body["prompt"]
    many = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    return [speaker.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in many]


def _size(asked: Asked) -> int:
    return sum(map(len, asked.prompts))


def _card(name: str, folder: Path) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": OWNER, "root": str(folder), "parent": None}


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def _refused(_: Request, refusal: Any) -> Response:
    error = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.status}
    return JSONResponse({"error": error}, refusal.status)
