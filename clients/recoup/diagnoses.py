"""`client.diagnoses`: how a student is damaged, without anything done about it.

What each method takes and returns stands in the description that it is made of.
"""

from typing import Generic, TypeVar

from recoup import _calls, schemas
from recoup._calls import DIAGNOSES
from recoup._follow import Following
from recoup._resource import Emits, Lists, Runs, Sends

M = TypeVar("M")
FOLLOWING = Following(DIAGNOSES)


class Diagnoses(Generic[M]):
    """The diagnoses of this server."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_diagnosis)
    get = Sends(DIAGNOSES.get)
    list = Lists(DIAGNOSES.list)

    cancel = Sends(DIAGNOSES.cancel)
    pause = Sends(DIAGNOSES.pause)
    resume = Sends(DIAGNOSES.resume)
    retry = Sends(DIAGNOSES.retry)
    change = Sends(DIAGNOSES.change)

    wait = Runs(FOLLOWING.wait)
    events = Emits(FOLLOWING.events, of=lambda: schemas.Event)
    history = Lists(DIAGNOSES.history)

    alignment = Sends(DIAGNOSES.alignment)
