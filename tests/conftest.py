"""Fixtures that tests of several packages share."""

import socket

import pytest


@pytest.fixture(scope="session")
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
