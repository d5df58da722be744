"""`client.diagnoses`: how a student is damaged, without anything done about it."""

from typing import Generic, TypeVar

from recoup import _calls, _follow
from recoup._resource import Lists, Runs, Sends

M = TypeVar("M")


class Diagnoses(Generic[M]):
    """The diagnoses of this server."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_diagnosis)
    get = Sends(_calls.get_diagnosis)
    cancel = Sends(_calls.cancel_diagnosis)

    wait = Runs(_follow.wait_for_diagnosis)
    history = Lists(_calls.list_diagnosis_events)

    alignment = Sends(_calls.get_diagnosis_alignment)
