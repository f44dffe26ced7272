"""Models, the provider's and the tenant's own, and chat with them."""

from typing import Any

from fastapi import APIRouter
from sqlmodel import col, select
from starlette.concurrency import run_in_threadpool

from safebasin.service.errors import ApiError
from safebasin.service.proxy import ChatBody
from safebasin.service.schema import model_object, model_row
from safebasin.service.state import State, TenantId, TheState
from safebasin.service.store import Model, own

router = APIRouter()


@router.get("/v1/models")
def list_models(tenant: TenantId, state: TheState) -> dict[str, Any]:
    with state.store.session() as session:
        rows = session.exec(select(Model).where(Model.tenant == tenant).order_by(col(Model.created))).all()
    bases = [model_object(name, 0.0, "provider") for name in state.settings.policy.models]
    return {"object": "list", "data": [*bases, *map(model_row, rows)]}


@router.get("/v1/models/{name}")
def retrieve_model(name: str, tenant: TenantId, state: TheState) -> dict[str, Any]:
    if name in state.settings.policy.models:
        return model_object(name, 0.0, "provider")
    return model_row(state.own(Model, name, tenant))


@router.delete("/v1/models/{name}")
def delete_model(name: str, tenant: TenantId, state: TheState) -> dict[str, Any]:
    if name in state.settings.policy.models:
        raise ApiError("This model is the provider's; it cannot be deleted.", code="forbidden", status=403)
    with state.store.session() as session:
        model = own(session, Model, name, tenant)
        session.delete(model)
    short = model.job.removeprefix("ftjob-")
    state.storage.remove(state.storage.path(tenant, f"models/{short}"))
    state.proxy.remove(short)
    return {"id": name, "object": "model", "deleted": True}


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, tenant: TenantId, state: TheState) -> Any:
    return await state.proxy.answer(body, await run_in_threadpool(_served, state, body.model, tenant))


def _served(state: State, name: str, tenant: str) -> str:
    if base := state.settings.policy.models.get(name):
        return base.served or name
    return state.own(Model, name, tenant).served
