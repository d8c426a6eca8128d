"""Bad input: one clear sentence, before any work, and nothing changed."""

import re

import numpy as np
import pytest
import torch
from typecheck import unchecked

from openmythos.config import MythosConfig
from openmythos.errors import CacheError, ConfigError, InputError
from openmythos.model.transformer import OpenMythos
from tests.tiny import some_ids, tiny

IDS = some_ids(2, 4)
OTHER = tiny(seed=1)
BAD_CALLS = {
    "id too large": (lambda m: m(IDS + 50), "must be from 0 to 49 (vocab_size=50)"),
    "id negative": (lambda m: m(IDS * 0 - 1), "token_ids holds -1, must be from 0 to 49"),
    "ids of 32 bits": (
        lambda m: m(IDS.int()),
        "token_ids has dtype torch.int32, must be torch.int64",
    ),
    "ids not whole": (lambda m: m(IDS.float()), "token_ids has dtype torch.float32"),
    "ids not a batch": (lambda m: m(IDS[0]), "shape (4,), must be (batch, sequence): add an axis"),
    "no tokens": (lambda m: m(IDS[:, :0]), "shape (2, 0), must hold at least one token"),
    "no sequences": (lambda m: m(IDS[:0]), "shape (0, 4), must hold at least one token"),
    "too long": (lambda m: m(some_ids(1, 65)), "sequence=65 must be at most max_length=64"),
    "loops 0": (lambda m: m(IDS, 0), "loops=0 must be 1 or more"),
    "loops negative": (lambda m: m(IDS, -3), "loops=-3 must be 1 or more"),
    "loops not whole": (lambda m: m(IDS, 2.5), "loops=2.5 must be an integer"),
    "loops a word": (lambda m: m(IDS, "many"), "loops='many' must be an integer"),
    "loops a flag": (lambda m: m(IDS, True), "loops=True must be an integer"),
    "one loops 0": (lambda m: m(IDS, torch.tensor([1, 0])), "loops holds 0, must be 1 or more"),
    "loops real": (lambda m: m(IDS, torch.ones(2)), "loops has dtype torch.float32"),
    "loops of another batch": (
        lambda m: m(IDS, torch.tensor([1, 2, 3])),
        "loops has shape (3,), must be (2,) or (2, 4)",
    ),
    "mask of another shape": (
        lambda m: m(IDS, mask=torch.ones(2, 3, dtype=torch.bool)),
        "mask has shape (2, 3), must be (2, 4)",
    ),
    "mask of numbers": (
        lambda m: m(IDS, mask=torch.ones(2, 4)),
        "mask has dtype torch.float32, must be torch.bool",
    ),
    "mask of nothing": (
        lambda m: m(IDS, mask=torch.zeros(2, 4, dtype=torch.bool)),
        "mask marks no token at all",
    ),
    "positions of another shape": (
        lambda m: m(IDS, positions=torch.arange(4)),
        "positions has shape (4,), must be (2, 4)",
    ),
    "positions real": (
        lambda m: m(IDS, positions=torch.ones(2, 4)),
        "positions has dtype torch.float32",
    ),
    "h0 of another width": (
        lambda m: m(IDS, h0=torch.zeros(2, 4, 7)),
        "h0 has shape (2, 4, 7), must be (2, 4, 24)",
    ),
    "h0 of integers": (
        lambda m: m(IDS, h0=torch.zeros(2, 4, 24, dtype=torch.int64)),
        "h0 has dtype torch.int64, must be a floating one",
    ),
    "routing of another shape": (
        lambda m: m(IDS, routing=torch.zeros(1, 2, 2, 4, 3, dtype=torch.int64)),
        "routing has shape (1, 2, 2, 4, 3), must be (loops, *(2, 2, 4, 2))",
    ),
    "routing beyond the experts": (
        lambda m: m(IDS, routing=torch.full((1, 2, 2, 4, 2), 5)),
        "routing must hold experts from 0 to 4",
    ),
    "routing real": (
        lambda m: m(IDS, routing=torch.zeros(1, 2, 2, 4, 2)),
        "routing has dtype torch.float32, must be torch.int64",
    ),
    "window 0": (lambda m: m(IDS, 3, backprop_loops=0), "backprop_loops=0 must be an integer of 1"),
    "window per token": (
        lambda m: m(IDS, IDS * 0 + 1, backprop_loops=1),
        "backprop_loops=1 must be left out with loops per token",
    ),
    "window and rule": (
        lambda m: m(IDS, 3, halting="delta", backprop_loops=1),
        "backprop_loops=1 must be left out with halting='delta'",
    ),
    "window and states": (
        lambda m: m(IDS, torch.tensor([1, 2]), return_states=True, backprop_loops=1),
        "backprop_loops=1 must be left out with loops per sequence where return_states",
    ),
    "unknown rule": (
        lambda m: m(IDS, halting="never"),
        "halting='never' must be one of none, gate, delta, kl, act",
    ),
    "threshold without rule": (
        lambda m: m(IDS, threshold=0.5),
        "threshold=0.5 must be left out with halting='none'",
    ),
    "gate above 1": (
        lambda m: m(IDS, halting="gate", threshold=1.5),
        "threshold=1.5 must be above 0 and at most 1",
    ),
    "gate at 0": (lambda m: m(IDS, halting="gate", threshold=0), "threshold=0 must be above 0"),
    "delta negative": (
        lambda m: m(IDS, halting="delta", threshold=-0.1),
        "threshold=-0.1 must be above 0",
    ),
    "threshold not a number": (
        lambda m: m(IDS, halting="kl", threshold=float("nan")),
        "threshold=nan must be a finite number",
    ),
    "threshold a word": (
        lambda m: m(IDS, halting="gate", threshold="0.5"),
        "threshold='0.5' must be a finite number",
    ),
    "a list of rules": (lambda m: m(IDS, halting=["gate"]), "halting=['gate'] must be one of none"),
    "more loops than can be counted": (
        lambda m: m(IDS, 10**22),
        "loops=10000000000000000000000 must be below 2147483648",
    ),
    "states of loops that are not run": (
        lambda m: m(IDS, 4, return_states=[2, 9]),
        "return_states holds 9, must hold at most loops=4",
    ),
    "states of loop 0": (lambda m: m(IDS, return_states=(0, 1)), "return_states holds 0"),
    "routing of no loop": (
        lambda m: m(IDS, routing=torch.zeros(0, 2, 2, 4, 2, dtype=torch.int64)),
        "routing has shape (0, 2, 2, 4, 2), must be (loops, *(2, 2, 4, 2))",
    ),
    "routing twice to one expert": (
        lambda m: m(IDS, routing=torch.zeros(1, 2, 2, 4, 2, dtype=torch.int64)),
        "routing must hold different experts for a token",
    ),
    "states for a number": (
        lambda m: m(IDS, return_states=5),
        "return_states=5 must be True, False, or hold loop counts",
    ),
    "states for a grid": (
        lambda m: m(IDS, return_states=np.ones((1, 2), dtype=np.int64)),
        "return_states=array([[1, 1]]) must be True, False, or hold loop counts",
    ),
    "states of half loops": (
        lambda m: m(IDS, return_states=torch.tensor([1.5])),
        "return_states holds tensor(1.5000), must hold integers of 1 or more",
    ),
    "decode ids": (
        lambda m: m.decode(IDS),
        "h has shape (2, 4), must be (batch, sequence, 24): of states after several loops decode",
    ),
    "decode all loops": (
        lambda m: m.decode(torch.ones(3, 2, 4, 24)),
        "h has shape (3, 2, 4, 24), must be (batch, sequence, 24)",
    ),
    "decode another width": (
        lambda m: m.decode(torch.ones(2, 4, 25)),
        "h has shape (2, 4, 25), must end with hidden_size=24",
    ),
    "decode nothing": (
        lambda m: m.decode(torch.ones(2, 0, 24)),
        "h has shape (2, 0, 24), must hold at least one token",
    ),
    "decode integers": (
        lambda m: m.decode(torch.ones(2, 4, 24).long()),
        "h has dtype torch.int64, must be a floating one",
    ),
    "decode too much": (
        lambda m: m.decode(torch.ones(1, 65, 24)),
        "sequence=65 must be at most max_length=64",
    ),
    "decode with a mask of another shape": (
        lambda m: m.decode(torch.ones(2, 4, 24), mask=torch.ones(2, 3, dtype=torch.bool)),
        "mask has shape (2, 3), must be (2, 4)",
    ),
    "decode with real positions": (
        lambda m: m.decode(torch.ones(2, 4, 24), positions=torch.ones(2, 4)),
        "positions has dtype torch.float32, must be torch.int64",
    ),
    "read out another width": (
        lambda m: m.readout(torch.ones(3, 20)),
        "y has shape (3, 20), must end with hidden_size=24",
    ),
    "states for the readout that are whole": (
        lambda m: m.readout(torch.ones(3, 24, dtype=torch.int64)),
        "y has dtype torch.int64, must be a floating one",
    ),
    "cache beyond all memory": (
        lambda m: m.new_cache(1, loops=2**30),
        "loops=1073741824, batch_size=1 and max_length=64 must leave room for the cache in memory",
    ),
    "act not learned": (lambda m: m(IDS, halting="act"), "set learned_act=True in its config"),
    "cache of 0": (lambda m: m.new_cache(0), "batch_size=0 must be an integer from 1 to"),
    "cache too long": (
        lambda m: m.new_cache(1, 65),
        "max_length=65 must be at most the model's, 64",
    ),
    "cache of no loops": (lambda m: m.new_cache(1, loops=0), "loops=0 must be an integer from 1"),
    "cache of unknown policy": (
        lambda m: m.new_cache(1, policy="first"),
        "policy='first' must be one of per_loop, last",
    ),
}


def forbid_work(model):
    def fail(*_):
        raise AssertionError("work was done before the input was checked")

    model.embed.register_forward_hook(fail)
    return model


@pytest.mark.parametrize("call", BAD_CALLS)
def test_a_bad_call_is_refused_with_one_sentence_before_any_work(call):
    function, sentence = BAD_CALLS[call]
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        function(forbid_work(tiny()))
    assert "\n" not in str(caught.value)


BAD_CACHES = {
    "another model": (lambda m: OTHER.new_cache(2, 8), "cache was made by another model"),
    "another batch": (lambda m: m.new_cache(3, 8), "cache has batch_size=3, token_ids has 2 rows"),
    "too short": (lambda m: m.new_cache(2, 3), "the cache holds max_length=3 tokens and has 0: 4"),
    "made before a cast": (
        lambda m: (m.new_cache(2, 8), m.double())[0],
        "cache is for torch.float32 on cpu, the model is torch.float64",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_a_cache_that_does_not_fit_is_refused_before_any_work(case):
    make, sentence = BAD_CACHES[case]
    model = forbid_work(tiny())
    cache = make(model)
    with pytest.raises(CacheError, match=re.escape(sentence)):
        model(IDS, cache=cache)
    assert cache.length == 0
    assert not any(x.any() for store in cache.core for x in store.data.values())


def test_a_text_longer_than_the_model_is_refused_in_parts_too():
    model = tiny(max_length=6)
    cache = model.new_cache(batch_size=2)
    model(IDS, 1, cache=cache)
    with pytest.raises(
        InputError, match="sequence=4 after 4 cached tokens must end by max_length=6"
    ):
        model(IDS, 1, cache=cache)
    assert cache.length == 4


def test_routing_for_a_core_without_experts_is_refused():
    with pytest.raises(InputError, match="whose core has no experts: leave it out"):
        tiny(experts=0)(IDS, routing=torch.zeros(1, 2, 2, 4, 2, dtype=torch.int64))


BAD_CONFIGS = {
    "no heads": ({"num_heads": 0}, "num_heads=0 must be 1 or more"),
    "negative width": ({"hidden_size": -8}, "hidden_size=-8 must be 1 or more"),
    "heads that do not divide": (
        {"hidden_size": 24, "num_heads": 5},
        "num_heads=5 must divide hidden_size=24",
    ),
    "kv heads that do not divide": (
        {"num_heads": 8, "kv_heads": 3},
        "kv_heads=3 must divide num_heads=8: choose one of 1, 2, 4, 8",
    ),
    "odd head": ({"head_dim": 7}, "head_dim=7 must be even, because rotary embedding turns pairs"),
    "odd rotation": ({"attention": "mla", "rope_dim": 5}, "rope_dim=5 must be even"),
    "more chosen than there are": (
        {"experts": 4, "experts_per_token": 5},
        "experts_per_token=5 must be from 1 to experts=4",
    ),
    "unknown attention": ({"attention": "full"}, "attention='full' must be one of gqa, mla"),
    "unknown injection": ({"injection": "x"}, "injection='x' must be one of lti, free"),
    "unknown norm": ({"norm": "post"}, "norm='post' must be one of pre, peri, sandwich"),
    "no loops": ({"mean_loops": 0}, "mean_loops=0 must be 1 or more"),
    "half a layer": ({"core_layers": 1.5}, "core_layers=1.5 must be an integer"),
    "no core": ({"core_layers": 0}, "core_layers=0 must be 1 or more"),
    "negative prelude": ({"prelude_layers": -1}, "prelude_layers=-1 must be 0 or more"),
    "eps 0": ({"norm_eps": 0.0}, "norm_eps=0.0 must be above 0"),
    "negative experts": ({"routed_scale": -1.0}, "routed_scale=-1.0 must be 0 or more"),
    "frequencies that rise": ({"rope_base": 0.5}, "rope_base=0.5 must be 1 or more"),
    "a router for each loop of a dense core": (
        {"router_loops": 4},
        "router_loops=4 must go with experts: a core without any has no router",
    ),
    "a width of 400 digits": (
        {"hidden_size": 10**400},
        "hidden_size has 1329 bits, must be below 2147483648",
    ),
    "more layers than can be counted": (
        {"prelude_layers": 2**31},
        "prelude_layers has 32 bits, must be below 2147483648",
    ),
    "a negative number of 400 digits": ({"experts": -(10**400)}, "experts has 1329 bits, must be"),
    "a base of 400 digits": ({"rope_base": 10**400}, "must be a finite number"),
    "bias of mla": (
        {"attention": "mla", "qk_bias": True},
        "qk_bias=True must go with attention='gqa'",
    ),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be_built_is_refused_with_one_sentence(case):
    fields, sentence = BAD_CONFIGS[case]
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        MythosConfig(**fields)


def test_an_unknown_preset_or_field_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="preset='2b' must be one of nano, tiny, small, 1b"):
        MythosConfig.preset("2b")
    with pytest.raises(ConfigError, match="n_heads=4 is not a field: vocab_size, hidden_size"):
        MythosConfig().replace(n_heads=4)


@pytest.mark.parametrize(
    ("config", "seed", "sentence"),
    [
        ("nano", 0, "config='nano' must be a MythosConfig: a named one is MythosConfig.preset"),
        (MythosConfig(), "a", "seed='a' must be an integer"),
        (MythosConfig(), 1.5, "seed=1.5 must be an integer"),
    ],
    ids=["a name", "a letter", "a fraction"],
)
def test_a_model_is_made_of_a_config_and_a_whole_seed(config, seed, sentence):
    with unchecked(), pytest.raises(InputError, match=re.escape(sentence)):
        OpenMythos(config, seed=seed)


@pytest.mark.parametrize(
    "counts",
    [(3, 1), {1, 3}, np.array([1, 3]), torch.tensor([3, 1])],
    ids=lambda x: type(x).__name__,
)
def test_wanted_loop_counts_are_taken_in_every_form(counts):
    model, token_ids = tiny(), some_ids()
    every = model(token_ids, 4, return_states=True).states
    assert model(token_ids, 4, return_states=counts).states.equal(every[[0, 2]])


@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3)], ids=["numpy", "tensor"])
def test_whole_numbers_are_taken_in_every_form(three):
    model, token_ids = tiny(), some_ids()
    cache = model.new_cache(batch_size=2, max_length=three * 3, loops=three)
    assert model(token_ids, three, cache=cache).logits.equal(
        model(token_ids, 3, cache=model.new_cache(batch_size=2)).logits
    )
    cache.rollback(three)
    assert cache.length == 4


def test_states_that_are_no_tensor_are_refused():
    with unchecked(), pytest.raises(InputError, match=r"y is list, must be a torch.Tensor"):
        tiny().readout([1])


@pytest.mark.parametrize(
    "wrong",
    [{"token_ids": [[1, 2]]}, {"mask": [[True] * 7] * 2}, {"h0": "e"}, {"routing": 1}],
    ids=str,
)
def test_what_is_no_tensor_is_refused(wrong):
    (name,) = wrong
    with unchecked(), pytest.raises(InputError, match=rf"{name} is \w+, must be a torch.Tensor"):
        tiny()(**{"token_ids": some_ids(), "loops": 2, **wrong})
