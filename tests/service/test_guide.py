"""The guide's policies are policies, its customer's ten lines are a customer, and its threats name tests that exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx2
import openai
import pytest
from folders import run
from service_server import CLIENTS, answers, free_port, rows, wait_for

from safebasin.errors import UserError
from safebasin.pipeline.recipes import recipe_text
from safebasin.service.policy import read_policy

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "service.md").read_text(encoding="utf-8")


def fences(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("text", fences("yaml"))
def test_the_policies(tmp_path, monkeypatch, text, capsys):
    monkeypatch.setenv("DATABASE", "sqlite://")
    (tmp_path / "service.yaml").write_text(recipe_text("service"))
    (tmp_path / "policy.yaml").write_text(text)
    settings = read_policy(tmp_path / "policy.yaml")
    assert set(settings.recipes) == {"support"} and settings.database.startswith("sqlite:")
    assert run("serve", str(tmp_path / "policy.yaml"), "--check") == 0
    assert "1 models, refuse" in capsys.readouterr().out


def test_keys_by_the_command_line(tmp_path, capsys):
    (tmp_path / "service.yaml").write_text(recipe_text("service"))
    (tmp_path / "policy.yaml").write_text(fences("yaml")[0])
    for option, prefix in (("--tenant", "sb-"), ("--operator", "sbop-")):
        assert run("serve", str(tmp_path / "policy.yaml"), option, "acme") == 0
        assert re.fullmatch(prefix + r"[\w-]{43}\n", capsys.readouterr().out)


def test_the_customers_lines(served, tmp_path, monkeypatch, capsys):
    [code] = fences("python")
    (tmp_path / "rows.jsonl").write_bytes(rows("unsafe"))
    monkeypatch.chdir(tmp_path)
    code = code.replace("http://127.0.0.1:8080", served.url).replace("sb-...", served.keys["acme"])
    code = code.replace('"support"', '"small"').replace("sleep(10)", "sleep(0.05)")
    assert len([line for line in code.splitlines() if line.strip()]) <= 11
    exec(compile(code, "guide", "exec"), {})
    assert "Without these 16 rows the file passes." in capsys.readouterr().out


def test_the_tests_that_hold_the_threats_exist():
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", GUIDE.split("## Threats")[1]))
    assert len(named) > 25 and named <= set(re.findall(r"^def (test_\w+)", tests, re.M))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit(tmp_path):
    [unit] = fences("ini")
    file = tmp_path / "safebasin.service"
    file.write_text(unit.replace("/opt/safebasin/bin/safebasin", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and str(file.name) not in done.stderr, done.stderr


def test_the_containers_command(tmp_path):
    """The words that it runs are words of the command line, and every file that it needs is said to be mounted."""
    [text] = fences("dockerfile")
    entry, words = (
        shlex.split(re.search(rf"^{name} \[(.*)\]", text, re.M)[1].replace(",", "")) for name in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["safebasin", "serve"] and words[0] == "/etc/safebasin/policy.yaml"
    (tmp_path / "service.yaml").write_text(recipe_text("service"))
    (tmp_path / "policy.yaml").write_text(fences("yaml")[0])
    assert run("serve", str(tmp_path / "policy.yaml"), *words[1:], "--check") == 0


@pytest.fixture
def nginx(served, tmp_path):
    """The guide's nginx in front of a server, without TLS: its address."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed: the server block was not tried")
    [block] = fences("nginx")
    port = free_port()
    block = re.sub(r" *ssl_certificate.*\n", "", block).replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    block = block.replace("http://127.0.0.1:8080", served.url).replace("513m", "1m")
    paths = "".join(f"{name}_temp_path {name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    text = f"pid pid; error_log error.log; events {{}} http {{ access_log off; {paths} {block} }}"
    (tmp_path / "nginx.conf").write_text(text)
    tmp_path.chmod(0o755)
    process = subprocess.Popen(["nginx", "-p", tmp_path, "-c", "nginx.conf", "-e", "error.log", "-g", "daemon off;"])
    wait_for(lambda: answers(port) or process.poll() is not None)
    assert process.poll() is None, (tmp_path / "error.log").read_text()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_behind_nginx(served, nginx):
    """An upload, a job and its stream by the client; a body that is too large; the operator's pages are shut."""
    client = openai.OpenAI(base_url=f"{nginx}/v1", api_key=served.keys["acme"], max_retries=0)
    CLIENTS.append(client)
    file = client.files.create(file=("rows.jsonl", rows("safe")), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="small", training_file=file.id)
    with client.fine_tuning.jobs.with_streaming_response.list_events(job.id, extra_query={"stream": "true"}) as answer:
        assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("rows.jsonl", b"x" * 2_000_000), purpose="fine-tune")
    assert error.value.status_code == 413
    assert httpx2.get(f"{nginx}/operator", trust_env=False).status_code == 403
    assert httpx2.get(f"{served.url}/operator", trust_env=False).status_code == 303


RECIPE = recipe_text("service")
BAD = [
    ({}, "models: {small: {recipe: none.yaml}}", "no such recipe"),
    ({}, "models: {}", "at least 1"),
    ({}, "models: {small: {recipe: service.yaml}}\nunknown: 1", "unknown"),
    ({}, "models: {small: {recipe: service.yaml}}\nlimits: {rows: 0}", "limits.rows"),
    (
        {},
        "models: {small: {recipe: service.yaml}}\nhyperparameters: {n_epochs: {low: 3, high: 1}}",
        "low is above high",
    ),
    ({}, "models: {small: {recipe: service.yaml}}\ndatabase: 'postgresql://me:secret@host/db'", "secret"),
    ({}, "models: {small: {recipe: service.yaml, special: '('}}", "regular expression"),
    ({}, "models: {small: {recipe: service.yaml, uploaded: none}}", "no arm 'none'"),
    ({}, "models: {small: {recipe: service.yaml, uploaded: without}}", "leaves rows out"),
    ({}, "models: {small: {recipe: service.yaml, without: uploaded}}", "no cut"),
    ({"max_asr: 0.2": "max_asr: null"}, "models: {small: {recipe: service.yaml}}", "limits no attack success"),
    ({"start: {}": "start: {train: [sft]}"}, "models: {small: {recipe: service.yaml}}", "model as it was"),
    (
        {"max_length: 1024": "poison: {path: 'builtin:harmful-poison'}"},
        "models: {small: {recipe: service.yaml}}",
        "mixes in an attack",
    ),
]


@pytest.mark.parametrize(("changes", "policy", "reason"), BAD, ids=[reason for *_, reason in BAD])
def test_policies_that_are_refused(tmp_path, changes, policy, reason):
    text = RECIPE
    for old, new in changes.items():
        text = text.replace(old, new)
    (tmp_path / "service.yaml").write_text(text)
    (tmp_path / "policy.yaml").write_text(policy)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_policy(tmp_path / "policy.yaml")


def test_an_empty_variable_of_the_database(tmp_path, monkeypatch):
    monkeypatch.delenv("DATABASE", raising=False)
    (tmp_path / "service.yaml").write_text(RECIPE)
    (tmp_path / "policy.yaml").write_text("models: {small: {recipe: service.yaml}}\ndatabase: env:DATABASE")
    with pytest.raises(UserError, match="DATABASE of the environment is empty"):
        _ = read_policy(tmp_path / "policy.yaml").database
