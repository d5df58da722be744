"""`client.recoveries`: submit a recovery, follow and steer it, fetch what came of it.

What each method takes and returns stands in the description that it is made of.
"""

from typing import Generic, TypeVar

from recoup import _calls, _download, _follow
from recoup._resource import Emits, Lists, Runs, Sends
from recoup.schemas import Event

M = TypeVar("M")


class Recoveries(Generic[M]):
    """The recoveries of this server."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_recovery)
    dry_run = Sends(_calls.dry_run)
    get = Sends(_calls.get_recovery)
    list = Lists(_calls.list_recoveries)

    cancel = Sends(_calls.cancel_recovery)
    pause = Sends(_calls.pause_recovery)
    resume = Sends(_calls.resume_recovery)
    retry = Sends(_calls.retry_recovery)
    change = Sends(_calls.change_recovery)

    wait = Runs(_follow.wait)
    events = Emits(_follow.events, of=Event)
    history = Lists(_calls.list_events)

    report = Sends(_calls.get_report)
    report_html = Sends(_calls.get_report_html)
    alignment = Sends(_calls.get_alignment)
    recipe = Sends(_calls.get_recipe)
    artifacts = Lists(_calls.list_artifacts)
    download = Runs(_download.download)
