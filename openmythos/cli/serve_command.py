"""Serve a model over HTTP, as OpenAI's API does.

Examples:
    openmythos serve
    openmythos serve runs/nano --port 8080 --served-model-name nano --max-waiting 64
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The whale", "max_tokens": 40, "loops": 8}'

MODEL is the folder of a model or of a training run; without one it is the package's own. A page to
try it stands at /. Routes: /v1/completions, /v1/chat/completions, /v1/models, /health (503 until
the model is loaded) and /metrics (Prometheus). Beside OpenAI's fields a request may have `loops`,
`halting`, `threshold`, `cache_policy`, `draft_loops` and `priority`. Ctrl-C or SIGTERM lets running
requests finish; a second one does not. Where the engine fails, the process ends with exit code 2.
"""  # noqa: E501 (a line to copy is one line)

from __future__ import annotations

import dataclasses
import ipaddress
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openmythos.cli.loading import Loading
from openmythos.inference.engine_settings import EngineSettings
from openmythos.inference.server.settings import ServerSettings
from openmythos.inference.shipped import LANGUAGE_MODEL

if TYPE_CHECKING:
    from openmythos.inference.server.serving import Loaded

KEY = "OPENMYTHOS_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos serve`."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = Path(
        LANGUAGE_MODEL
    )
    """Folder of a model or of a training run, or the name of a model in the package."""

    loading: Annotated[Loading, tyro.conf.arg(name="")] = field(default_factory=Loading)
    """Where the model runs, and what its weights are there."""

    server: Annotated[ServerSettings, tyro.conf.arg(name="")] = field(
        default_factory=ServerSettings
    )
    """Where it listens, whom it lets in, how much it takes on."""

    engine: Annotated[EngineSettings, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(
        default_factory=EngineSettings
    )
    """How much it holds and does at once."""


def run(settings: Settings) -> None:
    """Load the model and serve it until told to stop."""
    from openmythos.inference.playground.routes import STATIC, playground
    from openmythos.inference.server.app import create_app
    from openmythos.inference.server.run import run as run_server
    from openmythos.inference.server.serving import Serving

    server = with_key(settings.server)
    if server.api_key is None and not is_near(server.host):
        print(
            f"openmythos: host={server.host} is open to the network, and without a key anyone "
            f"there may use the model: set --api-key or {KEY}",
            file=sys.stderr,
        )
    name = server.served_model_name or settings.model.resolve().name
    serving = Serving(lambda: _load(settings), name, server)
    app = create_app(serving, routers=[playground()], static=STATIC)

    def on_ready(address: str) -> None:
        page = f"the playground at {address}/"
        print(f"{name} is served at {address}/v1 and {page} (Ctrl-C stops it)", flush=True)

    def on_stop(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    run_server(app, on_ready=on_ready, on_stop=on_stop)
    if serving.loading:  # torch aborts where the interpreter ends around a thread inside of it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_near(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of which one is known to be
        return host == "localhost"


def with_key(settings: ServerSettings) -> ServerSettings:
    """Return settings with the key of the environment, where no flag has one.

    Raises:
        ConfigError: it cannot be a key.
    """
    return dataclasses.replace(settings, api_key=settings.api_key or os.environ.get(KEY) or None)


def _load(settings: Settings) -> Loaded:
    """Make the model ready; runs while the server already answers that it is not."""
    from openmythos.inference.chat import ChatLayout
    from openmythos.inference.engine import Engine
    from openmythos.inference.server.serving import Loaded, length_limit
    from openmythos.inference.shipped import find_model

    lm = settings.loading.load(settings.model)
    max_length = length_limit(settings.server.max_model_len, lm.model.config.max_length)
    layout = ChatLayout.of(find_model(settings.model), lm.tokenizer)
    engine = Engine(lm, settings.engine)
    pages = engine.statistics().pages_total
    loaded = Loaded(lm=lm, layout=layout, engine=engine, max_length=max_length, pages=pages)
    engine.start()
    return loaded
