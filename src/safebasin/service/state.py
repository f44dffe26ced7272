"""What the routes of the API work on, and the tenant whose key a request brings."""

import collections
import dataclasses
from typing import Annotated

from fastapi import Depends, Header, Request

from safebasin.service.errors import ApiError
from safebasin.service.files import Storage
from safebasin.service.policy import Settings
from safebasin.service.proxy import Proxy
from safebasin.service.store import Kind, Store, key_of, own
from safebasin.service.supervisor import Supervisor


@dataclasses.dataclass(frozen=True)
class State:
    """Of a server. ``streams``: how many each tenant has open."""

    store: Store
    storage: Storage
    settings: Settings
    supervisor: Supervisor
    proxy: Proxy
    streams: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def own(self, kind: type[Kind], name: str, tenant: str) -> Kind:
        """A tenant's file, job or model; see ``store.own``."""
        with self.store.session() as session:
            return own(session, kind, name, tenant)


async def state_of(request: Request) -> State:
    """The state that ``create_app`` gave to the server."""
    state: State = request.app.state.service
    return state


TheState = Annotated[State, Depends(state_of)]


def tenant_of(state: TheState, authorization: Annotated[str, Header()] = "") -> str:
    """The tenant whose key a request brings. Every route of the API depends on this (tests go through them)."""
    kind, _, secret = authorization.partition(" ")
    with state.store.session() as session:
        key = key_of(session, secret) if kind.lower() == "bearer" and secret.isascii() else None
    if key is None or key.tenant is None:
        raise ApiError("Incorrect API key provided.", code="invalid_api_key", status=401)
    return key.tenant


TenantId = Annotated[str, Depends(tenant_of)]
Retry = Annotated[int, Header(alias="x-stainless-retry-count", ge=0, le=100)]
