"""Replies of a schema: whatever is drawn among the allowed tokens obeys it."""

import json
import random

import numpy as np
import pytest
from fake_engine import language_model

from openmythos.errors import InputError
from openmythos.inference.request import Constraint
from openmythos.inference.server.json_output import JsonConstraint, JsonGrammars
from openmythos.inference.ticks import vocabulary_mask

TOKENIZER = language_model().tokenizer
GRAMMARS = JsonGrammars(TOKENIZER)
MOUSE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"enum": [1, 2, "old"]},
        "tail": {"type": "boolean"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    (MOUSE, lambda value: set(value) <= {*MOUSE["properties"]} and value["age"] in (1, 2, "old")),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 3}, lambda value: len(value) <= 3),
    ({"type": "string", "pattern": "^[a-c]{2,4}$"}, lambda value: set(value) <= set("abc")),
    ({"const": "mouse — ☃"}, lambda value: value == "mouse — ☃"),
]


def drawn(constraint, seed, most=400):
    """Draw among the allowed tokens until the text ends."""
    chance, token_ids = random.Random(seed), []
    while not constraint.finished() and len(token_ids) < most:
        allowed = np.flatnonzero(vocabulary_mask(constraint, TOKENIZER.vocab_size)).tolist()
        token = chance.choice(allowed)
        if token == TOKENIZER.end_id:
            break
        constraint.accept(token)
        token_ids.append(token)
    return TOKENIZER.decode(token_ids)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("schema", "obeys"), SCHEMAS)
def test_whatever_is_drawn_obeys_the_schema(schema, obeys, seed):
    constraint = GRAMMARS.obey(schema)
    assert isinstance(constraint, Constraint)
    text = drawn(constraint, seed)
    value = json.loads(text)
    assert obeys(value), text
    # The layout is json.dumps' own, but for how a string escapes.
    assert len(text.replace(" ", "")) >= len(json.dumps(value, ensure_ascii=False).replace(" ", ""))


def test_any_object_begins_and_ends_as_one():
    constraint = GRAMMARS.any_object()
    for token in TOKENIZER.encode('{"a": [1, "b"]}'):
        assert vocabulary_mask(constraint, TOKENIZER.vocab_size)[token]
        constraint.accept(token)
    assert constraint.finished()


def test_white_space_is_only_where_json_dumps_has_it():
    constraint = GRAMMARS.obey(MOUSE)
    allowed = vocabulary_mask(constraint, TOKENIZER.vocab_size)
    assert [TOKENIZER.decode([t]) for t in np.flatnonzero(allowed).tolist()] in (["{"], ["{", '{"'])


def test_a_copy_goes_its_own_way():
    first = GRAMMARS.obey({"enum": ["ab", "cd"]})
    second = first.copy()
    for constraint, text in ((first, '"ab"'), (second, '"cd"')):
        for token in TOKENIZER.encode(text):
            constraint.accept(token)
        assert isinstance(constraint, JsonConstraint)
        assert constraint.finished()


def test_the_end_is_allowed_only_where_the_json_may_end():
    constraint = GRAMMARS.obey({"type": "integer"})
    assert not vocabulary_mask(constraint, TOKENIZER.vocab_size)[TOKENIZER.end_id]
    constraint.accept(TOKENIZER.encode("7")[0])
    assert vocabulary_mask(constraint, TOKENIZER.vocab_size)[TOKENIZER.end_id]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "mouse"},
        {"type": "string", "pattern": "("},
        {"not": {"type": "string"}},
        {"not": {}, "x-guidance": {"lenient": True}},  # nobody may turn the refusal off
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema.json"},
        False,
        {"anyOf": [{"type": "integer"}] * 5001},
        {"const": "ab " * 50_000},
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema):
    with pytest.raises(InputError, match="schema must be a JSON schema"):
        GRAMMARS.obey(schema)


def test_a_schema_may_be_deep_by_references():
    """Compiled by recursion: on an ordinary thread's stack these took the process down."""
    wrapped = 40  # lists within each definition
    definitions = {}
    for number in range(60):
        inner = {"$ref": f"#/$defs/d{number + 1}"} if number < 59 else {"type": "integer"}
        for _ in range(wrapped):
            inner = {"type": "array", "items": inner, "minItems": 1}
        definitions[f"d{number}"] = inner
    constraint = GRAMMARS.obey({"$ref": "#/$defs/d0", "$defs": definitions})
    constraint.accept(TOKENIZER.encode("[")[0])
    assert constraint.copy().allowed().any()


def test_true_is_a_schema_that_allows_every_value():
    constraint = GRAMMARS.obey(True)
    for token_id in TOKENIZER.encode("[1, "):
        constraint.accept(token_id)


def test_a_token_that_is_not_allowed_is_refused():
    constraint = GRAMMARS.obey({"type": "integer"})
    with pytest.raises(InputError, match="schema"):
        constraint.accept(TOKENIZER.encode("x")[0])
