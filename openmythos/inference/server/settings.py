"""What a server may be told: where it listens, whom it lets in, how much it takes on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from openmythos.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP server; those of the engine are the engine's."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is reached from this machine alone; 0.0.0.0 is open to the
    network, and then an --api-key is wise."""

    port: int = 8000
    """Port to listen on; 0 takes a free one and prints it."""

    api_key: str | None = None
    """Key that requests to /v1 must bring as `Authorization: Bearer KEY`. Default: the environment
    variable OPENMYTHOS_API_KEY, which no list of processes shows; without either, no key."""

    allowed_origins: tuple[str, ...] = ()
    """Web pages that may ask from a browser, by their origins as `https://example.org`; `*` is
    every page. Default: none but the server's own."""

    served_model_name: str | None = None
    """The model's name in the API. Default: its folder's name."""

    max_model_len: int | None = None
    """Most tokens of a prompt and its continuation together. Default: the model's max_length."""

    chat_tokens: int = 512
    """Most tokens of a chat reply whose request names no limit. Room for them is reserved, so many
    would keep others waiting."""

    max_loops: int = 64
    """Most loops that a request may ask for."""

    max_choices: int = 128
    """Most continuations in one HTTP request: its prompts times its `n`."""

    max_body_bytes: int | None = None
    """Largest body of a request, in bytes; a larger one gets 413. Default: what the model can read,
    8 bytes for each token of max_choices prompts of max_model_len and 256 KiB for all else, but at
    most 8 MiB."""

    max_unread: int = 4096
    """Events of each choice that may wait for one client that reads slowly; past them its request
    is cancelled."""

    send_seconds: float = 60.0
    """Seconds after which a client that takes nothing is disconnected."""

    drain_seconds: float = 60.0
    """Seconds that running requests have to finish when the server is told to stop."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a value is out of range.
        """
        if not self.host:
            raise ConfigError("host='' must be an address: 127.0.0.1 is this machine alone")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port={self.port} must be from 0 (any free one) to 65535")
        if self.api_key is not None and not _sendable(self.api_key):
            raise ConfigError(
                "api_key must be printable ASCII without spaces, because it travels in a header: "
                "choose another"
            )
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ConfigError("served_model_name must not be empty: leave it out for the folder's")
        for origin in self.allowed_origins:
            if origin != "*" and not _is_origin(origin):
                raise ConfigError(
                    f"allowed_origins holds {origin!r}, must hold origins as "
                    "'https://example.org:8080', without a path, or '*'"
                )
        for name in (
            "max_model_len",
            "chat_tokens",
            "max_loops",
            "max_choices",
            "max_body_bytes",
            "max_unread",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        for name in ("send_seconds", "drain_seconds"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value} must be above 0, in seconds")


def _is_origin(text: str) -> bool:
    return re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", text) is not None


def _sendable(key: str) -> bool:
    return bool(key) and all("!" <= character <= "~" for character in key)
