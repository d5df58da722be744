"""`/v1/models`, `/v1/chat/completions`, `/v1/completions`: OpenAI's API, answered by what is deployed."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from recoup.schemas import Deployment, Page
from recoup.schemas.deployment import ServedModel
from recoup_api.body import body_of, documented
from recoup_api.examples import CHAT_REQUEST, COMPLETION_REQUEST
from recoup_api.gateway import Gateway
from recoup_api.prompting import CreateChatCompletion, CreateCompletion
from recoup_api.wiring import TheCaller, needs

router = APIRouter(tags=["inference"], dependencies=[Depends(needs("models", "read"))])


async def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


TheGateway = Annotated[Gateway, Depends(_gateway)]
ChatBody = Annotated[CreateChatCompletion, Depends(body_of(CreateChatCompletion))]
CompletionBody = Annotated[CreateCompletion, Depends(body_of(CreateCompletion))]


@router.get("/v1/models")
async def models(gateway: TheGateway, caller: TheCaller) -> Page[ServedModel]:
    """What is live, with where it comes from."""
    found = (await gateway.models(caller.tenant)).values()
    return Page(object="list", data=[*map(_served, found)], has_more=False, next_cursor=None)


@router.get("/v1/models/{id}")
async def model(id: str, gateway: TheGateway, caller: TheCaller) -> ServedModel:
    return _served(await gateway.model(caller.tenant, id))


@router.post("/v1/chat/completions", openapi_extra=documented(CreateChatCompletion, CHAT_REQUEST))
async def chat(request: Request, body: ChatBody, gateway: TheGateway, caller: TheCaller) -> Response:
    """An answer to a conversation; as server-sent events where `stream` is true."""
    return await gateway.answer(request, caller.tenant, "/v1/chat/completions", body)


@router.post("/v1/completions", openapi_extra=documented(CreateCompletion, COMPLETION_REQUEST))
async def complete(
    request: Request, body: CompletionBody, gateway: TheGateway, caller: TheCaller
) -> Response:
    """What follows a text, or token ids; as server-sent events where `stream` is true."""
    return await gateway.answer(request, caller.tenant, "/v1/completions", body)


def _served(deployment: Deployment) -> ServedModel:
    return ServedModel(
        id=deployment.name,
        object="model",
        created=int(deployment.live_at or deployment.created_at),
        owned_by="recoup",
        deployment=deployment.id,
        lineage=deployment.lineage,
    )
