"""All wiring of the service, in one place: call `create_app` and serve what it returns."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

import recoup
from recoup.schemas import ChangeRecovery, CreateDeployment, CreateDiagnosis, CreateRecovery, Problem
from recoup.schemas.webhook import CreateWebhook
from recoup_api import (
    deployments,
    diagnoses,
    document,
    files,
    fine_tuning,
    inference,
    ops,
    problems,
    recoveries,
    straight,
    webhooks,
)
from recoup_api.gateway import Gateway
from recoup_api.guard import Guard
from recoup_api.idempotency import InFlightKeys
from recoup_api.limit import BodyLimit
from recoup_api.observing import Observing
from recoup_api.prompting import CreateChatCompletion, CreateCompletion
from recoup_api.query import known_query
from recoup_api.rates import Rates
from recoup_api.threads import make_threads
from recoup_api.watch import Watch
from recoup_jobs.deployments import Deployments
from recoup_jobs.dispatch import Publish, celery_app, celery_publisher
from recoup_jobs.inspection import Inspections
from recoup_jobs.keys import Keyring
from recoup_jobs.ledger import Ledger
from recoup_jobs.openai_jobs import CreateJob
from recoup_jobs.reconciler import Reconciler
from recoup_jobs.scrubber import scrub_logs
from recoup_jobs.settings import Settings
from recoup_jobs.signing import installation_secret
from recoup_jobs.sweeper import Sweeper

ROUTERS = (
    recoveries.router,
    diagnoses.router,
    files.router,
    fine_tuning.router,
    webhooks.router,
    deployments.router,
    inference.router,
    ops.router,
)

INPUTS = (
    CreateRecovery,
    ChangeRecovery,
    CreateDiagnosis,
    CreateJob,
    CreateWebhook,
    CreateDeployment,
    CreateChatCompletion,
    CreateCompletion,
)
"""Models of JSON bodies."""


def create_app(
    settings: Settings, ledger: Ledger, *, publish: Publish | None = None, sweep: bool | None = None
) -> FastAPI:
    """The application. It sweeps and reconciles too if it is told to, and by default where it can.

    Without a broker nobody needs a hint: who starts workers looks into the ledger (`worker --once`).
    `publish` replaces the Celery broker of the settings. The caller keeps the ledger, and closes it.
    """
    scrub_logs()
    if publish is None and settings.broker_url is not None:
        publish = celery_publisher(celery_app(settings.broker_url))
    sweeps = publish is not None if sweep is None else sweep
    sweeper = Sweeper(ledger, publish or _tell_nobody, settings) if sweeps else None
    reconciler = Reconciler(ledger, settings) if settings.serve_urls and sweep is not False else None
    app = FastAPI(
        title="Recoup",
        version=recoup.__version__,
        lifespan=_with_threads(sweeper, reconciler),
        redirect_slashes=False,
        responses={"default": {"model": Problem, "description": "What went wrong (RFC 9457)."}},
    )
    app.state.settings, app.state.ledger = settings, ledger
    app.state.sweeper, app.state.reconciler = sweeper, reconciler
    app.state.watch, app.state.in_flight = Watch(ledger), InFlightKeys()
    app.state.secret, app.state.inspections = installation_secret(settings), Inspections()
    app.state.deployments = Deployments(ledger, settings.serve_urls)
    app.state.gateway = Gateway(app.state.deployments, settings)
    app.add_middleware(BodyLimit, larger_by_path={"/v1/files": files.LARGEST_UPLOAD})
    rates = Rates(settings.requests_per_second, settings.request_burst)
    app.add_middleware(Guard, keys=Keyring(ledger, settings.api_key), rates=rates)
    app.add_middleware(Observing)
    problems.install(app, ROUTERS)
    document.install(app, INPUTS)
    app.router.routes[:0] = straight.ROUTES
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(known_query)])
    return app


def _tell_nobody(_job_id: str, _queue: str) -> None:
    """The publisher of an installation without a broker."""


def _with_threads(
    *threads: Sweeper | Reconciler | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Threads that run while the application serves."""
    running = [thread for thread in threads if thread is not None]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        make_threads()
        for thread in running:
            thread.start()
        try:
            yield
        finally:
            await app.state.gateway.close()
            for thread in running:
                await run_in_threadpool(thread.stop)

    return lifespan
