"""A PostgreSQL cluster of the tests' own, where ``initdb`` is installed."""

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from service_server import wait_for

# Debian's package puts initdb where no PATH looks
LISTED = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)
INITDB = next(filter(None, [shutil.which("initdb"), *LISTED]), None)
USER = next((name for name in ("postgres", "nobody") if name in [entry.pw_name for entry in pwd.getpwall()]), None)


@pytest.fixture(scope="session")
def database():
    """A cluster in a folder of its own, reached by a socket; a fresh database a call."""
    if INITDB is None or (os.geteuid() == 0 and USER is None):
        pytest.skip("initdb is not installed: PostgreSQL was not tested")
    folder, user = Path(tempfile.mkdtemp(prefix="safebasin-pg-")), {"user": USER} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, USER)
    tools = Path(INITDB).resolve().parent
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **user}
    initdb = [tools / "initdb", "-D", folder / "data", "-U", "safebasin", "-A", "trust", "--no-sync"]
    subprocess.run(initdb, check=True, **quiet)
    options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"]
    server = subprocess.Popen([tools / "postgres", "-D", folder / "data", *options], **quiet)
    wait_for(lambda: list(folder.glob(".s.PGSQL.*[0-9]")), 120)
    names = iter(range(100))

    def fresh():
        name, psql = f"test{next(names)}", [tools / "psql", "-h", folder, "-U", "safebasin", "postgres", "-c"]
        wait_for(lambda: subprocess.run([*psql, f"CREATE DATABASE {name}"], **quiet).returncode == 0, 60)
        return f"postgresql+psycopg://safebasin@/{name}?host={folder}"

    yield fresh
    server.send_signal(signal.SIGINT)  # do not wait for clients
    server.wait()
    shutil.rmtree(folder)
