"""`client.deployments`: recovered models in service, each under a name that clients pass as `model`."""

from typing import Generic, TypeVar

from recoup import _calls, _follow
from recoup._resource import Lists, Runs, Sends

M = TypeVar("M")


class Deployments(Generic[M]):
    """The deployments of this server."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_deployment)
    get = Sends(_calls.get_deployment)
    list = Lists(_calls.list_deployments)
    delete = Sends(_calls.delete_deployment)
    rollback = Sends(_calls.roll_back_deployment)

    wait = Runs(_follow.wait_for_deployment)
    chat = Sends(_calls.chat)
