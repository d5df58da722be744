"""`client.files`: data sets on the server, in OpenAI's shape."""

from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from recoup import _calls
from recoup._sender import Sender, pages
from recoup.schemas import File


class Files:
    """Uploads, and what is known about them."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def create(self, path: str | PathLike[str], purpose: str = "recovery") -> File:
        """Upload a JSONL file; the server checks it line by line.

        Raises UnprocessableEntityError naming the lines that cannot be used, OSError if
        the file cannot be read.
        """
        return self._sender.send(_calls.create_file(Path(path), purpose))

    def get(self, id: str) -> File:
        """One file's description. Raises NotFoundError."""
        return self._sender.send(_calls.get_file(id))

    def list(self, after: str | None = None, limit: int | None = None) -> Iterator[File]:
        """All files, fetched page by page as they are asked for; `limit` is the size of a page."""
        return pages(lambda cursor: self._sender.send(_calls.list_files(cursor, limit)), after)

    def delete(self, id: str) -> None:
        """Remove a file. Raises NotFoundError."""
        self._sender.send(_calls.delete_file(id))
