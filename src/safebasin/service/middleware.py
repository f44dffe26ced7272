"""Around all routes: the limit of a request's body, and the headers of every answer."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from safebasin.service.errors import refused
from safebasin.service.files import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
JSON_BYTES = 16 << 20  # of a request that is no upload


class LimitsAndHeaders:
    """Around all routes: a body has a limit, which is counted as it comes, and every answer the headers of a browser's
    safety."""

    def __init__(self, app: Any, upload: float):
        self.app, self.upload = app, upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        most = self.upload + (1 << 20) if scope["path"] == "/v1/files" else JSON_BYTES
        too_large = Refused(f"The request is larger than {most / 1e6:.0f} MB.", 413)
        size = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        seen = 0

        async def counted() -> Scope:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise too_large
            return message

        async def headed(message: Scope) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                message["headers"] += [(name, value) for name, value in _HEADERS if name not in names]
            await send(message)

        if size.isdigit() and int(size) > most:
            await refused(None, too_large)(scope, receive, headed)
        else:
            await self.app(scope, counted, headed)


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"),
)
