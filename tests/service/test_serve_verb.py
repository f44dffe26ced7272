"""The verb ``serve``: what it refuses before it answers anybody."""

import re
import socket

import pytest
import yaml
from folders import run
from service_server import RECIPE, free_port

from safebasin.errors import UserError
from safebasin.service.files import Storage
from safebasin.service.policy import MARKS, read_policy
from safebasin.service.proxy import Proxy
from safebasin.service.store import Store
from safebasin.service.supervisor import Supervisor


@pytest.fixture
def policy(tmp_path):
    """A policy on disk, with more lines at its end."""

    def write(more=""):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
        base = "{recipe: recipe.yaml, uploaded: plain, without: defended}"
        (tmp_path / "policy.yaml").write_text(f"models: {{small: {base}}}\n{more}")
        return tmp_path / "policy.yaml"

    return write


@pytest.mark.parametrize("words", [("--port", "99999"), ("--port", "-1"), ("--host", "192.0.2.1")])
def test_an_address_that_is_none_is_a_line(policy, words, capsys):
    """uvicorn ended with code 3, which is that of a gate that failed, or with a traceback."""
    port = () if "--port" in words else ("--port", str(free_port()))
    assert run("serve", str(policy()), *port, *words) == 1
    assert "cannot listen on" in capsys.readouterr().err


def test_a_port_that_is_taken_is_a_line(policy, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run("serve", str(policy()), "--port", str(taken.getsockname()[1])) == 1
    assert "Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("who", ["--tenant", "--operator"])
@pytest.mark.parametrize("name", ["a\nb", "\u202eevil", " ", "x" * 81])
def test_a_name_that_cannot_be_shown_gets_no_key(policy, who, name, capsys):
    assert run("serve", str(policy()), who, name) == 1
    shown = capsys.readouterr()
    assert not shown.out and "printable characters" in shown.err


def test_a_child_that_cannot_start_starts_no_server(policy):
    """Every customer's job would fail on our side."""
    with pytest.raises(UserError, match=r"child\.command"):
        read_policy(policy("child: {command: []}"))
    settings = read_policy(policy("child: {command: [no-such-program]}"))
    store = Store(settings.database)
    with pytest.raises(UserError, match=r"child\.command: no such program: no-such-program"):
        Supervisor(store, Storage(settings.storage), settings)
    store.close()


def test_a_key_of_the_endpoint_that_is_not_there_starts_no_server(policy, monkeypatch):
    monkeypatch.delenv("SERVING_KEY", raising=False)
    settings = read_policy(policy("serving: {url: 'http://127.0.0.1:1/v1', key: SERVING_KEY}"))
    with pytest.raises(UserError, match="the variable SERVING_KEY of the environment is empty"):
        Proxy(settings)
    monkeypatch.setenv("SERVING_KEY", "k")
    Proxy(settings)


@pytest.mark.parametrize(
    "mark", ["<|im_start|>", "<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[INST]"]
)
def test_marks_of_usual_templates(mark):
    assert re.search(MARKS, f"a {mark} b")
