"""Errors in the shape of OpenAI's API, whoever finds them: `{"error": {message, type, ...}}`."""

from __future__ import annotations

import json
import re
import reprlib
import sys
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from openmythos.errors import MythosError

FORMS = {
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists",
    "stop": "a string or a list of strings",
    "content": "a text or a list of parts {'type': 'text', 'text': ...}",
}
"""What fields of several types take."""
API_NAMES = {"choices": "n", "max_new_tokens": "max_tokens", "token_ids": "prompt"}
"""How the API calls what the library calls otherwise."""
WIDEST = 80
"""Characters of a value that a sentence repeats."""
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxlong = _brief.maxother = 2 * WIDEST  # cut at the end, further on


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: one sentence: what is wrong and what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
        kind: OpenAI's `type`; default: by the status.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """Return the whole response."""
        return json_response(self.body(), self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str) -> ApiError:
    """Return the error of a request that would have to wait in a queue that is full."""
    headers = {"Retry-After": "1"}
    return ApiError(429, message, code="queue_full", kind="rate_limit_error", headers=headers)


def gone() -> ApiError:
    """Return what is counted of a request whose client went away; nobody reads it."""
    return ApiError(499, "the client has gone", code="client_gone")


def unavailable(message: str, code: str) -> ApiError:
    """Return the error of a server that cannot take requests now."""
    return ApiError(503, message, code=code, headers={"Retry-After": "1"})


def from_mythos(error: MythosError) -> ApiError:
    """Return the API's form of an error of ours, which begins with the field it is about."""
    message = str(error)
    found = re.match(r"(\w+)(?:=|\[| must| holds)", message)
    if found is None:
        return invalid(message)
    field = API_NAMES.get(found[1], found[1])
    return invalid(field + message[found.end(1) :], field)


def json_text(content: Any) -> str:
    """Return compact JSON in ASCII: half a surrogate pair, which a request may hold, has no UTF-8.

    NaN and the infinities have no JSON, so they are refused.
    """
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a response of JSON."""
    return Response(json_text(content), status, headers, "application/json")


def add_handlers(app: FastAPI) -> None:
    """Let every error of `app` leave in this shape."""
    app.add_exception_handler(ApiError, _of_ours)
    app.add_exception_handler(MythosError, _of_the_library)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _unexpected)


def _of_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _of_the_library(_: Request, error: Exception) -> Response:
    assert isinstance(error, MythosError)
    return from_mythos(error).response()


def _of_validation(_: Request, error: Exception) -> Response:
    """The first thing that does not fit; a client mends one at a time."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    # Of a field of several types each says what is wrong for it: the one that was meant says most.
    meant = (one for one in found if one["type"] == "too_long" or _is_of_an_id(one))
    first = next(meant, found[0])
    path = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        place = f"at character {path[0]}" if path else "here"
        return invalid(f"body must be JSON, but is not {place}").response()
    if not path:
        return invalid(
            "body must be a JSON object, sent with the header Content-Type: application/json"
        ).response()
    name = _dotted(path)
    return invalid(_sentence(name, first), name).response()


def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    message, code = {
        400: (_unreadable(error.__cause__), None),
        404: (f"path={request.url.path!r} must be a route: /openapi.json lists them", "not_found"),
        405: (
            f"method={request.method} must be one that /openapi.json lists for this path",
            "method_not_allowed",
        ),
    }.get(error.status_code, (str(error.detail), None))
    return ApiError(error.status_code, message, code=code, headers=headers).response()


def _unreadable(cause: BaseException | None) -> str:
    """Say why Python does not take a body for JSON, where it is no mistake of syntax."""
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
        digits = sys.get_int_max_str_digits()
        return f"body must hold no number beyond reason: one has more than {digits} digits"
    return "body must be JSON in UTF-8, and not nested beyond reason"


def _is_of_an_id(found: dict[str, Any]) -> bool:
    """Whether it is a number among token ids that is none."""
    value, is_in_a_list = found["input"], isinstance(found["loc"][-1], int)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = found["type"].startswith(("int", "greater_than", "less_than"))
    return number and kind and is_in_a_list and not {"prompt", "token_ids"}.isdisjoint(found["loc"])


def _unexpected(_: Request, __: Exception) -> Response:
    """A mistake of ours: the server logs it, the client learns only that it happened."""
    return ApiError(500, "the server made a mistake; its log has more").response()


def _sentence(name: str, found: dict[str, Any]) -> str:
    """Say what a field must be: one of several types, or what pydantic says of its one."""
    field = name.rpartition(".")[2]
    if _is_of_an_id(found):
        return f"{name}={shortened(found['input'])} must be a token id: an integer from 0 to 2^31-1"
    if field.partition("[")[0] in FORMS and found["type"].endswith(("_type", "_parsing")):
        return f"{name} must be {FORMS[field.partition('[')[0]]}"
    if found["type"] == "missing":
        return f"{name} must be given"
    rule = re.sub(r"^(Input|List|String|Value) should", "must", found["msg"])
    rule = re.sub(r" after validation, not \d+$", "", rule)
    return f"{name}={shortened(found['input'])} {rule}"


def shortened(value: Any) -> str:
    """Write a value, cut where it is long; what is left out is never written."""
    text = _brief.repr(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _dotted(path: list[Any]) -> str:
    """Name a field as `messages[2].content`, without pydantic's names of alternatives."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        elif re.fullmatch(r"\w+", part) and part not in ("str", "int", "float", "bool"):
            name += f".{part}" if name else part
    return name
