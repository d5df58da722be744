"""`client.files`: data sets on the server, in OpenAI's shape."""

from typing import Generic, TypeVar

from recoup import _calls
from recoup._resource import Lists, Sends

M = TypeVar("M")


class Files(Generic[M]):
    """Uploads, and what is known about them."""

    def __init__(self, driver: M) -> None:
        self._driver = driver

    create = Sends(_calls.create_file)
    get = Sends(_calls.get_file)
    list = Lists(_calls.list_files)
    content = Sends(_calls.get_file_content)
    delete = Sends(_calls.delete_file)
