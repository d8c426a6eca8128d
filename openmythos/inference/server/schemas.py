"""The bodies of requests and answers, field by field, after OpenAI's API.

A field that is not here is refused unless its value asks for nothing: `IDLE` has the values of
OpenAI's and vLLM's further fields that do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from openmythos.config import CachePolicy, HaltingKind
from openmythos.inference.server.errors import ApiError, invalid, shortened

Count = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# An error for every item of a long list would take a thousand times the memory of the body.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
MOST_LOGPROBS = 20
MOST_STOPS = 16

IDLE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "annotations": ([],),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields that are not supported, and the values with which they change nothing."""

LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
"""Fields that say who asks and never what for; any value will do."""


class Body(BaseModel):
    """Part of a request: types are exact, and fields that are not known are kept, to be judged."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    def refuse_unknown(self, path: str = "") -> None:
        """Check the further fields.

        Raises:
            ApiError: one asks for something that is not done here.
        """
        for name, value in (self.model_extra or {}).items():
            if value is None or name in LABELS or value in IDLE.get(name, ()):
                continue
            field = path + name
            idle = " or ".join(repr(value) for value in IDLE.get(name, ()))
            remedy = f"{idle}, or be left out" if idle else "left out"
            raise invalid(
                f"{field}={shortened(value)} must be {remedy}: it is not supported here",
                field,
                "unsupported_parameter" if name in IDLE else "unknown_parameter",
            )


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = False
    """One more chunk at the end, without choices, with the usage."""
    continuous_usage_stats: bool = False
    """With `include_usage`: the usage so far in every chunk. Not OpenAI's."""
    include_obfuscation: Literal[False] = False


class JsonSchema(Body):
    """A schema that the reply must obey."""

    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None
    """Replies always obey the schema, whatever this says."""


class ResponseFormat(Body):
    """The form of the reply: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Generation(Body):
    """What completions and chat have in common."""

    model: str | None = None
    """Name of the served model; may be left out."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 1
    stop: str | Texts | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    response_format: ResponseFormat | None = None

    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = 0
    """Keep the k likeliest tokens; 0 and -1 keep all. Not OpenAI's."""
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    """Keep tokens at least min_p times as likely as the likeliest. Not OpenAI's."""
    ignore_eos: bool | None = False
    """Go on after the end of a document. Not OpenAI's."""

    loops: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """Most loops a token takes; default: the model's mean. Ours."""
    halting: HaltingKind | None = "none"
    """When a token leaves the core before. Ours."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The halting rule's bound; default: its own. Ours."""
    cache_policy: CachePolicy | None = "per_loop"
    """A cache slot for every loop, or one for the last. Ours."""
    return_loops: bool | None = False
    """Give each choice the loops that its tokens took. Ours."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a text."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Continuations of each prompt."""
        return self.n or 1

    def check(self) -> None:
        """Check what one field says about another.

        Raises:
            ApiError: fields that do not fit together, or ask for what is not done here.
        """
        for part, path in (
            (self, ""),
            (self.stream_options, "stream_options."),
            (self.response_format, "response_format."),
        ):
            if part is not None:
                part.refuse_unknown(path)
        if self.response_format and self.response_format.json_schema:
            self.response_format.json_schema.refuse_unknown("response_format.json_schema.")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options must go with stream=true", "stream_options")
        if len(self.stops) > MOST_STOPS:
            raise invalid(f"stop must hold at most {MOST_STOPS} strings", "stop")
        if not all(self.stops):
            raise invalid("stop must hold no empty string: it would end every text at once", "stop")


class CompletionBody(Generation):
    """The body of `POST /v1/completions`."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)] = ""
    """Text, which starts a document; or token ids, taken as they are; or a list of either."""
    max_tokens: Count | None = 16
    best_of: Count | None = None
    """No other than `n`: nothing is made and thrown away."""
    echo: bool | None = False
    """Begin the text with the prompt; with `logprobs`, those of the prompt too."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """Log-probabilities of the tokens, and of so many likeliest ones at each place."""

    def check(self) -> None:
        """Check what one field says about another.

        Raises:
            ApiError: fields that do not fit together, or ask for what is not done here.
        """
        super().check()
        if self.best_of not in (None, self.choices):
            raise invalid(
                f"best_of={self.best_of} must be n={self.choices}, or be left out", "best_of"
            )


class TextPart(Body):
    """Text in a list of parts."""

    type: str
    text: str | None = None


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None


class ChatBody(Generation):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """Most tokens of a reply; default: the server's chat_tokens, or as many as fit."""
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """The older name of `max_completion_tokens`."""
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class PromptTokensDetails(BaseModel):
    """Where a prompt's tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    """With the mark that starts a document, where the prompt was text."""
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    loops: int
    """Loops of all tokens of the completion together."""
    mean_loops: float | None
    """Loops of a token of the completion, on average."""


class CompletionLogprobs(BaseModel):
    """Four lists, an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    loops: list[int] | None = None


class Completion(BaseModel):
    """The answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(ChatLogprob):
    """A token of the reply, and the likeliest at its place."""

    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    """An entry for each token."""

    content: list[ChatTokenLogprob]


class ChatReply(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One reply."""

    index: int
    message: ChatReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    loops: list[int] | None = None


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    mean_loops: int
    """Loops of a token where a request names none."""
    max_loops: int
    halting: list[str] = list(get_args(HaltingKind))


class ModelList(BaseModel):
    """The answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer of every request that fails."""

    error: ErrorDetail


def refuse_model(asked: str | None, served: str) -> None:
    """Check the name of a model.

    Raises:
        ApiError: it is not the served one's.
    """
    if asked is not None and asked != served:
        raise ApiError(
            404,
            f"model={shortened(asked)} must be {served!r}, which is served here",
            param="model",
            code="model_not_found",
        )
