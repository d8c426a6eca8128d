"""The native code: torch's results, for every kind of layer, and rows that stand alone."""

import copy
import ctypes
import re

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from openmythos.errors import InputError
from openmythos.model import core, transformer
from openmythos.model.feed_forward import FEED_FORWARD
from openmythos.model.halting import HALTING, Gate
from openmythos.model.injection import INJECTION
from openmythos.model.int8 import Int8Weight
from openmythos.model.layer import Layer
from openmythos.model.native import build, linear, run, structures, whole
from openmythos.model.native.describe import structure_of
from openmythos.model.native.structures import STRUCTURES
from openmythos.model.quantised import quantise
from openmythos.model.transformer import OpenMythos
from tests.tiny import some_ids, tiny

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C compiler")

WIDTHS = {
    "hidden_size": 32,
    "head_dim": 16,
    "num_heads": 4,
    "kv_latent": 16,
    "rope_dim": 8,
    "nope_dim": 8,
    "value_dim": 8,
}
KINDS = [
    {},
    {"norm": "peri", "qk_norm": False},
    {"norm": "sandwich", "qk_bias": True, "injection": "add"},
    {"experts": 0, "feed_forward": "relu2", "rope_pairing": "interleaved", "loop_norm": True},
    {"experts_per_token": 3, "shared_experts": 0, "routed_scale": 1.7, "lora_rank": 3},
    {"router_loops": 3, "attention": "mla"},
    {"injection": "none", "h0": "e", "kv_heads": 4},
    {"attention": "mla", "experts": 0, "lora_rank": 2},
    {"hidden_size": 40, "head_dim": 8, "expert_size": 24, "feed_forward_size": 72},
    {"attention": "mla", "q_latent": 16, "qk_norm": False, "rope_pairing": "interleaved"},
]
SHAPES = pytest.mark.parametrize("kind", KINDS, ids=str)


def wide(**kind):
    model = tiny(**{**WIDTHS, **kind})
    for experts in model.core.experts_layers():
        experts.router.balance.copy_(torch.arange(5) * 7 - 14)
    return model


@pytest.fixture
def by_torch(monkeypatch):
    """Call with a function, to have it run without native code."""

    def without(compute):
        with monkeypatch.context() as patch:
            patch.setattr(linear, "library", lambda: None)
            return compute()

    return without


@torch.inference_mode()
def written(model, loops, *, batch=3, parts=(4, 1, 1, 2), slots=None, kept=None, **options):
    cache = model.new_cache(batch_size=batch, max_length=sum(parts), loops=slots, dtype=kept)
    chunks = some_ids(batch, sum(parts)).split(parts, dim=1)
    outs = [model(chunk, loops, cache=cache, **options) for chunk in chunks]
    return torch.cat([out.logits for out in outs], 1), outs


@SHAPES
def test_logits_are_those_of_torch(kind, by_torch):
    model = wide(**kind)
    assert structure_of(model.core.layers[0]) is not None
    native, outs = written(model, 4)
    expected, torchs = by_torch(lambda: written(model, 4))
    assert_close(native, expected, rtol=1e-4, atol=2e-5)
    for out, other in zip(outs, torchs, strict=True):
        if model.config.experts:
            assert out.loads.equal(other.loads)


@torch.no_grad()
def deciding(**kind):
    """A model whose gate fires on some tokens sooner than on others."""
    model = wide(**kind)
    gate = model.core.gate
    gate.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    gate.weight[-1], gate.bias[0] = -0.5, -1.5
    return model


@pytest.mark.parametrize("gate_size", [0, 7])
def test_a_gate_of_any_size_decides_as_by_torch(gate_size, by_torch):
    model = deciding(gate_size=gate_size)
    _, outs = written(model, 6, **RULES["gate"])
    _, torchs = by_torch(lambda: written(model, 6, **RULES["gate"]))
    taken = [out.loops.tolist() for out in outs]
    assert taken == [out.loops.tolist() for out in torchs]
    assert len({loops for rows in taken for row in rows for loops in row}) > 1


RULES = {
    "delta": {"halting": "delta", "threshold": 0.5},
    "gate": {"halting": "gate", "threshold": 0.5},
    "kl": {"halting": "kl", "threshold": 1e-4},
    "none": {},
}


@SHAPES
@pytest.mark.parametrize("rule", RULES)
def test_exits_are_those_of_torch(kind, rule, by_torch, monkeypatch):
    model, loops = deciding(**kind), 6 if rule == "delta" else torch.tensor([6, 4, 2])
    native, outs = written(model, loops, **RULES[rule])
    expected, torchs = by_torch(lambda: written(model, loops, **RULES[rule]))
    assert_close(native, expected, rtol=1e-4, atol=2e-5)
    for out, other in zip(outs, torchs, strict=True):
        assert out.loops.equal(other.loops)
        if model.config.experts:
            assert out.loads.equal(other.loads)
    monkeypatch.setattr(run, "threads_for", lambda products: 3)
    assert written(model, loops, **RULES[rule])[0].equal(native)


def test_exits_are_tested_where_tokens_differ():
    loops = {rule: written(deciding(), 6, **RULES[rule])[1] for rule in ("delta", "gate")}
    for outs in loops.values():
        taken = torch.cat([out.loops for out in outs], 1)
        assert 2 <= taken.min() < taken.max()


@pytest.mark.parametrize("rule", ["delta", "gate"])
def test_a_call_runs_until_a_token_leaves(rule, monkeypatch):
    model, calls, real = deciding(mean_loops=9), [], core.run_loops  # a slot for every loop

    def counted(*args, exits, **options):
        done = real(*args, exits=exits, **options)
        calls.append(len(exits.fired) * exits.ran)
        return done

    monkeypatch.setattr(core, "run_loops", counted)
    _, outs = written(model, 9, slots=9, **RULES[rule])  # or a call ends where slots do
    assert len(calls) == sum(len(out.loops.unique()) for out in outs)
    assert sum(calls) == sum(int(out.loops.sum()) for out in outs)  # rows times loops


def test_a_rule_that_is_another_class_decides_by_itself(monkeypatch):
    class Contrary(Gate):
        def decide(self, before, after, memory, last):
            fires, memory = super().decide(before, after, memory, last)
            return ~fires, memory

    model = deciding()
    monkeypatch.setitem(HALTING, "gate", Contrary)
    _, outs = written(model, 5, halting="gate", threshold=1e-9)
    assert all(bool((out.loops == 5).all()) for out in outs)


@SHAPES
@pytest.mark.parametrize("rule", ["none", "delta"])
def test_sequences_of_unequal_lengths_go_on_natively(kind, rule, by_torch, monkeypatch):
    model, done, real = deciding(**kind), [], core.run_loops

    def noted(*args, **options):
        done.append(real(*args, **options))
        return done[-1]

    @torch.inference_mode()
    def run_on():
        cache, ids = model.new_cache(batch_size=3, max_length=9), some_ids(3, 9)
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[1, 3:] = mask[2, 1:] = False
        model(ids[:, :4], 5, cache=cache, mask=mask, **RULES[rule])
        done.clear()
        outs = [model(part, 5, cache=cache, **RULES[rule]) for part in ids[:, 4:].split((1, 4), 1)]
        return torch.cat([out.logits for out in outs], 1), [out.loops.tolist() for out in outs]

    monkeypatch.setattr(core, "run_loops", noted)
    native, taken = run_on()
    assert done
    assert all(found is not None for found in done)
    expected, torchs = by_torch(run_on)
    assert_close(native, expected, rtol=1e-4, atol=2e-5)
    assert taken == torchs


def test_given_experts_are_taken(by_torch):
    model = wide(lora_rank=2)
    routing = torch.randint(5, (2, 2, 3, 1, 2), generator=torch.Generator().manual_seed(1))
    routing[..., 1] = (routing[..., 0] + 1) % 5
    options = {"parts": (1, 1), "routing": routing, "return_states": True, "return_routing": True}
    native, outs = written(model, 3, **options)
    assert outs[0].routing[1].equal(routing[1])
    expected, torchs = by_torch(lambda: written(model, 3, **options))
    assert_close(native, expected, rtol=1e-4, atol=2e-5)
    assert_close(outs[1].states, torchs[1].states, rtol=1e-4, atol=2e-5)


def test_loops_past_the_cache_with_one_slot(by_torch):
    model = wide()

    @torch.inference_mode()
    def last():
        cache = model.new_cache(batch_size=2, max_length=8, policy="last")
        ids = some_ids(2, 6)
        model(ids[:, :4], 3, cache=cache)
        return torch.cat([model(ids[:, n : n + 1], 4, cache=cache).logits for n in (4, 5)], 1)

    assert_close(last(), by_torch(last), rtol=1e-4, atol=2e-5)


@pytest.fixture
def plans(monkeypatch):
    """The plans by which whole models run, in order; `"off"` in front turns them off."""
    made = []

    def spy(*arguments):
        if made[:1] == ["off"]:
            return None
        made.append(whole.plan_of(*arguments))
        return made[-1]

    monkeypatch.setattr(transformer, "plan_of", spy)
    return made


@SHAPES
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_whole_model_in_one_call_gives_the_bits_of_its_parts(kind, weights, plans, monkeypatch):
    change = {"fp32": torch.nn.Module.float, "bf16": torch.nn.Module.bfloat16, "int8": quantise}
    model = change[weights](wide(mean_loops=2, **kind))
    together, outs = written(model, 3)
    assert len({id(plan) for plan in plans}) == 3  # 4, 1 and 2 tokens
    assert all(plans)
    with monkeypatch.context() as patch:
        patch.setattr(run, "threads_for", lambda products: 3)
        patch.setattr(whole, "threads_for", lambda products: 3)
        assert written(model, 3)[0].equal(together)
    plans.insert(0, "off")
    apart, others = written(model, 3)
    assert together.equal(apart)
    for out, other in zip(outs, others, strict=True):
        assert out.loops.equal(other.loops)
        assert out.logits.dtype == other.logits.dtype
        if model.config.experts:
            assert out.loads.equal(other.loads)


@torch.no_grad()
def test_a_plan_is_made_anew_when_model_or_cache_change(plans, by_torch):
    model, ids = wide(mean_loops=2), some_ids(2, 9)

    def scores():
        cache, found = model.new_cache(batch_size=2, max_length=9), []
        for at in range(9):
            if at == 3:
                model.core.layers[0].attention.out = changed[0]
            if at == 4:
                model.core.injection.decay.step.data = changed[1].clone()
            if at == 6:
                cache.rollback(2)
            loops = 2 if at < 5 else 4
            found.append(model(ids[:, at : at + 1], loops, cache=cache).logits)
        copied = copy.deepcopy(cache)
        found.append(model(ids[:, :1], 4, cache=copied).logits)
        found.append(model(ids[:, :1], 4, cache=cache).logits)
        model.core.layers[0].attention.out, model.core.injection.decay.step.data = before
        return torch.cat(found, 1)

    other = wide(mean_loops=2)
    other.core.layers[0].attention.out.weight.mul_(-1)
    changed = other.core.layers[0].attention.out, torch.full((32,), 1.5)
    before = model.core.layers[0].attention.out, model.core.injection.decay.step.data
    native = scores()
    assert all(plans)
    assert len({id(plan) for plan in plans}) == 5
    assert_close(native, by_torch(scores), rtol=1e-4, atol=2e-5)
    assert native[:, -1].equal(native[:, -2])


def test_a_hook_anywhere_has_no_plan(plans):
    model = wide(mean_loops=2)
    for module in (model.core, model.core.injection, model.head, model.embed, model.prelude[0]):
        calls = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        written(model, 3)
        assert calls
        assert not any(plans)
        handle.remove()
    written(model, 3)
    assert plans[-1] is not None


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_depend_on_no_other_row(kind, dtype, monkeypatch):
    model, ids = wide(**kind).to(dtype), some_ids(40, 3)

    @torch.inference_mode()
    def together(rows):
        cache = model.new_cache(batch_size=len(rows), max_length=3)
        return torch.stack([model(rows[:, n : n + 1], 3, cache=cache).logits for n in range(3)])

    whole = together(ids)
    for some in (slice(0, 1), slice(5, 7), slice(9, 12), slice(0, 9), slice(20, 40)):
        assert together(ids[some]).equal(whole[:, some])
    monkeypatch.setattr(run, "threads_for", lambda products: 3)
    assert together(ids).equal(whole)


@SHAPES
def test_bf16_is_no_further_from_fp32_than_torchs(kind, by_torch):
    """Of the same weights, and the same experts, which a rounding may change."""
    narrow = wide(**kind).bfloat16()
    assert structure_of(narrow.core.layers[0]) is not None
    chunks, known = some_ids(3, 8).split((4, 1, 1, 2), dim=1), [None] * 4

    @torch.inference_mode()
    def outs(model):
        cache, experts = model.new_cache(batch_size=3, max_length=8), bool(model.config.experts)
        return [
            model(chunk, 4, cache=cache, routing=routing, return_routing=experts)
            for chunk, routing in zip(chunks, known, strict=True)
        ]

    def error(found):
        pairs = zip(found, exact, strict=True)
        return max(float((out.logits.float() - other.logits).abs().max()) for out, other in pairs)

    exact = outs(wide(**kind).bfloat16().float())
    known = [out.routing for out in exact]
    assert error(outs(narrow)) <= 1.2 * error(by_torch(lambda: outs(narrow)))


@pytest.fixture
def exact_rows():
    """Where int8 is multiplied as bytes, a row has 16 bits: without that it has all of fp32's."""
    build.library().use_digits(0)
    yield
    build.library().use_digits(1)


@SHAPES
def test_int8_is_read_as_the_matrix_it_stands_for(kind, exact_rows):
    model = quantise(wide(**kind))
    few, _ = written(model, 3, parts=(2, 1, 1), kept="float32")
    for name, parameter in list(model.named_parameters()):
        if isinstance(parameter, Int8Weight):
            owner, _, own = name.rpartition(".")
            dense = torch.nn.Parameter(parameter.dense(), requires_grad=False)
            setattr(model.get_submodule(owner), own, dense)
    model.head.weight = model.embed.weight
    same, _ = written(model, 3, parts=(2, 1, 1))
    assert_close(few, same, rtol=1e-4, atol=2e-5)


@SHAPES
@pytest.mark.parametrize("quantised", [False, True])
def test_keys_may_be_kept_in_bf16_beside_wider_weights(kind, quantised, by_torch):
    model = quantise(wide(**kind)) if quantised else wide(**kind)
    close, _ = written(model, 4, kept="float32")
    native, _ = written(model, 4, kept="bfloat16")
    expected, _ = by_torch(lambda: written(model, 4, kept="bfloat16"))
    apart = (native - close).norm() / close.norm()
    assert 1e-4 < apart < 0.1
    if not quantised:  # there torch multiplies other rows
        assert (native - expected).norm() / close.norm() < 0.5 * apart
    assert model.new_cache().dtype == (torch.bfloat16 if quantised else torch.float32)


@pytest.mark.parametrize("dtype", ["int8", torch.int64, "abacus"])
def test_keys_are_kept_in_floating_numbers(dtype):
    with pytest.raises(InputError, match="must be torch.float32, float64, bfloat16 or float16"):
        tiny().new_cache(dtype=dtype)


def test_a_hook_sees_every_call():
    model, calls = wide(), []
    layer = model.core.layers[0]
    handle = layer.attention.register_forward_hook(lambda *_: calls.append(1))
    written(model, 3, parts=(2, 1))
    assert len(calls) == 6
    handle.remove()
    assert structure_of(layer) is not None
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    written(model, 3, parts=(2, 1))
    written(model, torch.tensor([3, 2, 2]), parts=(1, 1))
    assert len(calls) == 18
    handle.remove()


class Doubled(Layer):
    """A layer of one's own."""

    calls = 0

    def forward(self, h, rope, loop, place, given=None):
        self.calls += 1
        h, chosen = super().forward(h, rope, loop, place, given)
        return 2 * h, chosen


def test_a_layer_of_ones_own_is_called_in_every_loop():
    model = wide()
    layer = Doubled(model.config, in_core=True)
    layer.load_state_dict(model.core.layers[0].state_dict())
    model.core.layers[0] = layer
    written(model, 3, parts=(2, 1))
    written(model, torch.tensor([3, 2, 2]), parts=(1, 1))
    assert layer.calls == 12
    with torch.no_grad():
        whole = model(some_ids(3, 8), 3).logits
    assert_close(written(model, 3)[0], whole, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("where", ["layer", "part", "norm"])
def test_what_is_put_in_the_place_of_a_function_is_called(where):
    model, calls = wide(loop_norm=True), []
    parts = {"layer": model.core.layers[0], "norm": model.core.norm}
    part = parts.get(where, model.core.layers[0].attention)
    written(model, 3, parts=(2, 1))  # described as it was
    own = part.forward
    part.forward = lambda *inputs: calls.append(1) or own(*inputs)
    written(model, 3, parts=(2, 1))
    assert len(calls) == 6
    del part.forward
    handle = part.register_forward_hook(lambda *_: calls.append(1))
    written(model, 3, parts=(2, 1))
    assert len(calls) == 12
    handle.remove()


@pytest.mark.parametrize("cached", [False, True])
def test_loops_in_int32_are_loops(cached):
    model, token_ids = wide(), some_ids(2, 6)
    loops = torch.tensor([[3, 2, 5, 4, 1, 6], [2, 2, 2, 7, 3, 1]])
    for depths in (loops, loops[:, 0]):
        caches = [model.new_cache(2, loops=7) if cached else None for _ in range(2)]
        with torch.no_grad():
            wide_numbers = model(token_ids, depths, cache=caches[0])
            narrow = model(token_ids, depths.int(), cache=caches[1])
        assert narrow.logits.equal(wide_numbers.logits)
        assert narrow.loops.tolist() == wide_numbers.loops.tolist()


def test_changed_weights_are_used(by_torch):
    model = wide()
    before, _ = written(model, 2)
    with torch.no_grad():
        model.core.layers[0].attention.out.weight.mul_(-1)
    inside, _ = written(model, 2)
    assert not inside.equal(before)
    model.core.layers[1].feed_forward.w_in = torch.nn.Parameter(
        model.core.layers[1].feed_forward.w_in.detach().flip(0).contiguous()
    )
    replaced, _ = written(model, 2)
    expected, _ = by_torch(lambda: written(model, 2))
    assert_close(replaced, expected, rtol=1e-4, atol=2e-5)
    model.double()
    assert structure_of(model.core.layers[0]) is None


@pytest.mark.parametrize("part", ["head", "norm", "core_output", "embed"])
def test_a_part_around_the_core_that_is_replaced_is_used(part, by_torch):
    model = wide(tie_head=False)
    before, _ = written(model, 2)
    with torch.no_grad():
        other = copy.deepcopy(getattr(model, part))
        other.weight.copy_(other.weight.flip(-1) * 2)
        setattr(model, part, other)
    replaced, _ = written(model, 2)
    assert not replaced.equal(before)
    expected, _ = by_torch(lambda: written(model, 2))
    assert_close(replaced, expected, rtol=1e-4, atol=2e-5)


def test_gradients_and_counted_operations_go_through_torch(monkeypatch):
    def refuse(*_):
        raise AssertionError

    model = wide()
    monkeypatch.setattr(run, "structure_of", refuse)
    model(some_ids(2, 3), 2).logits.sum().backward()
    with FlopCounterMode(display=False) as counter:
        written(model, 2)
    assert counter.get_total_flops() > 0
    with pytest.raises(AssertionError):
        written(model, 2)


def test_widths_it_does_not_know_are_left_to_torch():
    assert structure_of(tiny(attention="mla").core.layers[0]) is None
    assert isinstance(tiny(attention="mla").core.layers[0], Layer)


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("OPENMYTHOS_NATIVE", "0")
    assert build.library.__wrapped__() is None


@pytest.mark.parametrize("compiler", ["/bin/false", "/bin/true"])
def test_a_compiler_that_makes_nothing_leaves_nothing(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compilers", lambda: [compiler])
    assert build.library.__wrapped__() is None
    assert not list(tmp_path.rglob("*.so"))


def test_where_one_compiler_fails_the_next_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    assert build.library.__wrapped__() is not None


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_damaged_kept_file_is_made_again(left, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library.__wrapped__() is not None
    (file,) = tmp_path.rglob("*.so")
    whole_file = file.read_bytes()
    file.unlink()  # the one that is loaded stays as it is
    file.write_bytes(whole_file[:left])
    assert build.library.__wrapped__() is not None
    assert len(file.read_bytes()) == len(whole_file)


def test_without_a_home_there_is_no_native_code(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert build.library.__wrapped__() is None


def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library.__wrapped__() is not None
    (file,) = tmp_path.rglob("*.so")
    time = file.stat().st_mtime_ns
    assert build.library.__wrapped__() is not None
    assert file.stat().st_mtime_ns == time


def fields_in_c():
    """The fields of each structure of layer.c by its name, in their order."""
    text = re.sub(r"/\*.*?\*/", "", build.SOURCE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        name: re.findall(r"(\w+)\s*[,;]", body)
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, flags=re.DOTALL)
    }


@pytest.mark.parametrize(("name", "structure"), STRUCTURES.items())
def test_a_structure_has_the_fields_of_the_c_code_in_their_order(name, structure):
    assert [field for field, *_ in structure._fields_] == fields_in_c()[name]


def test_structures_of_other_sizes_than_the_c_codes_are_not_loaded(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*structures.Map._fields_, ("more", ctypes.c_int64)]

    monkeypatch.setitem(STRUCTURES, "Map", Longer)
    with pytest.raises(AssertionError, match="Map has 80 bytes here and 72 in layer.c"):
        build.library.__wrapped__()


NOWHERE = float("nan")


@pytest.mark.parametrize("chosen", [2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_states_that_are_no_numbers_give_logits_that_are_none(chosen, rows):
    model = wide(experts_per_token=chosen)
    with torch.no_grad():
        model.embed.weight[:] = NOWHERE
    for _ in range(20):  # experts taken twice would write past their room
        logits, outs = written(model, 3, batch=rows)
    assert logits.isnan().all()
    assert outs[0].loads.sum() == 3 * 2 * rows * 4 * chosen


def test_a_broken_weight_of_squared_relu_is_seen():
    model = wide(experts=0, feed_forward="relu2")
    with torch.no_grad():
        model.core.layers[0].feed_forward.w_in.weight[3] = NOWHERE
    assert written(model, 2)[0].isnan().any()


@pytest.mark.parametrize("chosen", [2, 5])
def test_an_expert_may_be_given_twice_to_a_token_that_had_left(chosen, by_torch):
    model = wide(experts_per_token=chosen)
    routing = torch.full((3, 2, 3, 4, chosen), -1)
    routing[1, ..., 0] = 1

    def logits():
        return written(model, 3, parts=(4,), routing=routing)[0]

    assert_close(logits(), by_torch(logits), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("width", [8, 24, 48, 4096])
def test_rows_of_another_width_are_refused_as_by_torch(width):
    model, rows = wide(), torch.ones(1, 3, width)
    with torch.inference_mode():
        for call in (model.head, model.core.injection.prepare):
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                call(rows)
        with pytest.raises((RuntimeError, InputError)):
            model.readout(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_and_device_change_nothing(dtype, plans):
    model = wide(mean_loops=2)
    expected = written(model, 3)[0]
    exits = written(model, 6, **RULES["delta"])[0]
    try:
        torch.set_default_dtype(dtype)
        assert written(model, 3)[0].equal(expected)
        assert written(model, 6, **RULES["delta"])[0].equal(exits)
        plans.insert(0, "off")
        assert written(model, 3)[0].equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_weight_of_another_class_goes_through_torch():
    class Watched(torch.Tensor):
        """Has no numbers of its own."""

        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, function, types, arguments=(), named=None):
            plain = [x.inner if isinstance(x, cls) else x for x in arguments]
            result = function(*plain, **(named or {}))
            return cls(result) if function is torch.ops.aten.detach.default else result

    head, rows = wide().head, torch.randn(1, 32)
    expected = rows @ head.weight.T
    head.weight = torch.nn.Parameter(Watched(head.weight.detach()), requires_grad=False)
    with torch.inference_mode():
        assert_close(head(rows), expected.detach(), rtol=1e-4, atol=1e-5)


def _turned(model):
    weight = model.core.layers[0].attention.out.weight
    weight.data = weight.data.t()


def _halved(model):
    weight = model.core.layers[0].attention.out.weight
    weight.data = weight.data.clone() / 2


CHANGES = {
    "strides": _turned,
    "numbers": _halved,
    "experts chosen": lambda model: setattr(model.core.layers[0].feed_forward.router, "chosen", 1),
    "their scale": lambda model: setattr(model.core.layers[0].feed_forward, "scale", 3.0),
    "eps": lambda model: setattr(model.core.layers[0].attention_norm, "eps", 0.5),
    "activation": lambda model: setattr(
        model.prelude[0].feed_forward, "activation", lambda x: x.tanh().chunk(2, -1)[0]
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_after_the_first_call_is_used(change, by_torch):
    model = wide(num_heads=2, kv_heads=1)
    before = written(model, 3)[0]
    change(model)
    native = written(model, 3)[0]
    assert_close(native, by_torch(lambda: written(model, 3)[0]), rtol=1e-4, atol=2e-5)
    assert (native - before).abs().max() > 0.01


def test_a_core_norm_of_another_dtype_goes_through_torch(by_torch):
    model = wide(loop_norm=True)
    model.core.norm.bfloat16()
    assert_close(written(model, 3)[0], by_torch(lambda: written(model, 3)[0]), rtol=1e-4, atol=2e-5)


class Louder(OpenMythos):
    """Overrides what stands around the core."""

    def before_core(self, *arguments):
        return 1.5 * super().before_core(*arguments)

    def readout(self, y):
        return super().readout(y).tanh()


def _patch(model, name, function):
    setattr(model, name, function)


PATCHES = {
    "one_loop": lambda core: _patch(core, "one_loop", lambda h, *_, **__: (h, None)),
    "prepare": lambda core: _patch(
        core.injection, "prepare", lambda e: (torch.zeros_like(e), torch.zeros(32))
    ),
    "_residual": lambda core: _patch(core.layers[0], "_residual", lambda h, y, _: h - y),
}


def test_a_subclass_is_asked_behind_a_cache_too():
    model = Louder(wide(mean_loops=2).config).eval()
    ids = some_ids(2, 5)
    with torch.inference_mode():
        cache = model.new_cache(2, 5)
        steps = [model(ids[:, n : n + 1], 3, cache=cache).logits for n in range(5)]
        assert_close(torch.cat(steps, 1), model(ids, 3).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_a_function_of_a_models_own_is_called_behind_a_cache_too(patch, by_torch):
    model = wide(mean_loops=2)
    before = written(model, 3)[0]
    patch(model.core)
    native = written(model, 3)[0]
    assert_close(native, by_torch(lambda: written(model, 3)[0]), rtol=1e-4, atol=2e-5)
    assert (native - before).abs().max() > 0.01


def test_kinds_that_are_added_to_the_tables_go_through_torch(monkeypatch, by_torch):
    class Mean(torch.nn.Module):
        """The mean of state and input."""

        def __init__(self, width):
            super().__init__()

        def prepare(self, e):
            return e, None

        def forward(self, h, drive, carry):
            return (h + drive) / 2

    def geglu(x):
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate) * up

    model = wide(mean_loops=2)
    monkeypatch.setitem(INJECTION, "add", Mean)
    kinds = [{"injection": "add"}]
    monkeypatch.setitem(FEED_FORWARD, "swiglu", (geglu, 2))
    kinds += [{}, {"experts": 0}]
    for kind in kinds:
        model = wide(mean_loops=2, **kind)
        assert_close(
            written(model, 3)[0], by_torch(lambda m=model: written(m, 3)[0]), rtol=1e-4, atol=2e-5
        )


def test_a_transformed_map_goes_through_torch():
    head, rows = wide().head, torch.randn(4, 32)
    with torch.no_grad():
        expected = head(rows)
        assert_close(torch.func.vmap(head)(rows), expected, rtol=1e-4, atol=1e-5)
