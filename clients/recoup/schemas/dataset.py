"""A line of an uploaded data set, and the one form that the rest of the code sees."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from recoup.schemas.request import Input

Text = Annotated[str, StringConstraints(min_length=1, max_length=200_000, pattern=r"^[^\x00]*$")]
Kind = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]


class Message(Input):
    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(Input):
    """A prompt, with its reference answer where there is one."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    """The conversation up to the answer; the last message is not the assistant's."""
    completion: Text | None = None
    """A reference answer."""
    kind: Kind | None = None
    """The family of the prompt; some families are held out for the test split as a whole."""


class ChatRow(Input):
    """`{"messages": [...]}`; a last message of the assistant's is the reference answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    kind: Kind | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> "ChatRow":
        asked = self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages
        if not asked or asked[-1].role != "user":
            raise ValueError("messages must end with the user's, or with the user's and one answer")
        return self

    def as_prompt(self) -> Prompt:
        *head, last = self.messages
        if last.role == "assistant":
            return Prompt(messages=head, completion=last.content, kind=self.kind)
        return Prompt(messages=self.messages, kind=self.kind)


class PromptRow(Input):
    """`{"prompt": "...", "completion": "..."}`; the completion is optional."""

    prompt: Text
    completion: Text | None = None
    kind: Kind | None = None

    def as_prompt(self) -> Prompt:
        message = Message(role="user", content=self.prompt)
        return Prompt(messages=[message], completion=self.completion, kind=self.kind)


class TextRow(Input):
    """`{"text": "..."}`: natural text."""

    text: Text
