"""What the native code does by itself follows the Python it mirrors, or torch does the work."""

import functools
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as every_module
from torch.testing import assert_close

from openmythos.model import (
    adapters,
    attention,
    core,
    experts,
    feed_forward,
    halting,
    injection,
    int8,
    quantised,
    transformer,
)
from openmythos.model import layer as layers
from openmythos.model import norm as norms
from openmythos.model import span as spans
from openmythos.model.native import build, mirrored
from openmythos.model.native.describe import structure_of
from openmythos.model.native.exits import decided_here
from openmythos.model.native.paged import paged
from openmythos.model.native.whole import plan_of
from tests.tiny import some_ids, tiny

pytestmark = pytest.mark.skipif(build.library() is None, reason="there is no C compiler")

WIDTHS = {"hidden_size": 32, "head_dim": 16, "num_heads": 4, "kv_latent": 16}
WIDTHS |= {"rope_dim": 8, "nope_dim": 8, "value_dim": 8}


def wide(**kind):
    return tiny(**{**WIDTHS, **kind})


@torch.no_grad()
def logits(model, **options):
    """Behind a cache, where the native code is asked."""
    cache, ids = model.new_cache(2, 9), some_ids(2, 9)
    parts = [model(part, 4, cache=cache, **options).logits for part in ids.split((4, 1, 4), 1)]
    return torch.cat(parts, 1)


@torch.no_grad()
def planned(model):
    return plan_of(model, model.new_cache(1, 9), some_ids(1, 1), 4) is not None


def double(real):
    """What a function gives, doubled; of several things, the first."""

    def changed(*inputs, **options):
        found = real(*inputs, **options)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found

    return changed


MLA = {"attention": "mla", "q_latent": 16}
PLACES = [
    (adapters.LoopLinear, "forward", {}),
    (adapters.LoopLora, "forward", {"lora_rank": 2}),
    (adapters, "loop_linear", {"lora_rank": 2}),
    (attention.GroupedQueryAttention, "forward", {}),
    (attention.LatentAttention, "forward", MLA),
    (attention.LatentAttention, "_latent", MLA),
    (attention, "rotate", {}),
    (attention, "rms_norm", {}),
    (spans.Place, "attend", {}),
    (core.Core, "first_state", {"h0": "e"}),
    (core.Core, "one_loop", {}),
    (experts.Experts, "forward", {}),
    (experts.Router, "_scores", {}),
    (feed_forward.FeedForward, "forward", {}),
    (injection.LTI, "forward", {}),
    (injection.LTI, "prepare", {}),
    (injection.Free, "forward", {"injection": "free"}),
    (layers.Layer, "forward", {}),
    (layers.Layer, "_residual", {}),
    (norms.RMSNorm, "forward", {}),
    (norms, "rms_norm", {}),
    (transformer.OpenMythos, "before_core", {"prelude_norm": False}),
    (transformer.OpenMythos, "readout", {}),
    (F, "scaled_dot_product_attention", {}),
    (F, "linear", {}),
]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("owner", "name", "kind"), PLACES, ids=lambda part: str(part)[-50:])
def test_a_function_replaced_on_its_class_or_in_its_module_is_called(
    owner, name, kind, first, monkeypatch
):
    model = wide(**kind)
    before = None if first else logits(model)
    with monkeypatch.context() as patch:
        changed = double(getattr(owner, name))
        if first:  # a stranger that looks like the one it replaces
            changed = functools.wraps(getattr(owner, name))(changed)
        patch.setattr(owner, name, changed)
        replaced = logits(model)
        assert not planned(model)
        with torch.no_grad():
            assert_close(replaced, model(some_ids(2, 9), 4).logits, rtol=1e-4, atol=2e-4)
    after = logits(model)
    assert planned(model)
    assert (replaced - after).abs().max() > 0.01
    assert first or after.equal(before)


def test_a_value_computed_by_a_class_is_asked_for(monkeypatch):
    model = wide()
    before = logits(model)
    monkeypatch.setattr(injection.Decay, "A", property(lambda decay: decay.step * 0))
    with torch.no_grad():
        assert_close(logits(model), model(some_ids(2, 9), 4).logits, rtol=1e-4, atol=2e-5)
    assert (logits(model) - before).abs().max() > 0.01


def test_int8_is_widened_as_its_class_does(monkeypatch):
    model = quantised.quantise(wide())
    assert structure_of(model.core.layers[0]) is not None
    real = int8.Int8Weight.dense
    monkeypatch.setattr(int8.Int8Weight, "dense", lambda weight: 2 * real(weight))
    assert structure_of(model.core.layers[0]) is None


def _hook_before(module, inputs):
    return tuple(1.5 * x if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (every_module.register_module_forward_hook, lambda m, i, out: 2 * out),
        (every_module.register_module_forward_pre_hook, _hook_before),
    ],
)
def test_a_hook_on_every_module_is_called(register, hook):
    model = wide()
    before, seen = logits(model), []

    def on_maps(module, *inputs):
        seen.append(module)
        return hook(module, *inputs) if type(module) is adapters.LoopLinear else None

    handle = register(on_maps)
    try:
        hooked, with_plan = logits(model), planned(model)
        with torch.no_grad():
            whole = model(some_ids(2, 9), 4).logits
    finally:
        handle.remove()
    assert not with_plan
    assert {layers.Layer, core.Core} <= set(map(type, seen))
    assert_close(hooked, whole, rtol=1e-4, atol=2e-5)
    assert (hooked - before).abs().max() > 1e-3
    assert logits(model).equal(before)


@pytest.mark.parametrize("rule", ["delta", "gate"])
def test_a_rules_class_and_a_rules_own_function_are_asked(rule, monkeypatch):
    model = wide()

    def never(*inputs):
        return torch.zeros(len(inputs[-3]), dtype=torch.bool), inputs[-2]

    options = {"halting": rule, "threshold": 1e-9 if rule == "gate" else 1e9}
    made = model.rule(*options.values())
    assert decided_here(made) is not None
    made.decide = never
    assert decided_here(made) is None
    with torch.no_grad():
        assert (model(some_ids(2, 9), 6, cache=model.new_cache(2), **options).loops < 6).all()
        monkeypatch.setattr(type(made), "decide", never)
        assert decided_here(model.rule(*options.values())) is None
        assert (model(some_ids(2, 9), 6, cache=model.new_cache(2), **options).loops == 6).all()


def test_the_gates_class_is_asked(monkeypatch):
    rule = wide().rule("gate", 0.5)
    monkeypatch.setattr(halting.LearnedExit, "forward", lambda gate, before, after: after.sum(-1))
    assert decided_here(rule) is None


def test_an_embedding_that_bounds_its_rows_does_so():
    model, same = wide(), wide()
    for one in (model, same):
        one.embed = nn.Embedding.from_pretrained(2 * one.embed.weight.detach(), max_norm=1.0)
        one.head.weight = nn.Parameter(torch.ones(50, 32).cumsum(0) / 50)
    assert not planned(model)
    with torch.no_grad():
        assert_close(logits(model), same(some_ids(2, 9), 4).logits, rtol=1e-4, atol=2e-5)
    model.embed.max_norm = None
    assert planned(model)


def test_an_engine_of_changed_classes_is_made_of_torch(monkeypatch):
    model = wide()
    pages = [
        {name: torch.zeros(16, *shape) for name, shape in layer.attention.kept.items()}
        for layer in model.core.layers
    ]
    made = paged(model, pages)
    assert made.stands()
    handle = every_module.register_module_forward_hook(lambda *_: None)
    assert not made.stands()
    assert paged(model, pages) is None
    handle.remove()
    assert made.stands()
    monkeypatch.setattr(norms.RMSNorm, "forward", double(norms.RMSNorm.forward))
    assert not made.stands()
    assert paged(model, pages) is None


def test_the_sources_are_those_that_the_native_code_was_written_after():
    known = json.loads(mirrored.DIGESTS.read_text(encoding="utf-8"))
    now = mirrored.digests()
    edited = sorted(name for name in {**known, **now} if known.get(name) != now.get(name))
    assert not edited, (
        f"{', '.join(edited)}: edited, and the native code does the same work by itself. Where "
        "results change, change openmythos/model/native/layer.c alike; then say "
        "python -m openmythos.model.native.mirrored"
    )


def test_a_class_of_somebody_elses_file_is_not_taken_for_ours():
    assert mirrored.is_mirrored(layers.Layer)
    assert mirrored.is_named(layers.Layer, "layer.Layer")
    theirs = type("Layer", (torch.nn.Module,), {"__module__": "layer"})
    assert not mirrored.is_mirrored(theirs)
    assert not mirrored.is_named(theirs, "layer.Layer")


@pytest.fixture
def digests(monkeypatch):
    """The digests, for a test to change."""
    found = dict(mirrored.digests())
    monkeypatch.setattr(mirrored, "_digests", lambda: found)
    forget = mirrored._codes.clear, mirrored._is_edited.cache_clear
    for function in forget:
        function()
    yield found
    for function in forget:
        function()


def test_an_edited_source_goes_through_torch_and_says_so_once(digests):
    name = "openmythos.model.attention.GroupedQueryAttention.forward"
    digests[name] = "edited"
    with pytest.warns(UserWarning, match=f"{name} was edited.*layer.c alike.*native.mirrored"):
        assert not planned(wide())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not planned(wide())
        assert planned(wide(**MLA))


def test_without_sources_nothing_was_edited(digests, monkeypatch):
    def missing(_):
        raise OSError("could not get source code")

    for name in digests:
        digests[name] = "edited"
    monkeypatch.setattr(mirrored.inspect, "getsource", missing)
    assert planned(wide())


def test_without_digests_nothing_was_edited(digests):
    digests.clear()
    assert planned(wide())
