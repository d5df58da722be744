"""What operators and clients ask of the service itself: is it alive, is it ready, what can it do."""

from typing import get_args

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from sqlalchemy import select

import recoup
from recoup.schemas import Capabilities, Damage, Method, TrainingSpec
from recoup_api.wiring import TheCaller, TheLedger, TheSettings
from recoup_jobs.errors import Forbidden, Unavailable
from recoup_jobs.gauges import exposition
from recoup_jobs.keys import READ_METRICS
from recoup_jobs.metrics import CONTENT_TYPE
from recoup_jobs.reconciler import Reconciler
from recoup_jobs.sources import model_names
from recoup_jobs.sweeper import Sweeper

router = APIRouter(tags=["operations"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
def readyz(request: Request, ledger: TheLedger) -> dict[str, str]:
    """Answers 503 while the database is away, or once the sweeper or the reconciler has died."""
    sweeper: Sweeper | None = request.app.state.sweeper
    if sweeper is not None and not sweeper.alive:
        raise Unavailable("sweeper_stopped", "the thread that publishes hints has died; restart the service")
    reconciler: Reconciler | None = request.app.state.reconciler
    if reconciler is not None and not reconciler.alive:
        message = "the thread that keeps deployments on their servers has died; restart the service"
        raise Unavailable("reconciler_stopped", message)
    with ledger.reading() as conn:
        conn.execute(select(1))
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(ledger: TheLedger, caller: TheCaller) -> Response:
    """For Prometheus; the key needs the scope `metrics:read`."""
    if READ_METRICS not in caller.scopes:
        raise Forbidden("insufficient_scope", f"this key lacks the scope {READ_METRICS}")
    return Response(exposition(ledger), media_type=CONTENT_TYPE)


@router.get("/v1/capabilities")
def capabilities(settings: TheSettings) -> Capabilities:
    return Capabilities(
        version=recoup.__version__,
        damages=list(get_args(Damage)),
        methods=["auto", *get_args(Method)],
        training_modes=list(get_args(TrainingSpec.model_fields["mode"].annotation)),
        models=model_names(settings.model_roots),
    )
