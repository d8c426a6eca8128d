"""Costs against counts by hand, and against torch's own counter of operations."""

import pytest
import torch
from tiny import some_ids, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from openmythos import MythosConfig
from openmythos.model.accounting import account, on_meta, training_flops
from openmythos.model.injection import INJECTION
from openmythos.scales import SCALES
from openmythos.training.memory import training_bytes
from openmythos.training.optimizer import build_optimizers
from openmythos.training.settings import OptimizerConfig

DENSE = MythosConfig(
    vocab_size=100,
    hidden_size=24,
    max_length=32,
    num_heads=6,
    kv_heads=2,
    head_dim=4,
    qk_norm=False,
    prelude_layers=2,
    core_layers=3,
    coda_layers=1,
    mean_loops=5,
    feed_forward_size=40,
    tie_head=False,
)


def test_parameters_of_a_dense_model_are_those_counted_by_hand():
    attention = 24 * (6 + 2 + 2) * 4 + 6 * 4 * 24
    layer = attention + 3 * 24 * 40 + 2 * 24  # SwiGLU's three maps, two norms
    injection = 24 * 24 + 2 * 24  # B; the two raw values of A
    gate = 32 * (24 + 1) + 32 + 32 + 1  # hidden units, what reads them
    parts = account(DENSE).parts
    assert parts["embedding"] == parts["head"] == 100 * 24
    assert parts["prelude"] == 2 * layer + 24
    assert parts["coda"] == layer + 24 * 24 + 24  # C, the last norm
    assert parts["experts"] == 0
    assert parts["core"] == 3 * layer + injection + gate


def test_a_token_does_not_use_the_experts_it_does_not_choose():
    config = DENSE.replace(experts=7, experts_per_token=2, shared_experts=1, expert_size=16)
    counted, expert = account(config), 3 * 24 * 16
    assert counted.parts["experts"] == 3 * 7 * expert
    assert counted.total - counted.active == 3 * 5 * expert
    assert account(DENSE).active == account(DENSE).total


@pytest.mark.parametrize("preset", SCALES)
def test_parts_sum_to_what_the_model_has(preset):
    counted = account(MythosConfig.preset(preset))
    model = on_meta(MythosConfig.preset(preset))
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert 0 < counted.active <= counted.total


SEEN_BY_NO_COUNTER = {"lti": 2, "free": 2, "linear": 0, "add": 1, "none": 0}
"""Operations for each channel of a loop's injection that are no products of matrices."""

SHAPES = [{}, {"attention": "mla"}, {"attention": "mla", "q_latent": 12}, {"lora_rank": 4}]
SHAPES += [{"injection": kind} for kind in INJECTION]


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_operations_are_those_of_torchs_counter(loops, changes):
    model = tiny(experts=0, shared_experts=0, **changes).requires_grad_(False)
    for layer in [*model.prelude, *model.core.layers, *model.coda]:
        layer.attention.absorb = False  # the count is of the expanded form
    batch, sequence = 2, 16
    # The counter knows the products of the plain form, and not the fused kernel for CPUs.
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with plain, counter, torch.no_grad():
        model(some_ids(batch, sequence), loops)
    counted = batch * sequence * model.flops(sequence, loops)
    # The counter sees products and attention, and not the injection's A h + B e of 2 a channel.
    each = SEEN_BY_NO_COUNTER[model.config.injection]
    elementwise = batch * sequence * loops * each * model.config.hidden_size
    assert counted - elementwise == counter.get_total_flops()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("learning", [None, 2, 9])
def test_operations_of_a_training_are_those_of_torchs_counter(learning, recomputed):
    loops, batch, sequence = 5, 2, 16
    model = tiny(experts=0, shared_experts=0).train()
    model.core.checkpointing = recomputed
    plain, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    whole_layers = set_checkpoint_early_stop(False)  # torch leaves out a layer's last product
    with plain, counter, whole_layers:
        model(some_ids(batch, sequence), loops, backprop_loops=learning).logits.sum().backward()
    more = {"learning": learning, "recomputed": recomputed}
    counted = training_flops(model, batch * sequence, sequence, loops, **more)
    carrying = min(loops, learning or loops)
    passes = loops - carrying + (4 if recomputed else 3) * carrying
    elementwise = batch * sequence * passes * 2 * model.config.hidden_size  # as above
    assert counted - elementwise == counter.get_total_flops()


def test_operations_count_the_chosen_experts_alone():
    config = DENSE.replace(experts=7, experts_per_token=2, shared_experts=1, expert_size=16)
    one_more = config.replace(experts_per_token=3)
    more = on_meta(one_more).flops(8, 1) - on_meta(config).flops(8, 1)
    assert more == 3 * 2 * (3 * 24 * 16)  # three layers; a product and a sum for each weight
    many = config.replace(experts=70)
    router = 3 * 2 * 24 * (70 - 7)
    assert on_meta(many).flops(8, 1) - on_meta(config).flops(8, 1) == router


def test_cache_bytes_are_those_counted_by_hand():
    heads, latent = 2 * 2 * 4 * 2, (64 + 16) * 2  # keys and values; bf16
    assert account(DENSE).cache_bytes == {
        "per_loop": (2 + 1 + 3 * 5) * heads,
        "last": (2 + 1 + 3) * heads,
    }
    assert account(DENSE.replace(attention="mla")).cache_bytes == {
        "per_loop": (2 + 1 + 3 * 5) * latent,
        "last": (2 + 1 + 3) * latent,
    }


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_cache_bytes_are_those_of_a_cache_that_has_been_written(policy):
    model = tiny(attention="mla").bfloat16()
    cache = model.new_cache(1, 10, policy=policy)
    for token_ids in some_ids(1, 10).split([8, 1, 1], dim=1):
        model(token_ids, cache=cache)
    assert cache.nbytes == 10 * account(model.config).cache_bytes[policy]


def test_training_bytes_are_those_of_a_step():
    model = tiny(lora_rank=2)
    for parameter in model.core.gate.parameters():
        parameter.requires_grad_(False)
    optimizers = build_optimizers(
        model.named_parameters(), OptimizerConfig(), fused_splits=model.fused_splits()
    )
    model(some_ids(), 3).logits.square().mean().backward()
    optimizers.step()
    counted = training_bytes(on_meta(model.config))
    state = optimizers.state_tensors()
    assert counted.weights == sum(p.nbytes for p in model.parameters())
    assert counted.gradients == sum(p.grad.nbytes for p in model.parameters() if p.requires_grad)
    assert counted.optimizer == sum(x.nbytes for x in state.values() if x.ndim)
    assert counted.total == counted.weights + counted.gradients + counted.optimizer


def test_serving_bytes_are_those_of_the_model_in_bf16():
    model = tiny().bfloat16()
    tensors = [*model.parameters(), *model.buffers()]
    assert account(model.config).serving_bytes == sum(tensor.nbytes for tensor in tensors)
