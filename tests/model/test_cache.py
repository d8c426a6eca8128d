"""A cache changes when work is done, never what comes out."""

import copy
import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from openmythos.config import CachePolicy
from openmythos.errors import CacheError
from openmythos.model.attention import ATTENTION
from tests.tiny import SIZES, in_parts, some_ids, some_loops, tiny

pytestmark = pytest.mark.parametrize("attention", ATTENTION)

# float64, the same sums in another order, logits near 10.
EXACT = {"rtol": 0, "atol": 1e-10}


def small(attention):
    return tiny(attention=attention, dtype=torch.float64, experts=0, lora_rank=2)


@pytest.mark.parametrize("loops", [1, 3, 7])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 2, 3), (6, 1, 1)])
def test_a_prompt_in_parts_gives_the_logits_of_one_pass(attention, loops, sizes):
    model, token_ids = small(attention), some_ids(2, 8)
    cache = model.new_cache(batch_size=2, max_length=8)
    logits, taken = in_parts(model, token_ids, sizes, loops, cache)
    assert_close(logits, model(token_ids, loops).logits, **EXACT)
    assert (taken == loops).all()
    assert cache.length == 8


@pytest.mark.parametrize("sizes", [(3, 1, 2), (1, 5)])
def test_loops_changed_between_calls_equal_loops_per_token_in_one(attention, sizes):
    model, token_ids = small(attention), some_ids(2, 6)
    for budgets in ((1, 5, 2), (4, 1, 9)):
        cache = model.new_cache(batch_size=2, max_length=6)
        logits, loops, at = [], [], 0
        for size, budget in zip(sizes, budgets, strict=False):
            out = model(token_ids[:, at : at + size], budget, cache=cache)
            logits.append(out.logits)
            loops.append(torch.full((2, size), budget))
            at += size
        whole = model(token_ids, torch.cat(loops, 1))
        assert_close(torch.cat(logits, 1), whole.logits, **EXACT)


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1,) * 6])
def test_loops_per_token_or_sequence_work_with_a_cache(attention, sizes):
    model, token_ids = small(attention), some_ids(2, 6)
    for loops in (some_loops(2, 6), some_loops(2)):
        cache = model.new_cache(batch_size=2, max_length=9)
        logits, taken = in_parts(model, token_ids, sizes, loops, cache)
        whole = model(token_ids, loops)
        assert_close(logits, whole.logits, **EXACT)
        assert torch.equal(taken, whole.loops)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequences_of_unequal_length_share_a_cache(attention, side):
    model, token_ids, lengths = small(attention), some_ids(3, 8), (3, 5, 1)
    prompt, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.bool)
    for b, n in enumerate(lengths):
        place = slice(5 - n, 5) if side == "left" else slice(n)
        prompt[b, place], mask[b, place] = token_ids[b, :n], True
    cache = model.new_cache(batch_size=3, max_length=8)
    first = model(prompt, 4, mask=mask, cache=cache)
    assert cache.lengths == list(lengths)
    following = torch.stack([token_ids[b, n : n + 3] for b, n in enumerate(lengths)])
    logits, _ = in_parts(model, following, (1, 2), 4, cache)
    for b, n in enumerate(lengths):
        alone = model(token_ids[b : b + 1, : n + 3], 4).logits[0]
        assert_close(first.logits[b, mask[b]], alone[:n], **EXACT)
        assert_close(logits[b], alone[n:], **EXACT)


def test_a_sequence_may_pause_while_others_go_on(attention):
    model, token_ids = small(attention), some_ids(2, 6)
    cache = model.new_cache(batch_size=2, max_length=6)
    model(token_ids[:, :2], 3, cache=cache)
    pause = torch.tensor([[True, True], [False, False]])
    model(token_ids[:, 2:4], 3, mask=pause, cache=cache)
    assert cache.lengths == [4, 2]
    out = model(torch.stack([token_ids[0, 4:], token_ids[1, 2:4]]), 3, cache=cache)
    assert_close(out.logits[0], model(token_ids[:1], 3).logits[0, 4:], **EXACT)
    assert_close(out.logits[1], model(token_ids[1:, :4], 3).logits[0, 2:], **EXACT)


@pytest.mark.parametrize(
    "counts",
    [3, (1, 4), np.array([1, 4]), torch.tensor([1, 4])],
    ids=lambda counts: type(counts).__name__,
)
def test_after_a_rollback_it_is_as_if_the_tokens_had_never_been_there(attention, counts):
    model, token_ids, other = small(attention), some_ids(2, 5), some_ids(2, 5, seed=1)
    cache = model.new_cache(batch_size=2, max_length=10)
    model(token_ids, some_loops(2, 5), cache=cache)
    cache.rollback(counts)
    left = [2, 2] if isinstance(counts, int) else [4, 1]
    assert cache.lengths == left
    out = model(other, 2, cache=cache)
    for b, n in enumerate(left):
        fresh = model.new_cache(max_length=10)
        model(token_ids[b : b + 1, :n], some_loops(2, 5)[b : b + 1, :n], cache=fresh)
        assert_close(out.logits[b], model(other[b : b + 1], 2, cache=fresh).logits[0], **EXACT)


def test_a_rollback_beyond_what_is_cached_is_refused_and_changes_nothing(attention):
    model = small(attention)
    cache = model.new_cache(batch_size=2, max_length=10)
    model(some_ids(2, 3), 1, cache=cache)
    for count, sentence in (
        (4, "count=4 must be from 0 to the 3 tokens cached"),
        (-1, "count=-1 must be from 0 to the 3 tokens cached"),
        ([1], "count has 1 values, must have 2"),
        (torch.tensor([1, 2, 3]), "count has 3 values, must have 2"),
    ):
        with pytest.raises(CacheError, match=sentence):
            cache.rollback(count)
    assert cache.lengths == [3, 3]


def test_exited_tokens_keep_their_keys_at_deeper_loops(attention):
    model, loops = small(attention), some_loops(2, 4)
    cache = model.new_cache(batch_size=2, max_length=5)
    model(some_ids(2, 4), loops, cache=cache)
    for store in cache.core:
        for data in store.data.values():
            for b in range(2):
                for place in range(4):
                    exit_loop, slots = int(loops[b, place]) - 1, data[:, b, place]
                    assert (slots[exit_loop:] == slots[exit_loop]).all()
                    if exit_loop:
                        assert not torch.allclose(slots[exit_loop - 1], slots[exit_loop])


def test_a_cache_keeps_what_its_attention_declares_and_no_more(attention):
    model = small(attention)
    cache = model.new_cache(batch_size=2, max_length=9, loops=4)
    declared = model.core.layers[0].attention.kept
    numbers = sum(math.prod(shape) for shape in declared.values())
    slots = 2 + 4 * SIZES["core_layers"]  # prelude and coda have one each
    assert cache.nbytes == numbers * slots * 2 * 9 * 8
    model(some_ids(2, 3), 6, cache=cache)
    assert cache.slots == 6
    assert cache.nbytes == numbers * (2 + 6 * SIZES["core_layers"]) * 2 * 9 * 8


def test_with_policy_last_a_prompt_is_read_as_trained(attention):
    model, token_ids = small(attention), some_ids(2, 6)
    cache = model.new_cache(batch_size=2, max_length=9, policy="last")
    logits, _ = in_parts(model, token_ids, (4, 2), 4, cache)
    assert_close(logits, model(token_ids, 4).logits, **EXACT)


@pytest.mark.parametrize("loops", ["same", "fewer", "more", "by token"])
def test_with_policy_last_decoding_reads_each_positions_last_loop(attention, loops):
    model, token_ids = small(attention), some_ids(2, 6)
    prompt_loops = some_loops(2, 3) if loops == "by token" else 4
    budgets = {"same": (4, 4), "fewer": (2, 1), "more": (6, 5), "by token": (4, 2)}[loops]
    cache = model.new_cache(batch_size=2, max_length=9, policy="last")
    twin = model.new_cache(batch_size=2, max_length=9)  # slots made equal by hand
    for one in (cache, twin):
        model(token_ids[:, :3], prompt_loops, cache=one)
    whole = cache.nbytes
    for place, budget in enumerate(budgets, start=3):
        for store in twin.core:
            for data in store.data.values():
                data[:] = data[-1:].clone()
        token = token_ids[:, place : place + 1]
        expected = model(token, budget, cache=twin).logits
        assert_close(model(token, budget, cache=cache).logits, expected, **EXACT)
    assert cache.slots == 1
    assert cache.nbytes < whole / 2


def test_a_call_that_does_not_fit_leaves_the_cache_as_it_was(attention):
    model, token_ids = small(attention), some_ids(2, 4)
    cache = model.new_cache(batch_size=2, max_length=5)
    model(token_ids, 2, cache=cache)
    slots = cache.slots
    with pytest.raises(CacheError, match="max_length=5"):
        model(token_ids, 9, cache=cache)
    assert (cache.lengths, cache.slots) == ([4, 4], slots)
    out = model(token_ids[:, :1], 2, cache=cache)
    whole = model(torch.cat([token_ids, token_ids[:, :1]], 1), 2)
    assert_close(out.logits, whole.logits[:, 4:], **EXACT)


def test_a_cached_call_records_no_gradient_and_gives_the_same_logits(attention):
    model, token_ids = small(attention).train(), some_ids(2, 4)
    cache = model.new_cache(batch_size=2, max_length=4)
    out = model(token_ids, 3, cache=cache, backprop_loops=2)
    assert not out.logits.requires_grad
    assert not any(x.requires_grad for store in cache.core for x in store.data.values())
    assert_close(out.logits, model(token_ids, 3).logits.detach(), **EXACT)


@pytest.mark.parametrize("policy", get_args(CachePolicy))
@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)])
def test_a_chosen_row_goes_on_as_the_prompt_read_again(attention, policy, lengths):
    model, token_ids, rows = small(attention), some_ids(2, 4), [1, 0, 1]
    following = some_ids(3, 3, seed=1)
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    cache = model.new_cache(batch_size=2, max_length=8, policy=policy)
    model(token_ids, some_loops(2, 4), mask=mask, cache=cache)
    entries, before = copy.deepcopy(cache), cache.nbytes
    forked = cache.select(rows)
    assert forked.lengths == [lengths[row] for row in rows]
    assert forked.nbytes * 2 == before * 3
    again = model.new_cache(batch_size=3, max_length=8, policy=policy)
    model(token_ids[rows], some_loops(2, 4)[rows], mask=mask[rows], cache=again)
    for token in following.split(1, dim=1):
        expected = model(token, 3, cache=again).logits
        assert_close(model(token, 3, cache=forked).logits, expected, **EXACT)
    # The cache that they come from has not moved.
    assert cache.lengths == list(lengths)
    for one, other in zip(
        [*cache.outer, *cache.core], [*entries.outer, *entries.core], strict=True
    ):
        assert_close(one.data, other.data, rtol=0, atol=0)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_rows_of_a_cache_may_come_in_every_form(attention, form):
    model = small(attention)
    cache = model.new_cache(batch_size=3, max_length=8)
    model(some_ids(3, 4), 2, mask=torch.arange(4) < torch.tensor([[3], [1], [2]]), cache=cache)
    assert cache.select(form([2, 0])).lengths == [2, 3]


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "rows holds nothing: at least one sequence must stay"),
        ([0, 2], "rows holds 2, must be from 0 to 1"),
        ([-1], "rows holds -1, must be from 0 to 1"),
        ([0.0], "rows holds 0.0, must be from 0 to 1"),
        ([True, False], "rows holds True, must be from 0 to 1"),
    ],
    ids=str,
)
def test_rows_that_a_cache_has_not_are_refused(attention, rows, sentence):
    with pytest.raises(CacheError, match=sentence):
        small(attention).new_cache(batch_size=2, max_length=8).select(rows)


@pytest.mark.parametrize("policy", get_args(CachePolicy))
def test_a_longer_cache_goes_on_as_one_that_was_long_from_the_start(attention, policy):
    model, token_ids = small(attention), some_ids(2, 9)
    mask = torch.arange(4) < torch.tensor([[4], [2]])
    short, long = (model.new_cache(2, length, policy=policy) for length in (4, 10))
    for cache in (short, long):
        model(token_ids[:, :4], some_loops(2, 4), mask=mask, cache=cache)
    grown = short.longer(10)
    assert (grown.max_length, grown.nbytes) == (10, long.nbytes)
    for token in token_ids[:, 4:].split(1, dim=1):
        expected = model(token, 3, cache=long).logits
        assert_close(model(token, 3, cache=grown).logits, expected, **EXACT)
    assert (short.max_length, short.lengths, grown.lengths) == (4, [4, 2], [9, 7])
    for length in (3, 4.5, True):
        with pytest.raises(CacheError, match=f"max_length={length} must be an integer of 4 or"):
            short.longer(length)


@pytest.mark.parametrize("rule", ["delta", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # of which one runs natively
def test_a_rule_takes_slots_for_the_loops_it_takes_and_not_for_its_budget(attention, rule, dtype):
    how = {"halting": rule, "threshold": {"delta": 0.45, "kl": 0.005}[rule]}
    model = tiny(attention=attention, hidden_size=32, dtype=dtype)
    for policy in get_args(CachePolicy):
        caches = [
            model.new_cache(batch_size=2, max_length=6, loops=loops, policy=policy)
            for loops in (1, 40)
        ]
        found = [in_parts(model, some_ids(2, 6), (2, 1, 3), 40, cache, **how) for cache in caches]
        assert_close(*found, rtol=0, atol=0)
        taken = int(found[0][1].max())
        assert 4 < taken < 20  # or the case would show nothing
        assert caches[0].slots < 2 * taken


def test_a_cache_may_be_made_in_inference_mode_and_used_outside(attention):
    model, token_ids = small(attention), some_ids(2, 4)
    how = {"halting": "delta", "threshold": 0.45}
    with torch.inference_mode():
        cache = model.new_cache(batch_size=2, max_length=8, policy="last")
        model(token_ids[:, :2], 7, cache=cache)  # it grows
        chosen, copied = cache.select([1, 0]), copy.deepcopy(cache)
        longer = cache.longer(9)
    with torch.no_grad():
        for one in (cache, chosen, copied, longer):
            model(token_ids[:, 2:], 7, cache=one, **how)
    with torch.inference_mode():
        model(token_ids[:, :1], 7, cache=cache, **how)  # only the last slot stays
    with torch.no_grad():
        model(token_ids[:, :1], 7, cache=cache, **how)
    assert cache.lengths == [6, 6]


def test_a_copied_cache_goes_its_own_way_with_the_same_model(attention):
    model, token_ids = small(attention), some_ids(1, 6)
    cache = model.new_cache(1, 8)
    model(token_ids[:, :3], cache=cache)
    copied = copy.deepcopy(cache)
    model(token_ids[:, :1], cache=cache)
    assert (cache.length, copied.length) == (4, 3)
    rest = model(token_ids[:, 3:], cache=copied).logits
    assert_close(rest, model(token_ids).logits[:, 3:], **EXACT)
