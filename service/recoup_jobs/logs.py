"""What every process writes about itself: one line an event, with the ids that it belongs to.

Modules log by `logging.getLogger(__name__)`, as the libraries do; structlog formats whatever arrives, so
uvicorn's, Celery's and our own lines look alike. Ids are bound once (`structlog.contextvars`) and stand
in every line below: `request_id` and `trace_id` in the API, `job_id`, `epoch` and `trace_id` in worker
and runner. To change every line, add to `PROCESSORS`.
"""

import logging
import sys
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from recoup_jobs.scrubber import scrubbed

Format = Literal["json", "text"]

QUIET = ("alembic", "httpx2", "httpcore2", "matplotlib")
"""Libraries that tell more than anyone wants to read; their warnings are heard."""
UVICORN = ("uvicorn", "uvicorn.access", "uvicorn.error")


def _drop_colours(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """uvicorn sends each message twice, the second time with terminal colours."""
    event.pop("color_message", None)
    return event


def _scrub(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {name: scrubbed(value) for name, value in event.items()}


PROCESSORS: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
    structlog.processors.format_exc_info,
    _drop_colours,
    _scrub,
]
"""What each event goes through, in this order, before it is rendered."""


def configure(format: Format) -> None:
    """Sends everything that is logged in this process to standard error, in this format."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=PROCESSORS,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(format)],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in UVICORN:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _renderer(format: Format) -> Processor:
    if format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.processors.LogfmtRenderer(
        key_order=["timestamp", "level", "event"], bool_as_flag=False, drop_missing=True
    )
