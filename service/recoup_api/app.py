"""All wiring of the service, in one place: call `create_app` and serve what it returns."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

import recoup
from recoup.schemas import ChangeRecovery, CreateDiagnosis, CreateRecovery, Problem
from recoup.schemas.webhook import CreateWebhook
from recoup_api import diagnoses, document, files, fine_tuning, ops, problems, recoveries, webhooks
from recoup_api.guard import Guard
from recoup_api.idempotency import InFlightKeys
from recoup_api.limit import BodyLimit
from recoup_api.observing import Observing
from recoup_api.query import known_query
from recoup_api.rates import Rates
from recoup_api.watch import Watch
from recoup_jobs.dispatch import Publish, celery_app, celery_publisher
from recoup_jobs.keys import Keyring
from recoup_jobs.ledger import Ledger
from recoup_jobs.openai_jobs import CreateJob
from recoup_jobs.settings import Settings
from recoup_jobs.signing import installation_secret
from recoup_jobs.sweeper import Sweeper

ROUTERS = (
    recoveries.router,
    diagnoses.router,
    files.router,
    fine_tuning.router,
    webhooks.router,
    ops.router,
)

INPUTS = (CreateRecovery, ChangeRecovery, CreateDiagnosis, CreateJob, CreateWebhook)
"""Models of JSON bodies."""


def create_app(
    settings: Settings, ledger: Ledger, *, publish: Publish | None = None, sweep: bool | None = None
) -> FastAPI:
    """The application. It sweeps too if it is told to, and by default where hints can be published.

    Without a broker nobody needs a hint: who starts workers looks into the ledger (`worker --once`).
    `publish` replaces the Celery broker of the settings. The caller keeps the ledger, and closes it.
    """
    if publish is None and settings.broker_url is not None:
        publish = celery_publisher(celery_app(settings.broker_url))
    sweeps = publish is not None if sweep is None else sweep
    sweeper = Sweeper(ledger, publish or _tell_nobody, settings) if sweeps else None
    app = FastAPI(
        title="Recoup",
        version=recoup.__version__,
        lifespan=_sweeping(sweeper),
        redirect_slashes=False,
        responses={"default": {"model": Problem, "description": "What went wrong (RFC 9457)."}},
    )
    app.state.settings, app.state.ledger, app.state.sweeper = settings, ledger, sweeper
    app.state.watch, app.state.in_flight = Watch(ledger), InFlightKeys()
    app.state.secret = installation_secret(settings)
    app.add_middleware(BodyLimit, larger_by_path={"/v1/files": files.LARGEST_UPLOAD})
    rates = Rates(settings.requests_per_second, settings.request_burst)
    app.add_middleware(Guard, keys=Keyring(ledger, settings.api_key), rates=rates)
    app.add_middleware(Observing)
    problems.install(app, ROUTERS)
    document.install(app, INPUTS)
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(known_query)])
    return app


def _tell_nobody(_job_id: str, _queue: str) -> None:
    """The publisher of an installation without a broker."""


def _sweeping(sweeper: Sweeper | None) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if sweeper is None:
            yield
            return
        sweeper.start()
        try:
            yield
        finally:
            await run_in_threadpool(sweeper.stop)

    return lifespan
