"""The server: the routes of the API and the operator's pages, around one state."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware

from safebasin.service import page
from safebasin.service.errors import HANDLERS
from safebasin.service.files import Storage
from safebasin.service.middleware import LimitsAndHeaders
from safebasin.service.policy import Settings
from safebasin.service.proxy import Proxy
from safebasin.service.routes import events, files, jobs, models
from safebasin.service.state import State
from safebasin.service.store import Store
from safebasin.service.supervisor import Supervisor


def create_app(settings: Settings) -> FastAPI:
    """The server of a policy.

    Raises:
        UserError: the database or the storage cannot be opened, or another server works in the folder.
    """
    store, storage = Store(settings.database), Storage(settings.storage)
    supervisor, proxy = Supervisor(store, storage, settings), Proxy(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(supervisor.start)
        yield
        await run_in_threadpool(supervisor.stop)
        await proxy.close()
        store.close()

    app = FastAPI(
        title="safebasin",
        lifespan=lifespan,
        middleware=[Middleware(LimitsAndHeaders, upload=1e6 * settings.policy.limits.file_megabytes)],
        exception_handlers=HANDLERS,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = State(store, storage, settings, supervisor, proxy)
    for routes in (files, jobs, events, models):
        app.include_router(routes.router)
    page.add_pages(app, store, storage, settings, supervisor)
    return app
