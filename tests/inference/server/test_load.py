"""Many clients at once on the real engine: some go, some stall, some talk rubbish."""

import asyncio
import json
import random

import pytest
import uvicorn
from fake_engine import language_model, wait_until
from typecheck import unchecked

from openmythos.inference.chat import ChatLayout
from openmythos.inference.engine import Engine
from openmythos.inference.engine_settings import EngineSettings
from openmythos.inference.server.app import create_app
from openmythos.inference.server.run import Process, listen
from openmythos.inference.server.serving import Loaded, Serving
from openmythos.inference.server.settings import ServerSettings

RUBBISH = [
    b"\x00\xff\r\n\r\n",
    b"GET /v1/models HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n{{{{{",
]


@pytest.fixture(autouse=True)
def _no_shape_checks():
    with unchecked():  # the engine's own tests have them
        yield


@pytest.mark.parametrize("clients", [30, pytest.param(3000, marks=pytest.mark.soak)])
def test_the_server_outlives_its_clients_and_keeps_nothing_of_theirs(clients, caplog):
    lm = language_model()
    engine = Engine(lm, EngineSettings(cache_bytes=1 << 22, budget=16, max_waiting=24))

    def load():
        engine.start()
        return Loaded(lm=lm, layout=ChatLayout(lm.tokenizer), engine=engine, max_length=64)

    async def main():
        serving = Serving(load, "mouse", ServerSettings(send_seconds=1, max_unread=50))
        with listen("127.0.0.1", 0) as listening:
            config = uvicorn.Config(create_app(serving), log_level="error", access_log=False)
            process = Process(config, serving, lambda: None)
            process.handle_exit = lambda *_: None
            running = asyncio.create_task(process._serve([listening]))
            while serving.state != "ready":
                await asyncio.sleep(0.01)
            port, chance = listening.getsockname()[1], random.Random(0)
            room = asyncio.Semaphore(60)  # at once; each takes two of this process' files

            async def visit(seed):
                async with room:
                    return await client(port, random.Random(seed))

            statuses = await asyncio.gather(*(visit(chance.random()) for _ in range(clients)))
            # One more, when all have gone, gets its whole answer.
            assert await client(port, random.Random(0), kind="patient") == 200
            while not serving.idle or engine.statistics().running:
                await asyncio.sleep(0.01)
            process.should_exit = True
            await running
            return statuses

    statuses = asyncio.run(main())
    assert {200, 400} <= set(statuses) <= {None, 200, 400, 429}
    wait_until(lambda: not engine.alive)
    now = engine.statistics()
    assert (now.running, now.waiting, now.rows, now.pages_used, now.pages_promised) == (0,) * 5
    assert now.pages_free + now.pages_cached == now.pages_total
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def client(port, chance, kind=None):
    """One client; returns the status of its answer, None where it did not wait for one."""
    await asyncio.sleep(chance.random() * 0.5)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    kind = kind or chance.choice(["patient", "patient", "gone", "early", "stalled", "rubbish"])
    try:
        if kind == "rubbish":
            writer.write(chance.choice(RUBBISH))
            writer.write_eof()
            line = await reader.readline()
            return int(line.split()[1]) if line else None
        body = json.dumps(some_body(chance, kind)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
        sent = f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body
        writer.write(sent[: chance.randrange(len(sent))] if kind == "early" else sent)
        if kind == "early":
            return None
        status = int((await reader.readline()).split()[1])
        if kind == "gone":
            await reader.read(chance.randrange(1, 2000))
            return status
        if kind == "stalled":
            await asyncio.sleep(chance.random())
        rest = await reader.read(-1)
        if status == 200:
            assert b"[DONE]" in rest or b'"usage"' in rest
        return status
    finally:
        writer.close()


def some_body(chance, kind):
    body = {
        "prompt": "The mice ran up the clock"[: chance.randrange(1, 25)],
        "max_tokens": chance.randrange(1, 24),
        "loops": chance.randrange(1, 7),
        "n": chance.randrange(1, 4),
        "stream": kind != "patient" or chance.random() < 0.5,
        "halting": chance.choice(["none", "delta"]),
        "logprobs": chance.choice([None, 5]),
        "stop": chance.choice([None, "e"]),
    }
    if kind == "patient" and chance.random() < 0.2:
        body["response_format"] = {"type": "json_object"}
    return body
