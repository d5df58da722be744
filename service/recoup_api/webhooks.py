"""`/v1/webhooks`: where to tell that recoveries have ended. Sending is `recoup_jobs/deliveries.py`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from recoup.schemas import Page
from recoup.schemas.webhook import CreateWebhook, NewWebhook, Webhook
from recoup_api.body import body_of, documented
from recoup_api.examples import WEBHOOK_REQUEST
from recoup_api.wiring import TheCaller, TheLedger, needs
from recoup_jobs import webhooks
from recoup_jobs.public_https import addresses_of

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], dependencies=[Depends(needs("webhooks"))])

WebhookBody = Annotated[CreateWebhook, Depends(body_of(CreateWebhook))]


@router.post("", status_code=201, openapi_extra=documented(CreateWebhook, WEBHOOK_REQUEST))
def create(
    request: Request, body: WebhookBody, ledger: TheLedger, caller: TheCaller, response: Response
) -> NewWebhook:
    """The secret is shown in this answer alone."""
    made = webhooks.add(ledger, body, caller.tenant, request.app.state.secret, addresses_of)
    response.headers["Location"] = f"/v1/webhooks/{made.id}"
    return made


@router.get("")
def find(ledger: TheLedger, caller: TheCaller) -> Page[Webhook]:
    return Page(object="list", data=webhooks.find(ledger, caller.tenant), has_more=False, next_cursor=None)


@router.get("/{id}")
def read(id: str, ledger: TheLedger, caller: TheCaller) -> Webhook:
    return webhooks.get(ledger, id, caller.tenant)


@router.delete("/{id}", status_code=204)
def delete(id: str, ledger: TheLedger, caller: TheCaller) -> None:
    webhooks.remove(ledger, id, caller.tenant)
