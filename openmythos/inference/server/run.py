"""The server's process: it listens, drains when told to stop, and ends with a clean exit."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import final

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from openmythos.errors import ConfigError
from openmythos.inference.server.middleware import CheckHost
from openmythos.inference.server.serving import Serving

NEAR = ("localhost", "127.0.0.1", "[::1]")
"""What this machine is called by programs on it."""
LAST_SECONDS = 5
"""How long connections have to close once every request has been answered or given up."""
FAILED_SECONDS = 5.0
"""How long clients are told that the engine has died, before the process ends."""


def run(
    app: FastAPI,
    *,
    on_ready: Callable[[str], None],
    on_stop: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let running requests finish.

    Args:
        app: made by `create_app`.
        on_ready: told the server's address once the model is loaded.
        on_stop: told what the server waits for, once it has been told to stop.

    Raises:
        ConfigError: the address cannot be listened on.
        CheckpointError, TokenizerError: the model cannot be loaded.
        EngineStopped: the engine has died.
    """
    server: Serving = app.state.serving
    listening = listen(server.settings.host, server.settings.port)
    config = uvicorn.Config(
        guarded(app, listening),
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        ws="none",
    )
    process = Process(config, server, lambda: on_ready(address(listening)), on_stop)
    process.run(sockets=[listening])
    if server.failure is not None:
        raise server.failure


def guarded(app: FastAPI, listening: socket.socket) -> ASGIApp:
    """Return what to serve: where only this machine reaches it and no key does, names are checked.

    Args:
        app: made by `create_app`.
        listening: made by `listen`, from the same settings.
    """
    server: Serving = app.state.serving
    place = ipaddress.ip_address(listening.getsockname()[0])
    if server.settings.api_key is not None or not place.is_loopback:
        return app
    host = server.settings.host
    return CheckHost(app, {*NEAR, f"[{host}]" if ":" in host else host})


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address is not this machine's, or is taken.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host!r} must be an address of this machine ({error})") from None
    try:
        if sys.platform != "win32":  # there it would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ConfigError(
                f"port={port} must be free and allowed ({error.strerror}): choose another"
            ) from None
        raise ConfigError(
            f"host={host!r} must be an address of this machine ({error.strerror})"
        ) from None
    return listening


def address(listening: socket.socket) -> str:
    """Return where a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@final
class Process(uvicorn.Server):
    """uvicorn, but the first signal drains: it answers 503 to what is new and 200 to what runs.

    A second signal cancels what runs. Both end with exit code 0, where uvicorn would raise the
    signal again. Where the engine has died, it ends by itself, a moment later.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server: Serving,
        on_ready: Callable[[], None],
        on_stop: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._server, self._on_ready, self._on_stop = server, on_ready, on_stop
        self._told = False
        self._deadline: float | None = None
        self._died: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, give up what runs."""
        seconds = 0.0 if self._deadline is not None else self._server.settings.drain_seconds
        self._deadline = time.monotonic() + seconds
        self._server.drain()

    async def on_tick(self, counter: int) -> bool:
        """Look, every tenth of a second, whether it is time to begin or to end."""
        if not self._told and self._server.state == "ready":
            self._told = True
            self._on_ready()
        if self._server.failure is not None:
            self.should_exit = True
        if self._server.died:
            self._died = time.monotonic() if self._died is None else self._died
            if time.monotonic() >= self._died + FAILED_SECONDS:
                self._server.give_up()
                self.should_exit = True
        if self._deadline is not None:
            self._tell_stop()
            if time.monotonic() >= self._deadline:
                self._server.give_up()
                self.should_exit = True
            elif self._server.idle:
                self.should_exit = True
        return await super().on_tick(counter)

    def _tell_stop(self) -> None:
        """Say once what the server waits for; not in `handle_exit`, which may interrupt a print."""
        tell, self._on_stop = self._on_stop, None
        if tell is None:
            return
        if self._server.idle:
            tell("stopping")
            return
        count, most = len(self.server_state.tasks), self._server.settings.drain_seconds
        requests = f"{count} request{'s' * (count != 1)}"
        tell(f"stopping: waiting for {requests}, at most {most:g} s; Ctrl-C again cancels them")
