"""The tables, and the one way to a tenant's files, jobs and models: ``own``. SQLite and PostgreSQL by the same code.

A job changes its phase by one UPDATE that names the phases it may come from (``move``), so that two servers, or a
server and a request, never both win. An event takes its number from a counter in its job's row.

More than 250 lines, since a third of them are the tables, and every query names some of them.
"""

import hashlib
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import JSON, Column, Engine, Text, event, func, update
from sqlmodel import Field, Session, SQLModel, create_engine, select

from safebasin.errors import UserError

HEAD = "0001"  # the newest migration
LIVE = ("queued", "running", "paused", "review")  # phases of a job that is not over; the others are of its end
OVER = ("succeeded", "failed", "cancelled")
SILENT = 60.0  # seconds without a sign of life after which a server's jobs are free for another


class Tenant(SQLModel, table=True):
    id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    created: float
    jobs: int = 0  # that were created; counting them up locks the row against a second creation


class Key(SQLModel, table=True):
    """An API key: 256 random bits, of which only the SHA-256 is stored. ``tenant`` is empty for an operator's."""

    id: str = Field(primary_key=True)
    tenant: str | None = Field(default=None, foreign_key="tenant.id", index=True)
    name: str
    digest: str = Field(unique=True)
    prefix: str  # shown, so that a person can distinguish keys
    created: float
    used: float | None = None
    revoked: float | None = None


class File(SQLModel, table=True):
    id: str = Field(primary_key=True)
    tenant: str = Field(foreign_key="tenant.id", index=True)
    name: str = Field(sa_column=Column(Text, nullable=False))  # as the customer calls it; never a path of ours
    purpose: str
    size: int = Field(sa_type=sqlalchemy.BigInteger)
    digest: str
    created: float = Field(index=True)
    retry: int = 0


class Job(SQLModel, table=True):
    id: str = Field(primary_key=True)
    tenant: str = Field(foreign_key="tenant.id", index=True)
    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str = ""
    seed: int = 0
    settings: dict[str, Any] = Field(sa_type=JSON)  # hyper-parameters and metadata, as they came
    rows: int
    body: str = Field(index=True)  # digest of the request
    idempotency: str | None = None
    retry: int = 0
    phase: str = Field(default="queued", index=True)
    created: float = Field(index=True)
    started: float | None = None
    finished: float | None = None
    seconds: float = 0.0  # of its child processes
    starts: int = 0  # since it was created or resumed
    owner: str | None = Field(default=None, index=True)  # the server in whose folder it lives
    events: int = 0
    position: int = Field(default=0, sa_type=sqlalchemy.BigInteger)  # bytes of its event file that are in the table
    error: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    outcome: dict[str, Any] | None = Field(default=None, sa_type=JSON)  # of the verdict: rates, rows, reasons
    fine_tuned_model: str | None = None
    result_file: str | None = None
    __table_args__ = (sqlalchemy.UniqueConstraint("tenant", "idempotency"),)


class Event(SQLModel, table=True):
    job: str = Field(primary_key=True, foreign_key="job.id")
    number: int = Field(primary_key=True)
    created: float
    level: str
    kind: str  # message or metrics
    message: str = Field(sa_column=Column(Text, nullable=False))
    data: dict[str, Any] | None = Field(default=None, sa_type=JSON)


class Model(SQLModel, table=True):
    id: str = Field(primary_key=True)
    tenant: str = Field(foreign_key="tenant.id", index=True)
    job: str
    base: str
    served: str  # what the serving endpoint calls it
    created: float


class Server(SQLModel, table=True):
    id: str = Field(primary_key=True)
    seen: float


class Login(SQLModel, table=True):
    """A session of an operator's browser; the cookie holds what ``digest`` is of."""

    digest: str = Field(primary_key=True)
    key: str = Field(foreign_key="key.id")
    csrf: str
    expires: float


class Action(SQLModel, table=True):
    """The audit trail: what operators did."""

    id: int | None = Field(default=None, primary_key=True)
    time: float
    operator: str
    action: str
    target: str
    note: str = Field(default="", sa_column=Column(Text, nullable=False))


class NotOwned(Exception):
    """No such thing, or one of another tenant: the answer is the same."""

    def __init__(self, kind: str, name: str):
        super().__init__(f"No such {kind}: {name[:80]!r}")


class Store:
    """The database.

    Raises:
        UserError: it cannot be opened, or is of a newer version.
    """

    def __init__(self, url: str):
        try:
            if url.startswith("sqlite:///"):
                Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            sqlite = url.startswith("sqlite")
            self.engine: Engine = create_engine(url, **({} if sqlite else {"pool_pre_ping": True}), pool_size=20)
            if sqlite:
                event.listen(self.engine, "connect", _sqlite)
            self.migrate()
        except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            shown = sqlalchemy.make_url(url).render_as_string() if "://" in url else url
            raise UserError(f"cannot open the database {shown}: {reason}") from None

    def migrate(self) -> None:
        """Bring the tables to this version; alembic is imported only where there is something to do.

        Raises:
            UserError: they are of another version of this package.
        """
        with self.engine.connect() as connection:
            if sqlalchemy.inspect(connection).has_table("alembic_version"):
                current = connection.execute(sqlalchemy.text("SELECT version_num FROM alembic_version")).scalar()
                if current == HEAD:
                    return
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise UserError(f"the database is of another version of safebasin: {error}") from None

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back after an error."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    def close(self) -> None:
        self.engine.dispose()


def _sqlite(connection: Any, _: Any) -> None:
    for setting in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=20000", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")


Kind = TypeVar("Kind", File, Job, Model)
_NAMES = {File: "File object", Job: "fine-tuning job", Model: "model"}


def own(session: Session, kind: type[Kind], name: str, tenant: str) -> Kind:
    """A tenant's file, job or model. Nothing of a tenant is read by its id in another way.

    Raises:
        NotOwned: there is none, or it is another tenant's.
    """
    readable = name.isascii() and name.isprintable() and len(name) <= 200
    row = session.get(kind, name) if readable else None
    if row is None or row.tenant != tenant:
        raise NotOwned(_NAMES[kind], name)
    return row


def new_id(prefix: str) -> str:
    """An id that nobody guesses: 96 random bits."""
    return f"{prefix}-{secrets.token_hex(12)}"


def digest(text: str) -> str:
    """SHA-256 of a text, 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def new_key(session: Session, tenant: str | None, name: str) -> str:
    """A new key, which is shown this once."""
    secret = ("sb-" if tenant else "sbop-") + secrets.token_urlsafe(32)
    now = time.time()
    session.add(Key(id=new_id("key"), tenant=tenant, name=name, digest=digest(secret), prefix=secret[:9], created=now))
    return secret


def new_tenant(session: Session, name: str) -> Tenant:
    """The tenant of a name, who may be new."""
    tenant = session.exec(select(Tenant).where(Tenant.name == name)).first()
    if tenant is None:
        tenant = Tenant(id=new_id("org"), name=name, created=time.time())
        session.add(tenant)
        session.flush()
    return tenant


def key_of(session: Session, secret: str) -> Key | None:
    """The key that is valid for a secret; its last use is noted once a minute."""
    key = session.exec(select(Key).where(Key.digest == digest(secret))).first()
    if key is None or key.revoked is not None:
        return None
    now = time.time()
    if now - (key.used or 0) > 60:
        key.used = now
        session.add(key)
    return key


def move(session: Session, job: str, phases: Sequence[str], owner: str | None = None, **values: Any) -> bool:
    """Change a job where it is in one of ``phases`` (and is the server's own); whether it was."""
    change = update(Job).where(Job.id == job, Job.phase.in_(phases))  # type: ignore[attr-defined, arg-type]
    if owner is not None:
        change = change.where(Job.owner == owner)  # type: ignore[arg-type]
    changed = session.execute(change.values(**values).execution_options(synchronize_session=False))
    return bool(changed.rowcount == 1)  # type: ignore[attr-defined]


def add_event(
    session: Session,
    job: str,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
    created: float | None = None,
) -> None:
    """Add an event to a job."""
    count = update(Job).where(Job.id == job).values(events=Job.events + 1).returning(Job.events)  # type: ignore[arg-type, call-overload]
    number = session.execute(count.execution_options(synchronize_session=False)).scalar_one()
    session.add(
        Event(
            job=job,
            number=number,
            created=created or time.time(),
            level=level,
            kind=kind,
            message=message[:4000],
            data=data,
        )
    )


def count(session: Session, *conditions: Any) -> int:
    """How many jobs fulfil the conditions."""
    return session.exec(select(func.count()).select_from(Job).where(*conditions)).one()
