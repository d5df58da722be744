"""What may be asked of a served model: OpenAI's chat and text completions, bounded and known by name.

A request becomes one of ours, and only what is written here goes on to a server: vLLM reads fields that
load files, run templates or take the process down. What OpenAI takes and nothing here acts on (`user`,
`metadata`, `store`) is accepted and goes nowhere; every other field is refused by name, as OpenAI does.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from recoup.schemas.request import Input, MetadataKey, MetadataValue

MOST_TOKENS = 32_768
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS)]
Text = Annotated[str, StringConstraints(max_length=1 << 20)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
IGNORED = frozenset({"user", "metadata", "store", "response_format"})


class StreamOptions(Input):
    include_usage: bool = False


class TextPart(Input):
    type: Literal["text"]
    text: Text


class TextFormat(Input):
    type: Literal["text"]


class ChatMessage(Input):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = None

    def as_sent(self) -> dict[str, str]:
        """Templates know no developers, and their texts are whole."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Sampling(Input):
    """What both kinds of requests have in common."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    """The name of a deployment."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 1, as of OpenAI; whatever the model's own generation_config says."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=100_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Accepted, and goes nowhere."""
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    """Accepted, and goes nowhere."""

    @model_validator(mode="after")
    def _streams(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self


DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sent by name, for vLLM would take what is missing from the model's generation_config."""


class CreateChatCompletion(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    max_tokens: Tokens | None = None
    """Where an answer is cut; null: where the server's longest sequence ends."""
    max_completion_tokens: Tokens | None = None
    """The same, by its newer name, which wins."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Literal[False] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _counts(self) -> "CreateChatCompletion":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are for logprobs: true")
        return self

    def as_sent(self, model: str) -> dict[str, Any]:
        """The body for a server, where the model has another name."""
        own = {"messages": [message.as_sent() for message in self.messages], "model": model}
        most = self.max_completion_tokens or self.max_tokens
        return (
            _given(self, "messages", "max_tokens", "max_completion_tokens")
            | own
            | ({"max_tokens": most} if most else {})
        )


class CreateCompletion(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=16)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=16)]
    )
    max_tokens: Tokens | None = None
    """Default 16."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def as_sent(self, model: str) -> dict[str, Any]:
        """The body for a server, where the model has another name."""
        return {"max_tokens": 16} | _given(self) | {"model": model}


def _given(asked: Sampling, *but: str) -> dict[str, Any]:
    given = asked.model_dump(exclude_none=True, exclude={*IGNORED, *but})
    return DEFAULTS | given
