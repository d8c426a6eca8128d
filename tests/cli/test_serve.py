"""`openmythos serve` as a process: ready when it says so, one sentence where it cannot be."""

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from command_line import openmythos
from fake_engine import wait_until

import openmythos as library
from openmythos.cli import serve_command
from openmythos.errors import ConfigError
from openmythos.inference.server.run import listen
from openmythos.inference.server.settings import ServerSettings


def post(address, body, key=None):
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)


@pytest.mark.timeout(300)  # a process of its own, on a machine that may be busy
def test_it_serves_the_librarys_text_until_sigterm_and_lets_that_finish(run, monkeypatch):
    monkeypatch.setenv(serve_command.KEY, "secret")
    code = "from openmythos.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", run, "--port", "0", "--drain-seconds", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            said = it.stdout.readline()
            assert said.startswith("rhyme is served at http://127.0.0.1:"), it.stderr.read()
            address = said.split()[4]
            body = {"prompt": "The mice", "max_tokens": 8, "temperature": 0, "loops": 3}
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(post(address, body), timeout=60)
            with urllib.request.urlopen(post(address, body, "secret"), timeout=60) as answer:
                text = json.load(answer)["choices"][0]["text"]
            options = {"max_new_tokens": 8, "temperature": 0, "loops": 3}
            assert text == library.load(run).generate("The mice", **options)
            long = {**body, "max_tokens": 50, "stream": True, "ignore_eos": True, "loops": 16}
            with urllib.request.urlopen(post(address, long, "secret"), timeout=60) as stream:
                assert stream.readline().startswith(b"data: {")
                it.send_signal(signal.SIGTERM)
                assert stream.read().endswith(b'"finish_reason":"length"}]}\n\ndata: [DONE]\n\n')
            assert it.wait(60) == 0
            waiting = ": waiting for 1 request, at most 100 s; Ctrl-C again cancels them"
            assert it.stdout.read() == ""
            assert it.stderr.read() in (
                f"stopping{waiting}\n",
                "stopping\n",
            )  # it may have been quick
        finally:
            it.kill()


def answers(port):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
    except urllib.error.HTTPError as error:
        return error.code == 503
    except urllib.error.URLError:
        return False


@pytest.mark.timeout(300)
def test_sigterm_while_the_model_is_loaded_ends_in_order(tmp_path):
    """The interpreter must not end around a thread that is inside of torch."""
    code = (
        "import torch, openmythos.inference.language_model as module\n"
        "from openmythos.cli import main\n"
        "def load(*_):\n"
        "    while True: torch.ones(300, 300) @ torch.ones(300, 300)\n"
        "module.load = load\n"
        "main()\n"
    )
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, "serve", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            wait_until(lambda: answers(port), seconds=100)
            it.send_signal(signal.SIGTERM)
            assert it.wait(60) == 0
            assert (it.stdout.read(), it.stderr.read()) == ("", "stopping\n")
        finally:
            it.kill()


def test_a_model_that_is_not_there_and_a_port_that_is_taken_are_told(run):
    result = openmythos("serve", "nowhere", "--port", 0)
    assert (result.code, result.out) == (2, "")
    assert "model='nowhere' must be the folder of a model or of a run" in result.err
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = openmythos("serve", run, "--port", port)
    assert (result.code, result.out) == (2, "")
    assert f"port={port} must be free and allowed" in result.err
    result = openmythos("serve", run, "--port", 0, "--max-model-len", 65)
    assert (result.code, result.out) == (2, "")
    assert "max_model_len=65 must be at most the model's max_length=64" in result.err


def test_the_network_without_a_key_is_warned_of(monkeypatch):
    monkeypatch.delenv(serve_command.KEY, raising=False)
    result = openmythos("serve", "nowhere", "--port", 0, "--host", "0.0.0.0")
    assert "host=0.0.0.0 is open to the network" in result.err
    result = openmythos("serve", "nowhere", "--port", 0, "--host", "0.0.0.0", "--api-key", "k")
    assert "is open to the network" not in result.err


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.0.1", "::1", "0:0:0:0:0:0:0:1"])
def test_this_machine_is_known_by_its_addresses(host):
    assert serve_command.is_near(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "::12", "10.0.0.1", "127.example.org", "localhost.example.org"]
)
def test_what_only_begins_like_this_machine_is_another(host):
    assert not serve_command.is_near(host)


def test_a_key_is_the_flags_or_the_environments(monkeypatch):
    monkeypatch.delenv(serve_command.KEY, raising=False)
    assert serve_command.with_key(ServerSettings()).api_key is None
    monkeypatch.setenv(serve_command.KEY, "theirs")
    assert serve_command.with_key(ServerSettings()).api_key == "theirs"
    assert serve_command.with_key(ServerSettings(api_key="mine")).api_key == "mine"
    monkeypatch.setenv(serve_command.KEY, "not one")
    with pytest.raises(ConfigError, match="api_key must be printable ASCII"):
        serve_command.with_key(ServerSettings())


IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "core_rows")


@pytest.mark.soak
def test_rubbish_made_from_its_own_description_breaks_nothing(run, tmp_path):
    """Bodies by schemathesis, right and wrong: no 5xx, and afterwards nothing is left of them."""
    program = Path(sys.executable).with_name("schemathesis")
    if not program.is_file():
        pytest.skip("no schemathesis: say make soak")
    code = "from openmythos.cli import main; main()"
    limits = ["--max-model-len", "48", "--max-loops", "8"]
    command = [sys.executable, "-c", code, "serve", run, "--port", "0", *limits]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as it:
        try:
            address = it.stdout.readline().split()[4]
            root = address.removesuffix("/v1")
            check = ["--checks", "not_a_server_error", "--max-examples", "100", "--seed", "1"]
            limit = ["--max-time", "300", "--request-timeout", "60", "--no-color"]
            fuzz = [program, "run", f"{root}/openapi.json", *check, *limit]
            done = subprocess.run(
                fuzz, cwd=tmp_path, capture_output=True, text=True, timeout=600
            )  # it leaves a cache where it runs
            assert done.returncode == 0, done.stdout[-4000:]
            body = {"prompt": "The mice", "max_tokens": 8, "temperature": 0, "loops": 3}
            with urllib.request.urlopen(post(address, body), timeout=60) as answer:
                text = json.load(answer)["choices"][0]["text"]
            options = {"max_new_tokens": 8, "temperature": 0, "loops": 3}
            assert text == library.load(run).generate("The mice", **options)
            with urllib.request.urlopen(f"{root}/metrics", timeout=60) as page:
                lines = page.read().decode().splitlines()
            left = [line for line in lines if any(f":{name}" in line for name in IDLE)]
            values = [line.split()[-1] for line in left if not line.startswith("#")]
            assert values == ["0.0"] * len(IDLE)
            it.send_signal(signal.SIGTERM)
            assert it.wait(60) == 0
        finally:
            it.kill()
