"""The same service on PostgreSQL, where ``initdb`` is installed; two servers on one database; the migrations."""

import contextlib

import openai
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from service_server import starts, wait_for
from sqlmodel import SQLModel

from safebasin.errors import UserError
from safebasin.service.store import HEAD, Server, Store


@pytest.mark.slow
def test_jobs(serve, database):
    """Everything that speaks to the database: pages, filters, events, verdicts, limits, a repetition."""
    served = serve(database=database())
    client = served.client()
    done = served.ended(served.job("safe", metadata={"team": "a"}).id)
    refused = served.ended(served.job("unsafe", metadata={"team": "b"}).id)
    assert (done.status, refused.error.code) == ("succeeded", "unsafe_training_file")
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == [refused.id, done.id]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [done.id]
    events = [event.id for event in client.fine_tuning.jobs.list_events(done.id, limit=2)]
    assert len(events) == len(set(events)) >= 6 and events[-1].endswith("-1")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-\x00")
    again = {"x-stainless-retry-count": "1"}
    create = client.fine_tuning.jobs.create
    file = served.upload("forever")
    jobs = {create(model="small", training_file=file, extra_headers=again).id for _ in range(3)}
    assert len(jobs) == 1
    client.fine_tuning.jobs.cancel(*jobs)


@pytest.mark.slow
def test_two_servers_on_one_database(process, database, tmp_path):
    """No job runs twice; when one server is gone for a minute, the other takes its jobs over."""
    shared = {"database": database(), "storage": str(tmp_path / "storage"), "child": {"slots": 2}}
    shared["limits"] = {"jobs_running": 10}
    one, two = process(**shared), process(**shared)
    jobs = [served.job("safe").id for served in (one.served, two.served) for _ in range(6)]
    assert [one.served.ended(job).status for job in jobs] == ["succeeded"] * 12
    ran = [[served for served in (one.served, two.served) if served.path(job).exists()] for job in jobs]
    assert [len(servers) for servers in ran] == [1] * 12
    assert [len(starts(servers[0], job)) for servers, job in zip(ran, jobs, strict=True)] == [1] * 12
    running = [one.served.job("forever").id for _ in range(4)]
    wait_for(lambda: all(one.served.client().fine_tuning.jobs.retrieve(job).status == "running" for job in running))
    mine = [job for job in running if one.served.path(job).exists()]
    assert 0 < len(mine) < 4
    one.kill()
    for job in running:
        two.served.client().fine_tuning.jobs.cancel(job)  # also those of the server that is gone
    waiting = two.served.job("safe").id
    assert two.served.ended(waiting).status == "succeeded"
    with contextlib.closing(Store(shared["database"])) as store, store.session() as session:
        server = session.get(Server, (one.served.settings.folder / "server").read_text())
        assert server is not None


@pytest.mark.slow
def test_a_server_that_is_gone_loses_its_jobs_to_the_other(process, database, tmp_path):
    shared = {"database": database(), "storage": str(tmp_path / "storage")}
    one = process(**shared)
    job = one.served.job("resumable").id
    one.served.event(job, "Step data")
    one.kill()
    two = process(**shared)
    with contextlib.closing(Store(shared["database"])) as store, store.session() as session:
        server = session.get(Server, (one.served.settings.folder / "server").read_text())
        server.seen -= 61.0  # a minute later
        session.add(server)
    wait_for(lambda: (two.served.path(job) / "starts").exists())
    assert starts(two.served, job)
    two.served.client().fine_tuning.jobs.cancel(job)
    process(one.served)  # it comes back: its child of a job that is another's now is stopped
    pid = int((one.served.path(job) / "pid").read_text())
    from test_life import alive

    wait_for(lambda: not alive(pid))


def test_the_migrations_make_these_tables(tmp_path):
    with contextlib.closing(Store(f"sqlite:///{tmp_path / 'new.db'}")) as store, store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, SQLModel.metadata) == []


def test_a_database_of_a_newer_version(tmp_path):
    import sqlalchemy

    url = f"sqlite:///{tmp_path / 'new.db'}"
    with contextlib.closing(Store(url)) as store, store.engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match="another version"):
        Store(url)


@pytest.mark.parametrize("url", ["nothing", "postgresql+psycopg://nobody@127.0.0.1:1/none", "sqlite:////proc/no/file"])
def test_a_database_that_cannot_be_opened(url):
    with pytest.raises(UserError, match="cannot open the database"):
        Store(url)
