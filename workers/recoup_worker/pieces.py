"""From tokens to what OpenAI's clients read: text that ends before a stop text, chunks, whole answers."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from recoup_ml.shelf import Token

Kind = Literal["chat", "text"]
Finish = Literal["stop", "length"]
Spell = Callable[[int], str]
"""What a token looks like alone."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that is sure to belong to it, and the tokens that were chosen for it."""

    text: str
    tokens: "list[Token]"
    finish: Finish | None


def pieces(tokens: "Iterator[Token]", stops: Sequence[str], most: int) -> Iterator[Piece]:
    """Text that may turn out to be the beginning of a stop text is held back until that is known."""
    held, longest = "", max(map(len, stops), default=1)
    for count, token in enumerate(tokens, start=1):
        held += token.text
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            yield Piece(held[: min(found)], [token], "stop")
            return
        finish: Finish | None = "stop" if token.ends else "length" if count >= most else None
        sure = len(held) if finish else max(0, len(held) - longest + 1)
        yield Piece(held[:sure], [token], finish)
        held = held[sure:]
        if finish:
            return


@dataclass(frozen=True)
class Shape:
    """How the answers to one request look."""

    kind: Kind
    model: str
    logprobs: bool
    token_ids: bool
    spell: Spell
    id: str
    created: int

    @staticmethod
    def of(kind: Kind, model: str, logprobs: bool, token_ids: bool, spell: Spell) -> "Shape":
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return Shape(
            kind, model, logprobs, token_ids, spell, f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        )

    def chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        """A part of a stream."""
        said: dict[str, Any] = {"text": piece.text}
        if self.kind == "chat":
            said = {"delta": {"content": piece.text} | ({"role": "assistant"} if first else {})}
        return self._answer("chat.completion.chunk", [self._choice(index, piece, said)])

    def counted(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream, for whoever asked for it."""
        return self._answer("chat.completion.chunk", []) | {"usage": usage}

    def whole(self, answers: Sequence[Sequence[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        return self._answer("chat.completion", [self._whole(*one) for one in enumerate(answers)]) | {
            "usage": usage
        }

    def _whole(self, index: int, parts: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        tokens = [token for part in parts for token in part.tokens]
        said: dict[str, Any] = {"text": text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": text}}
        return self._choice(index, Piece(text, tokens, parts[-1].finish), said)

    def _answer(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = kind if self.kind == "chat" else "text_completion"
        told = {"id": self.id, "object": named, "created": self.created, "model": self.model}
        return told | {"choices": choices}

    def _choice(self, index: int, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens) if self.logprobs else None
        ids = {"token_ids": [token.id for token in piece.tokens]} if self.token_ids else {}
        return {"index": index, **said, **ids, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, tokens: "Sequence[Token]") -> dict[str, Any]:
        if self.kind == "chat":
            return {"content": [self._entry(token) for token in tokens]}
        tops = [{self.spell(id): log_p for id, log_p in token.top} for token in tokens]
        spelt = [self.spell(token.id) for token in tokens]
        offsets = [sum(map(len, spelt[:place])) for place in range(len(spelt))]
        values = [token.log_p for token in tokens]
        return {"tokens": spelt, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _entry(self, token: "Token") -> dict[str, Any]:
        top = [self._one(id, log_p) for id, log_p in token.top]
        return self._one(token.id, token.log_p) | {"top_logprobs": top}

    def _one(self, id: int, log_p: float) -> dict[str, Any]:
        spelt = self.spell(id)
        return {"token": spelt, "logprob": log_p, "bytes": [*spelt.encode()]}


def usage_of(prompt: int, answers: Sequence[Sequence[Piece]]) -> dict[str, int]:
    said = sum(len(piece.tokens) for parts in answers for piece in parts)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
