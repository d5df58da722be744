"""One server of models, vLLM or the local engine, as the reconciler speaks to it.

Both speak vLLM's dialect of OpenAI's API. A server that cannot be reached, or that is not well, is `Away`:
nothing is concluded from that. One that answers no has `Refused`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import BaseModel, TypeAdapter, ValidationError

from recoup.schemas import JobError, ProbeRow

CONNECT_SECONDS, LOOK_SECONDS, WORK_SECONDS = 2.0, 10.0, 300.0
SOCKET = "unix:"
LONGEST_WORDS = 300
WHOLE_MODELS = "recoup-engine"
"""Who owns a model by the words of the local engine, which loads whole models beside adapters."""


class Card(BaseModel):
    """As much of an entry of `/v1/models` as is read."""

    id: str
    root: str | None = None
    parent: str | None = None
    """Of an adapter: the model that it changes."""
    owned_by: str | None = None


Cards = TypeAdapter(list[Card])


class Away(Exception):
    """The server gives no answer from which anything follows."""


class Refused(Exception):
    """The server will not do it; `reason` is what a deployment is told."""

    def __init__(self, reason: JobError) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Seen:
    """What a server lists."""

    bases: dict[str, str]
    """Whole models: name -> the folder that they came from."""
    adapters: frozenset[str]
    takes_models: bool
    """Whether it loads whole models at run time."""


def address(url: str) -> tuple[str, str | None]:
    """(base URL, path of a unix socket or None) of a server's name in the settings."""
    if url.startswith(SOCKET):
        return "http://engine", url.removeprefix(SOCKET)
    return url.rstrip("/"), None


class Replica:
    """Holds connections to one server."""

    def __init__(self, url: str) -> None:
        base, socket = address(url)
        transport = httpx2.HTTPTransport(uds=socket) if socket else None
        self._http = httpx2.Client(base_url=base, transport=transport, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def look(self) -> Seen:
        listed = self._answer("GET", "/v1/models", None, LOOK_SECONDS)
        try:
            cards = Cards.validate_python(listed.get("data"))
        except ValidationError:
            raise Away("its list of models cannot be read") from None
        whole = [card for card in cards if not card.parent]
        return Seen(
            bases={card.id: card.root or card.id for card in whole},
            adapters=frozenset(card.id for card in cards if card.parent),
            takes_models=any(card.owned_by == WHOLE_MODELS for card in whole),
        )

    def load(self, name: str, folder: Path) -> None:
        """Where it is loaded, that stays so.

        A server without the route finds the folder by itself, through vLLM's filesystem resolver.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        answer = self._send("POST", "/v1/load_lora_adapter", body, WORK_SECONDS)
        if answer.status_code in {404, 405} and "error" not in _json(answer):
            return
        if answer.status_code == 400 and "already been loaded" in answer.text:
            return
        _require_success(answer, "load_refused")

    def unload(self, name: str) -> None:
        """What is not there counts as unloaded."""
        answer = self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name}, LOOK_SECONDS)
        if answer.status_code not in {404, 405}:
            _require_success(answer, "unload_refused")

    def log_probabilities(self, model: str, rows: Sequence[ProbeRow]) -> list[float]:
        """log p(token | ids) of each row under `model`, nats.

        The token is the only one allowed, and its log-probability is the model's own, before that. (To ask
        for `prompt_logprobs` would be one request instead of many, but takes vLLM down where adapters are on
        and two prompts are in one batch: seen in 0.32.)
        """
        return [self._log_probability(model, row) for row in rows]

    def _log_probability(self, model: str, row: ProbeRow) -> float:
        body = {
            "model": model,
            "prompt": row.ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "allowed_token_ids": [row.token],
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = self._answer("POST", "/v1/completions", body, WORK_SECONDS)
        try:
            (choice,) = answer["choices"]
            chosen, log_p = choice["token_ids"], float(choice["logprobs"]["token_logprobs"][0])
        except (KeyError, TypeError, ValueError, IndexError):
            chosen, log_p = [], 0.0
        if chosen != [row.token]:
            message = "The server's log-probabilities of the probe's tokens cannot be read."
            raise Refused(JobError(code="probe_unreadable", message=message))
        return log_p

    def _answer(self, method: str, path: str, body: Any, seconds: float) -> dict[str, Any]:
        answer = self._send(method, path, body, seconds)
        _require_success(answer, "probe_refused")
        return _json(answer)

    def _send(self, method: str, path: str, body: Any, seconds: float) -> httpx2.Response:
        timeout = httpx2.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            return self._http.request(method, path, json=body, timeout=timeout)
        except httpx2.TransportError as error:
            raise Away(f"{type(error).__name__}: {error}") from error


def _require_success(answer: httpx2.Response, code: str) -> None:
    if answer.status_code in {429, 502, 503, 504}:
        raise Away(f"it answers {answer.status_code}")
    if not answer.is_success:
        told = _json(answer).get("error", {})
        words = told.get("message") if isinstance(told, dict) else told
        message = f"The server answers {answer.status_code}: {str(words or 'no')[:LONGEST_WORDS]}"
        raise Refused(JobError(code=code, message=message))


def _json(answer: httpx2.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
