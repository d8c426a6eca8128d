"""Settings out of range: one sentence each."""

import pytest

from openmythos.errors import ConfigError
from openmythos.inference.server.run import address, listen
from openmythos.inference.server.settings import ServerSettings

SENTENCES = [
    ({"host": ""}, "host='' must be an address"),
    ({"port": -1}, "port=-1 must be from 0 (any free one) to 65535"),
    ({"port": 65536}, "port=65536 must be from 0"),
    ({"api_key": ""}, "api_key must be printable ASCII"),
    ({"api_key": "a b"}, "api_key must be printable ASCII"),
    ({"api_key": "é"}, "api_key must be printable ASCII"),
    ({"allowed_origins": ("https://a.org", "a.org")}, "allowed_origins holds 'a.org', must hold"),
    ({"allowed_origins": ("https://a.org/x",)}, "allowed_origins holds 'https://a.org/x'"),
    ({"served_model_name": " "}, "served_model_name must not be empty"),
    ({"max_model_len": 0}, "max_model_len=0 must be 1 or more"),
    ({"max_loops": 0}, "max_loops=0 must be 1 or more"),
    ({"max_choices": 0}, "max_choices=0 must be 1 or more"),
    ({"max_body_bytes": 0}, "max_body_bytes=0 must be 1 or more"),
    ({"max_unread": -4}, "max_unread=-4 must be 1 or more"),
    ({"chat_tokens": 0}, "chat_tokens=0 must be 1 or more"),
    ({"send_seconds": 0.0}, "send_seconds=0.0 must be above 0, in seconds"),
    ({"drain_seconds": float("inf")}, "drain_seconds=inf must be above 0, in seconds"),
]


@pytest.mark.parametrize(("values", "sentence"), SENTENCES)
def test_values_out_of_range_are_refused(values, sentence):
    with pytest.raises(ConfigError) as error:
        ServerSettings(**values)
    assert str(error.value).startswith(sentence)


def test_it_listens_where_it_is_told_and_says_where_it_cannot():
    assert ServerSettings().host == "127.0.0.1"  # nobody else's unless told
    with listen("127.0.0.1", 0) as taken:
        _, port = taken.getsockname()
        assert address(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"port={port} must be free and allowed"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="host='nowhere.invalid' must be an address"):
        listen("nowhere.invalid", 0)
    with pytest.raises(ConfigError, match=r"host='192\.0\.2\.1' must be an address of this"):
        listen("192.0.2.1", 0)  # set aside for documentation: no machine's
