"""`generate` of transformers writes what ours writes, with and without a cache."""

import copy

import pytest
import torch
from tiny import some_ids, tiny
from torch.testing import assert_close
from transformers import DynamicCache
from typecheck import unchecked

import openmythos
from openmythos.errors import InputError
from openmythos.huggingface import OpenMythosCache, OpenMythosForCausalLM, OpenMythosTokenizer
from openmythos.huggingface.cache import LEAST
from openmythos.inference.generate import generate
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking
from openmythos.model.halting import HALTING

NEW = 12


@pytest.fixture(scope="module", params=["gqa", "mla"])
def model(request):
    return OpenMythosForCausalLM.of(tiny(attention=request.param, max_length=200))


def ours(model, token_ids, new=NEW, *, mask=None, **thinking):
    """New tokens by our own `generate`, the likeliest each time: (batch, new)."""
    made = generate(
        model.model,
        token_ids,
        max_new_tokens=new,
        thinking=Thinking(**thinking),
        sampling=Sampling(temperature=0),
        mask=mask,
    )
    return torch.stack([token.token_ids for token in made], 1)


def theirs(model, token_ids, new=NEW, **given):
    """New tokens by transformers: (rows, new)."""
    given.setdefault("attention_mask", torch.ones_like(token_ids))
    made = model.generate(token_ids, max_new_tokens=new, do_sample=False, **given)
    return made[:, token_ids.shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("loops", [None, 1, 5])
def test_greedy_text_is_that_of_our_own_generation(model, loops, use_cache):
    token_ids = some_ids(3, 5)
    expected = ours(model, token_ids, loops=loops)
    assert torch.equal(theirs(model, token_ids, loops=loops, use_cache=use_cache), expected)


@pytest.mark.parametrize("halting", [rule for rule in HALTING if rule not in ("none", "act")])
def test_tokens_may_halt(model, halting):
    token_ids = some_ids(2, 5)
    rule = {"halting": halting, "threshold": 0.3}
    expected = ours(model, token_ids, loops=6, **rule)
    assert torch.equal(theirs(model, token_ids, loops=6, **rule), expected)


def test_padding_on_the_left_changes_no_text(model):
    token_ids = some_ids(2, 6)
    mask = torch.ones_like(token_ids)
    mask[1, :4] = 0
    made = theirs(model, token_ids, attention_mask=mask)
    assert torch.equal(made[0], ours(model, token_ids[:1])[0])
    assert torch.equal(made[1], ours(model, token_ids[1:, 4:])[0])


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0},
        {"num_beams": 2, "loops": torch.tensor([1, 4])},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 2},
        {"repetition_penalty": 1.3},
    ],
    ids=lambda given: next(iter(given)),
)
def test_a_search_with_a_cache_finds_what_it_finds_without(model, given):
    batch = 1 if "prompt_lookup_num_tokens" in given else 2
    token_ids = some_ids(batch, 6)
    without = {name: value for name, value in given.items() if name != "prefill_chunk_size"}
    if "prompt_lookup_num_tokens" in given:
        expected = ours(model, token_ids)
    else:
        expected = theirs(model, token_ids, use_cache=False, **without)
    assert torch.equal(theirs(model, token_ids, **given), expected)


def test_parts_of_a_prompt_may_be_padding_alone(model):
    token_ids = some_ids(2, 9)
    mask = torch.ones_like(token_ids)
    mask[:, :4], mask[1, :7] = 0, 0
    made = theirs(model, token_ids, attention_mask=mask, prefill_chunk_size=3)
    for row, length in enumerate((5, 2)):
        assert torch.equal(made[row], ours(model, token_ids[row : row + 1, -length:])[0])


def test_a_text_ends_at_a_string():
    lm = openmythos.load("openmythos-lm")
    tokenizer = OpenMythosTokenizer.from_pretrained("openmythos-lm")
    model = OpenMythosForCausalLM.of(lm)
    prompt = tokenizer("Fellow citizens", return_tensors="pt")
    given = {"max_new_tokens": 12, "do_sample": False, "tokenizer": tokenizer}
    made = model.generate(**prompt, **given, stop_strings=["United"])
    assert tokenizer.decode(made[0]).endswith("United")
    assert model.generation_config.eos_token_id == lm.tokenizer.end_id


def test_an_assistant_changes_no_text(model):
    token_ids = some_ids(1, 5)
    assistant = OpenMythosForCausalLM.of(copy.deepcopy(model.model))
    assistant.generation_config.num_assistant_tokens = 3
    made = theirs(model, token_ids, loops=4, assistant_model=assistant)
    assert torch.equal(made, ours(model, token_ids, loops=4))


def test_a_cache_grows_beyond_its_first_room(model):
    token_ids = some_ids(1, 5)
    new = LEAST + 10
    assert torch.equal(theirs(model, token_ids, new), ours(model, token_ids, new))


def test_a_cache_goes_on_where_a_call_ended(model):
    token_ids = some_ids(2, 9)
    first = model(token_ids[:, :5], use_cache=True)
    second = model(token_ids[:, 5:], cache=first.cache, loops=5)
    assert second.cache.get_seq_length() == 9
    loops = torch.full((2, 9), 3)
    loops[:, 5:] = 5
    assert_close(second.logits, model(token_ids, loops=loops).logits[:, 5:])
    older = model(token_ids[:, 5:], past_key_values=model(token_ids[:, :5], use_cache=True).cache)
    assert_close(older.logits, model(token_ids).logits[:, 5:])


def test_a_cache_is_cropped_repeated_and_forgotten(model):
    token_ids = some_ids(2, 9)
    cache = model(token_ids, use_cache=True).cache
    cache.crop(-2)
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 6
    for count in (1, -7):
        with pytest.raises(InputError, match=f"tokens_to_remove={count} must be from -6 to 0"):
            cache.crop(count)
    cache.batch_repeat_interleave(2)
    rows = token_ids.repeat_interleave(2, 0)
    assert_close(model(rows[:, 6:], cache=cache).logits, model(rows).logits[:, 6:])
    cache.reset()
    assert len(cache) == 0
    assert not cache.is_initialized


def test_columns_are_cropped_and_not_tokens(model):
    token_ids, mask = some_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 4:6] = 0
    cache = model(token_ids[:, :6], attention_mask=mask[:, :6], use_cache=True).cache
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-2)
    assert cache.kept.lengths == [4, 4]
    rest = model(token_ids[[1, 0], 4:], attention_mask=torch.ones(2, 8), cache=cache).logits
    assert_close(rest, model(token_ids[[1, 0]]).logits[:, 4:])


def test_a_call_says_what_each_token_took(model):
    token_ids = some_ids(2, 7)
    out = model(token_ids, loops=torch.tensor([2, 5]), output_hidden_states=True)
    own = model.model(token_ids, torch.tensor([2, 5]), return_states=True)
    assert torch.equal(out.loops, own.loops)
    assert_close(torch.stack(out.hidden_states), own.states)
    assert_close(out.logits, own.logits)
    assert_close(model(token_ids, logits_to_keep=2).logits, model(token_ids).logits[:, -2:])
    as_tuple = model(token_ids, return_dict=False)
    assert_close(as_tuple[0], model(token_ids).logits)
    shifted = model(token_ids, position_ids=torch.arange(3, 10)[None])
    assert_close(shifted.logits, model(token_ids).logits)  # rotary positions are relative


REFUSED = {
    "the cache": ({"cache": DynamicCache()}, "cache=DynamicCache must be an OpenMythosCache"),
    "embeddings": ({"inputs_embeds": torch.ones(2, 7, 24)}, "inputs_embeds must be left out"),
    "a mask": ({"attention_mask": torch.ones(2, 1, 7, 7)}, "attention_mask has shape"),
    "a wider mask": ({"attention_mask": torch.ones(2, 9)}, "has shape .2, 9., must be .2, 7."),
    "documents": (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])},
        "position_ids must rise within a row: packed documents would see each other",
    ),
    "attention": ({"output_attentions": True}, "output_attentions must be left out"),
    "a typo": ({"lops": 3}, "lops must be left out: the model has no such argument"),
    "loops": ({"loops": 0}, "loops=0 must be 1 or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_call_cannot_take_is_refused(model, name):
    given, sentence = REFUSED[name]
    with unchecked(), pytest.raises(InputError, match=sentence):
        model(some_ids(2, 7), **given)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"max_new_tokens": 300}, "max_length=305 must be at most 200, prompt and new tokens"),
        ({"cache_implementation": "static"}, "cache_implementation='static' must be left out"),
    ],
)
def test_what_generation_cannot_take_is_refused_before_it_begins(model, given, sentence):
    with pytest.raises(InputError, match=sentence):
        model.generate(some_ids(1, 5), **{"max_new_tokens": 5, **given})


def test_a_full_cache_is_refused(model):
    cache = OpenMythosCache()
    model(some_ids(1, 150), cache=cache)
    with pytest.raises(InputError, match="max_length=200 must hold the prompt and all new tokens"):
        model(some_ids(1, 51), cache=cache)
