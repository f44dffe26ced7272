"""Chat completions: the owner of a model is checked, its name is replaced, and the answer of the serving endpoint is
passed on. Only the fields below reach that endpoint, and its own names do not reach the customer."""

import json
import os
import shutil
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from safebasin.errors import UserError
from safebasin.service.errors import ApiError
from safebasin.service.policy import Settings
from safebasin.service.schema import Body, Text

Number = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class ChatBody(Body):
    """The fields of a request that are passed on."""

    model: Annotated[Text, Field(max_length=200)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000)]
    temperature: Number | None = None
    top_p: Number | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    user: str | None = None


class Proxy:
    """The way to the serving endpoint.

    Raises:
        UserError: its key is to stand in a variable of the environment, and does not.
    """

    def __init__(self, settings: Settings):
        self.serving, self.folder = settings.policy.serving, settings.folder / "models"
        self._client: Any = None
        name = self.serving.key if self.serving else ""
        self._key = os.environ.get(name, "") if name else ""
        if name and not self._key:
            raise UserError(f"serving.key: the variable {name} of the environment is empty; it holds the key")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def remove(self, name: str) -> None:
        """Take a tuned model away from the endpoint."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    async def answer(self, body: ChatBody, served: str) -> Any:
        """The endpoint's answer, in one piece or as a stream.

        Raises:
            ApiError: there is no endpoint, it does not answer (503), or it refuses the request (its own status).
        """
        if self.serving is None:
            raise ApiError("This service serves no models.", code="not_served", status=404)
        import httpx2  # loaded with the first request: the server starts faster and smaller without

        if self._client is None:
            headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
            self._client = httpx2.AsyncClient(timeout=self.serving.timeout, headers=headers, trust_env=False)
        content = body.model_dump(exclude_none=True) | {"model": served}
        data = json.dumps(content, ensure_ascii=True).encode()  # lone surrogates stay escapes
        url = f"{self.serving.url.rstrip('/')}/chat/completions"
        request = self._client.build_request("POST", url, content=data, headers={"content-type": "application/json"})
        try:
            answer = await self._client.send(request, stream=True)
            if answer.status_code != 200:
                await answer.aread()
                raise _refusal(answer.status_code, answer.text, served, body.model)
            if body.stream:
                return StreamingResponse(_renamed(answer, body.model), media_type="text/event-stream")
            await answer.aread()
            return JSONResponse({**answer.json(), "model": body.model})
        except (httpx2.HTTPError, ValueError, TypeError) as error:
            text = f"The serving endpoint does not answer ({type(error).__name__}); try again later."
            raise ApiError(text, code="serving_unavailable", status=503) from None


def _refusal(status: int, text: str, served: str, model: str) -> ApiError:
    """The endpoint's error, without its own name for the model. Its faults are not the customer's: 503."""
    if status >= 500 or status in (401, 403, 404):
        return ApiError("The serving endpoint failed; try again later.", code="serving_failed", status=503)
    return ApiError(text.replace(served, model)[:2000], code="refused_by_serving", status=status)


async def _renamed(answer: Any, model: str) -> AsyncIterator[str]:
    """The lines of a stream, each with the customer's name of the model."""
    try:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                try:
                    line = f"data: {json.dumps({**json.loads(line[6:]), 'model': model})}"
                except ValueError:
                    continue
            yield f"{line}\n"
    finally:
        await answer.aclose()
