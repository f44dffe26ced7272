"""OpenAI-compatible endpoints: chat completions over HTTP, with tries, limits, and several requests at a time."""

import concurrent.futures
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, PositiveInt
from pydantic.dataclasses import dataclass

from safebasin.data.files import shown
from safebasin.errors import UserError

LARGEST = 1 << 20  # bytes of a reply
OF_THE_ROW = (400, 413, 422)  # this one request is refused (it is too long, for example)
RESERVED = {"model", "messages", "stream"}  # of the request; not for ``settings``
BESIDE = ("refusal", "tool_calls", "function_call")  # of a message: what a server writes in the place of text
T = TypeVar("T")
R = TypeVar("R")


class RequestRefused(Exception):
    """This one request is refused; others may not be."""


def _text(message: Any, reason: str) -> str:
    """The text of an answer: a string, or parts of text.

    Raises:
        RequestRefused: there is none, or it is not what the model alone wrote: a filter, a refusal of the server's own,
            calls of tools, thoughts kept elsewhere.
    """
    beside = [key for key in BESIDE if message.get(key)]
    if beside or reason == "content_filter" or message["content"] is None:
        fields = "".join(f" and {key}" for key in beside)
        raise RequestRefused(f"an answer with finish_reason {shown(reason)}{fields}, which is not the model's text")
    content = message["content"]
    text: str = "".join(part["text"] for part in content) if isinstance(content, list) else content + ""
    text.encode()  # half a character, as JSON can write it, is a ValueError
    return text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Not followed: it would carry the key to another host."""


def _plain_url(url: str) -> str:
    """ValueError where a URL is no endpoint or holds a secret, which would stand in run.yaml and in messages."""
    parts = urllib.parse.urlsplit(url)
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or not plain:
        raise ValueError("must be like http://host:port/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("holds a user, a password or a query; name the environment variable of the key in `key`")
    return url


def _no_reserved(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if RESERVED & settings.keys():
        raise ValueError(f"may not hold {', '.join(sorted(RESERVED & settings.keys()))}: they are set for each request")
    return settings


Url = Annotated[str, AfterValidator(_plain_url)]
Settings = Annotated[dict[str, JsonValue], AfterValidator(_no_reserved)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Endpoint:
    """Where chat completions are asked for, and how often."""

    url: Url  # of the API: http://127.0.0.1:8000/v1
    key: str = ""  # the NAME of the environment variable that holds the key
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0  # seconds a try
    tries: Annotated[int, Field(ge=1, le=10)] = 3  # of one request
    wait: Annotated[float, Field(ge=0, le=3600)] = 1.0  # seconds before the second try, twice as long before each next
    concurrent: Annotated[PositiveInt, Field(le=256)] = 1  # requests at a time

    def check_key(self, where: str) -> None:
        """UserError where the key is not there or cannot be sent. The message does not hold it."""
        if self.key and not (secret := os.environ.get(self.key, "").strip()):
            raise UserError(
                f"{where}.key: the environment variable {self.key!r} is not set; export the key of {self.url} in it"
            )
        if self.key and not (secret.isascii() and secret.isprintable()):
            raise UserError(f"{where}.key: the environment variable {self.key!r} holds characters that no key has")

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What ``work`` gives for every item, in their order, ``concurrent`` of them at a time."""
        if self.concurrent == 1:
            return [work(item) for item in items]
        with concurrent.futures.ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(work, items))

    def choice(self, body: bytes) -> tuple[str, str]:
        """The text of the first choice, and the reason why it ended.

        Raises:
            RequestRefused: this one request is.
            ConnectionError: no completion after all tries.
        """
        for k in range(self.tries):
            time.sleep(self.wait * 2 ** (k - 1) if k else 0)
            try:
                first = json.loads(self._post(body))["choices"][0]
                return _text(first["message"], reason := str(first.get("finish_reason"))), reason
            except urllib.error.HTTPError as error:
                error.close()
                why = f"HTTP status {error.code}"
                if error.code in OF_THE_ROW:
                    raise RequestRefused(why) from None
                if error.code < 500 and error.code not in (408, 429):
                    break  # asking again changes nothing
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer from {self.url} ({type(error).__name__})"
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                why = f"{self.url} does not answer with a chat completion"
        raise ConnectionError(why)

    def _post(self, body: bytes) -> bytes:
        bearer = {"Authorization": f"Bearer {os.environ[self.key].strip()}"} if self.key else {}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", body, {"Content-Type": "application/json", **bearer}
        )
        raw, until = b"", time.monotonic() + self.timeout
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):  # the socket's own limit starts again with every byte
                raw += part
                if len(raw) > LARGEST or time.monotonic() > until:
                    raise TimeoutError("a reply without end")
        return raw
