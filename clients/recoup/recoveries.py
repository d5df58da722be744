"""`client.recoveries`: submit a recovery, follow and steer it, fetch what came of it.

What each method takes and returns stands in the description that it is made of.
"""

from typing import Generic, TypeVar

from recoup import _calls, _download, schemas
from recoup._calls import RECOVERIES
from recoup._follow import Following
from recoup._resource import Emits, Lists, Runs, Sends

M = TypeVar("M")
FOLLOWING = Following(RECOVERIES)


class Recoveries(Generic[M]):
    """The recoveries of this server."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_recovery)
    dry_run = Sends(_calls.dry_run)
    get = Sends(RECOVERIES.get)
    list = Lists(RECOVERIES.list)

    cancel = Sends(RECOVERIES.cancel)
    pause = Sends(RECOVERIES.pause)
    resume = Sends(RECOVERIES.resume)
    retry = Sends(RECOVERIES.retry)
    change = Sends(RECOVERIES.change)

    wait = Runs(FOLLOWING.wait)
    events = Emits(FOLLOWING.events, of=lambda: schemas.Event)
    history = Lists(RECOVERIES.history)

    report = Sends(_calls.get_report)
    report_html = Sends(_calls.get_report_html)
    alignment = Sends(RECOVERIES.alignment)
    recipe = Sends(_calls.get_recipe)
    artifacts = Lists(_calls.list_artifacts)
    download = Runs(_download.download)
