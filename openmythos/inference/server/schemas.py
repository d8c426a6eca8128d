"""The bodies of requests and answers, field by field, after OpenAI's API.

A field that is not here is refused unless its value asks for nothing: `REQUEST_IDLE` and
`MESSAGE_IDLE` have the values of OpenAI's and vLLM's further fields that do.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from openmythos.config import CachePolicy, HaltingKind
from openmythos.inference.server.errors import ApiError, invalid, shortened
from openmythos.inference.server.serving import State
from openmythos.inference.stops import check_stops

Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
MOST_LOGPROBS = 20
MOST_STOPS = 16
MOST_STOP = 1024
"""Characters of a stop string."""
MOST_IDS = 1 << 20
"""Token ids of a prompt, whatever the model: no model of ours reads more."""
MOST_PROMPTS = 1 << 16
"""Prompts of a body; how many are taken is the server's max_choices."""
MOST_MESSAGES = 2048
MOST_PARTS = 2048
"""Parts of a message."""
# What `json_schema_extra` says here is checked further on, in words that a union of types has not.
# An error for every item of a long list would take a thousand times the memory of the body.
AT_LEAST_ONE: dict[str, Any] = {"minItems": 1}
TokenIds = Annotated[
    list[TokenId], Field(max_length=MOST_IDS, fail_fast=True, json_schema_extra=AT_LEAST_ONE)
]
Prompts = Annotated[
    list[TokenIds], Field(max_length=MOST_PROMPTS, fail_fast=True, json_schema_extra=AT_LEAST_ONE)
]
Texts = Annotated[
    list[str], Field(max_length=MOST_PROMPTS, fail_fast=True, json_schema_extra=AT_LEAST_ONE)
]
Stop = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MOST_STOP})]
Stops = Annotated[list[Stop], Field(fail_fast=True, json_schema_extra={"maxItems": MOST_STOPS})]

REQUEST_IDLE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "bad_words": ([],),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "options": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "prompt_cache_retention": ("24h", "in-memory", "in_memory"),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
"""Fields of a request that are not supported, and the values with which they change nothing."""

MESSAGE_IDLE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "tool_calls": ([],),
    "type": ("text", "message"),
}
"""The same of messages: a client may send a reply back as its library keeps it."""


def make_strict(schema: dict[str, Any], body: type[Body]) -> None:
    """Make the JSON schema of a body as strict as `Body.refuse_unknown` and further checks are."""
    idle = {name: {"enum": [*values, None]} for name, values in body.IDLE.items()}
    schema["properties"] |= idle | {name: {} for name in body.LABELS}
    schema["additionalProperties"] = {"type": "null"}
    if body.NEEDED:
        schema["required"] = [*schema.get("required", ()), *body.NEEDED]


class Body(BaseModel):
    """Part of a request: types are exact, and fields that are not known are kept, to be judged."""

    model_config = ConfigDict(
        strict=True, extra="allow", frozen=True, json_schema_extra=make_strict
    )

    IDLE: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that are not supported, and the values with which they change nothing."""
    LABELS: ClassVar[tuple[str, ...]] = ()
    """Fields that say who asks and never what for; any value will do."""
    NEEDED: ClassVar[tuple[str, ...]] = ()
    """Fields that only look optional, so that a sentence can say what lacks them."""

    def refuse_unknown(self, path: str = "") -> None:
        """Check the further fields.

        Raises:
            ApiError: one asks for something that is not done here.
        """
        for name, value in (self.model_extra or {}).items():
            values = self.IDLE.get(name, ())
            if value is None or name in self.LABELS or _is_one_of(value, values):
                continue
            field = path + name
            idle = " or ".join(map(repr, values))
            remedy = f"{idle}, or be left out" if idle else "left out"
            raise invalid(
                f"{field}={shortened(value)} must be {remedy}: it is not supported here",
                field,
                "unsupported_parameter" if values else "unknown_parameter",
            )


def _is_one_of(value: Any, others: tuple[Any, ...]) -> bool:
    """Whether JSON takes a value for one of `others`: Python also takes True for 1."""
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in others
    )


class StreamOptions(Body):
    """How a stream ends."""

    IDLE = {"include_obfuscation": (False,)}

    include_usage: bool = False
    """One more chunk at the end, without choices, with the usage."""
    continuous_usage_stats: bool = False
    """With `include_usage`: the usage so far in every chunk. Not OpenAI's."""


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

    IDLE = REQUEST_IDLE
    LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")

    model: str | None = None
    """Name of the served model; may be left out."""
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=1 << 31)] | None = 1
    stop: Stop | Stops | None = None
    seed: Int64 | None = None
    """The same seed gives the same text; a negative one is read as 2^63 more."""
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
    """Most loops a token takes; default: the model's mean, or the server's
    max_loops where that is less. Ours."""
    halting: HaltingKind | None = "none"
    """When a token leaves the core before. Ours."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """The halting rule's bound; default: its own. Ours."""
    cache_policy: CachePolicy | None = "per_loop"
    """A cache slot for every loop, or one for the last. Ours."""
    draft_loops: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """Loops after which a token is drafted, to be verified by the rest: sooner, and the same text.
    Below `loops`; without `response_format` and with `cache_policy` per_loop. Ours."""
    priority: Int64 | None = 0
    """Lower is admitted first, equal ones in order of arrival. vLLM's."""
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
            ApiError, InputError: fields that do not fit together, or ask for what is not done here.
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
        longest = max(map(len, self.stops), default=0)
        if longest > MOST_STOP:
            raise invalid(
                f"stop has {longest} characters, must have at most {MOST_STOP}: shorten it", "stop"
            )
        check_stops(self.stops)


class CompletionBody(Generation):
    """The body of `POST /v1/completions`."""

    IDLE = REQUEST_IDLE | {"add_special_tokens": (True,)}  # the mark that starts a document

    prompt: str | TokenIds | Texts | Prompts | None = ""
    """Text, which starts a document; or token ids, taken as they are; or a list of either."""
    max_tokens: Count | None = None
    """Most tokens of a choice; default: 16, or as many as fit."""
    best_of: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    """No other than `n`: nothing is made and thrown away."""
    echo: bool | None = False
    """Begin the text with the prompt; with `logprobs`, those of the prompt too."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """Log-probabilities of the tokens, and of so many likeliest ones at each place."""

    def check(self) -> None:
        """Check what one field says about another.

        Raises:
            ApiError, InputError: fields that do not fit together, or ask for what is not done here.
        """
        super().check()
        if self.best_of not in (None, self.choices):
            raise invalid(
                f"best_of={self.best_of} must be n={self.choices}, or be left out", "best_of"
            )


class TextPart(Body):
    """Text in a list of parts."""

    LABELS = ("cache_control",)
    NEEDED = ("text",)

    type: Annotated[str, Field(json_schema_extra={"const": "text"})]
    text: str | SkipJsonSchema[None] = None


TextParts = Annotated[list[TextPart], Field(max_length=MOST_PARTS, fail_fast=True)]


class ChatMessage(Body):
    """One turn."""

    IDLE = MESSAGE_IDLE
    LABELS = ("name",)
    NEEDED = ("content",)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | TextParts | SkipJsonSchema[None] = None


class ChatBody(Generation):
    """The body of `POST /v1/chat/completions`."""

    IDLE = REQUEST_IDLE | {"add_special_tokens": (False,)}  # the layout or template has them

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
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
    refusal: None
    """Nothing is refused in a reply; OpenAI's API requires the field."""


class ChatReply(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None
    """As in `ChatLogprobs`."""


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


class Health(BaseModel):
    """The answer of `GET /health`, whatever its status."""

    status: State


class ModelCard(BaseModel):
    """The served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    mean_loops: int
    """Loops of a token where a request names none and `max_loops` is no less."""
    max_loops: int
    halting: list[str]
    """Rules that this model can follow."""


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
