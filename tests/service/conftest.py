"""The fixtures of the server, for all tests of the service."""

from service_server import process, serve, served, templates

__all__ = ["process", "serve", "served", "templates"]
