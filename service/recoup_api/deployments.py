"""`/v1/deployments`: recovered models in service. Placing them is `recoup_jobs/reconciler.py`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from recoup.schemas import CreateDeployment, Deployment, DeploymentState, Page
from recoup_api.body import body_of, documented
from recoup_api.cursors import seal, unseal
from recoup_api.examples import DEPLOYMENT_REQUEST
from recoup_api.idempotency import IdempotencyKey, Keep, answer_once
from recoup_api.wiring import After, Limit, TheCaller, TheDeployments, TheLedger, TheSettings, needs
from recoup_jobs.answers import Answer
from recoup_jobs.errors import Conflict
from recoup_jobs.publication import prepared

router = APIRouter(prefix="/v1/deployments", tags=["deployments"], dependencies=[Depends(needs("models"))])

DeploymentBody = Annotated[CreateDeployment, Depends(body_of(CreateDeployment))]


@router.post(
    "",
    status_code=202,
    response_model=Deployment,
    openapi_extra=documented(CreateDeployment, DEPLOYMENT_REQUEST),
)
def create(
    request: Request,
    body: DeploymentBody,
    ledger: TheLedger,
    deployments: TheDeployments,
    settings: TheSettings,
    caller: TheCaller,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Serves what a recovery handed over, once its effect is proven on every server of its student."""

    def make(keep: Keep) -> Answer:
        def keep_accepted(conn: Connection, made: Deployment) -> None:
            keep(conn, lambda: _accepted(made))

        if not settings.serve_urls:
            message = "this installation has no servers to deploy to; name some in RECOUP_SERVE_URLS"
            raise Conflict("no_replicas", message)
        new = prepared(body, ledger, settings, caller.tenant)
        return _accepted(deployments.add(new, settings.max_deployments, keep_accepted))

    return answer_once(request, idempotency_key, body.model_dump_json, make)


@router.get("")
def find(
    request: Request,
    deployments: TheDeployments,
    caller: TheCaller,
    after: After = None,
    limit: Limit = 20,
    state: DeploymentState | None = None,
) -> Page[Deployment]:
    found = deployments.find(caller.tenant, unseal(request, after, state or ""), limit, state)
    return found.model_copy(update={"next_cursor": seal(request, found.next_cursor, state or "")})


@router.get("/{id}")
def read(id: str, deployments: TheDeployments, caller: TheCaller) -> Deployment:
    return deployments.get(id, caller.tenant)


@router.delete("/{id}")
def withdraw(id: str, deployments: TheDeployments, caller: TheCaller) -> Deployment:
    """Takes it out of service; its row stays."""
    return deployments.withdraw(id, caller.tenant)


@router.post("/{id}/rollback", status_code=202)
def roll_back(id: str, deployments: TheDeployments, caller: TheCaller, response: Response) -> Deployment:
    """Answers the deployment that had the name before; this one serves until that is live again."""
    before = deployments.roll_back(id, caller.tenant)
    response.headers["Location"] = f"/v1/deployments/{before.id}"
    return before


def _accepted(made: Deployment) -> Answer:
    return Answer(202, {"Location": f"/v1/deployments/{made.id}"}, made.model_dump_json())
