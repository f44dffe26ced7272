"""Errors in OpenAI's form, whatever goes wrong."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from safebasin.service.files import Refused
from safebasin.service.schema import error_object
from safebasin.service.store import NotOwned


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.code, self.param, self.status = message, code, param, status


def _answer(message: str, code: str, param: str | None, status: int) -> JSONResponse:
    # The client repeats a 429 by itself; a quota does not change in a second.
    headers = {"x-should-retry": "false"} if status in (413, 429) else {}
    return JSONResponse(error_object(message, code, param, status), status, headers)


def _api_error(_: Any, error: Any) -> JSONResponse:
    return _answer(error.message, error.code, error.param, error.status)


def _not_owned(_: Any, error: Any) -> JSONResponse:
    return _answer(str(error), "not_found", None, 404)


def refused(_: Any, error: Any) -> JSONResponse:
    """The answer to a file or a body that is ``Refused`` as it comes in."""
    return _answer(str(error), "invalid_file", "file", error.status)


def _invalid(_: Any, error: Any) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
    return _answer(f"{param}: {first['msg']}" if param else first["msg"], "invalid_request", param or None, 400)


def _http(_: Any, error: Any) -> JSONResponse:
    answer = _answer(str(error.detail), "not_found" if error.status_code == 404 else "invalid", None, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


def _broke(_: Any, error: Any) -> JSONResponse:
    return _answer("The server failed; the operator's log has the reason.", "server_error", None, 500)


def _gone(_: Any, error: Any) -> JSONResponse:
    return _answer("The client closed the connection.", "client_closed", None, 400)


HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    NotOwned: _not_owned,
    Refused: refused,
    RequestValidationError: _invalid,
    HTTPException: _http,
    ClientDisconnect: _gone,
    Exception: _broke,
}
