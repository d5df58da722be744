"""All wiring of the service, in one place: call `create_app` and serve what it returns."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

import recoup
from recoup.schemas import Problem
from recoup_api import diagnoses, files, ops, problems, recoveries
from recoup_api.guard import Guard
from recoup_api.limit import BodyLimit
from recoup_jobs.dispatch import Publish, celery_app, celery_publisher
from recoup_jobs.ledger import Ledger
from recoup_jobs.settings import Settings
from recoup_jobs.sweeper import Sweeper


def create_app(
    settings: Settings, ledger: Ledger, *, publish: Publish | None = None, sweep: bool = True
) -> FastAPI:
    """The application. It sweeps too, unless told not to or there is nowhere to publish hints.

    `publish` replaces the Celery broker of the settings. The caller keeps the ledger, and closes it.
    """
    if publish is None and settings.broker_url is not None:
        publish = celery_publisher(celery_app(settings.broker_url))
    sweeper = Sweeper(ledger, publish, settings) if publish and sweep else None
    app = FastAPI(
        title="Recoup",
        version=recoup.__version__,
        lifespan=_sweeping(sweeper),
        responses={"default": {"model": Problem, "description": "What went wrong (RFC 9457)."}},
    )
    app.state.settings, app.state.ledger, app.state.sweeper = settings, ledger, sweeper
    app.add_middleware(BodyLimit, larger_by_path={"/v1/files": files.LARGEST_UPLOAD})
    app.add_middleware(Guard, api_key=settings.api_key)
    problems.install(app)
    for routes in (recoveries.router, diagnoses.router, files.router, ops.router):
        app.include_router(routes)
    return app


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
