"""The verb that serves: the fine-tuning API of a provider's policy."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from safebasin.cli.options import say
from safebasin.console import printable
from safebasin.data.files import cause, shown
from safebasin.errors import UserError


def serve_verb(
    policy: Annotated[Path, Parameter(help="The provider's policy.")],
    *,
    host: Annotated[str, Parameter(help="Address to listen on; behind a proxy this machine's own.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on.")] = 8080,
    tenant: Annotated[str, Parameter(help="Print a new key of this customer, who may be new, and end.")] = "",
    operator: Annotated[str, Parameter(help="Print a new key of this operator, and end.")] = "",
    check: Annotated[bool, Parameter(help="Read the policy and its recipes, and end.")] = False,
) -> int:
    """Serve fine-tuning to customers with OpenAI's client: files, jobs, verdicts, models. A job is a run.

    The operator's pages are at /operator. Jobs go on when the server stops, and the next one adopts them.
    """
    try:
        import socket

        import uvicorn

        from safebasin.service.app import create_app
        from safebasin.service.policy import read_policy
        from safebasin.service.store import Store, new_key, new_tenant
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install it with: pip install 'safebasin[service]'") from None
    settings = read_policy(policy)
    if check:
        say(f"{policy}: {len(settings.recipes)} models, {settings.policy.decide} where a file is unsafe")
        return 0
    for name in filter(None, (tenant, operator)):
        if not name.strip() or not name.isprintable() or len(name) > 80:
            raise UserError(f"a name is at most 80 printable characters; found {printable(repr(name), 100)}")
    if tenant or operator:
        store = Store(settings.database)
        with store.session() as session:
            if tenant:
                print(new_key(session, new_tenant(session, tenant).id, "first key"))
            if operator:
                print(new_key(session, None, operator))
        store.close()
        return 0
    if not 0 <= port <= 65535:
        raise UserError(f"cannot listen on port {port}: it is a number from 0 to 65535")
    # bound before the app, which may start jobs, and open once it is there: nobody connects to half a server
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {shown(host)}, port {port}: {cause(error)}; choose another") from None
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(settings),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=3,
            )
        )
        server.run(sockets=[listener])
    if not server.started:
        raise UserError("the server did not start; the lines above say why")
    return 0
