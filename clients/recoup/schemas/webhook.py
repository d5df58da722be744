"""Webhooks: where the service tells that a recovery has ended (standardwebhooks.com)."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from recoup.schemas.recovery import Output
from recoup.schemas.request import Input

WebhookEvent = Literal["recovery.succeeded", "recovery.failed", "recovery.cancelled"]


class CreateWebhook(Input):
    url: Annotated[str, StringConstraints(max_length=2000, pattern=r"^https://[\x21-\x7e]+$")]
    """Of a public host, on port 443."""
    events: Annotated[list[WebhookEvent], Field(min_length=1, max_length=3)] = Field(
        default=["recovery.succeeded", "recovery.failed", "recovery.cancelled"]
    )


class Webhook(Output):
    id: str
    object: Literal["webhook"]
    url: str
    events: list[WebhookEvent]
    created_at: float
    disabled_at: float | None
    """Since when nothing is sent any more: the receiver answered 410."""


class NewWebhook(Webhook):
    secret: str
    """`whsec_…`, with which each message is signed. Shown once."""
