"""The fixtures of the server, for all tests of the service."""

import pytest
from postgres import database
from service_server import CLIENTS, process, serve, served, templates

__all__ = ["clients_are_closed", "database", "process", "serve", "served", "templates"]


@pytest.fixture(scope="module", autouse=True)
def clients_are_closed():
    yield
    while CLIENTS:
        CLIENTS.pop().close()
