"""Depth-wise LoRA: nothing at the start, then each loop its own."""

import pytest
import torch
from torch.testing import assert_close

from openmythos.model.adapters import LoopLinear
from openmythos.model.attention import ATTENTION
from tests.tiny import shake, some_ids, tiny


def linear(loops=3):
    module = LoopLinear(5, 7, rank=2, loops=loops)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("attention", ATTENTION)
def test_at_the_start_adapters_change_nothing(attention):
    token_ids = some_ids()
    plain = tiny(attention=attention, spread=0)(token_ids, 4).logits
    assert torch.equal(tiny(attention=attention, spread=0, lora_rank=2)(token_ids, 4).logits, plain)


def test_each_loop_has_its_own_correction_and_later_ones_the_last():
    module, x = linear(loops=3), torch.randn(2, 4, 5)
    for loop in range(6):
        at = min(loop, 2)
        whole = module.weight + module.lora.up[at] @ module.lora.down[at]
        assert_close(module(x, torch.tensor(loop)), x @ whole.T)


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5)])
def test_rows_of_different_loops_in_one_product_are_each_as_alone(shape):
    module, x, loops = linear(), torch.randn(shape), torch.tensor([2, 0, 9, 1])
    together = module(x, loops)
    alone = [module(row, loop) for row, loop in zip(x, loops, strict=True)]
    assert_close(together, torch.stack(alone))


def test_rank_0_has_no_parameters_of_it():
    assert tiny().adapter_parameters() == {}
    assert LoopLinear(5, 7).lora is None


@pytest.mark.parametrize("attention", ATTENTION)
def test_adapters_stand_on_the_maps_the_design_names(attention):
    model = tiny(attention=attention, lora_rank=2, q_latent=14)
    names = {name.split(".lora.")[0] for name in model.adapter_parameters()}
    maps = {"gqa": ["qkv", "out"], "mla": ["q_down", "q_up", "kv_down", "out"]}[attention]
    parts = [f"attention.{name}" for name in maps]
    parts += ["feed_forward.shared.w_in", "feed_forward.shared.w_out"]
    assert names == {f"core.layers.{number}.{part}" for number in range(2) for part in parts}


def test_training_the_adapters_alone_lowers_the_loss_and_leaves_the_rest():
    model, token_ids = tiny(lora_rank=2, spread=0).train(), some_ids(4, 8)
    adapters = model.adapter_parameters()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters)
    optimizer, losses = torch.optim.AdamW(adapters.values(), lr=0.02), []
    for _ in range(15):
        logits = model(token_ids[:, :-1], 3).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in adapters), name


def test_a_correction_of_one_loop_moves_no_earlier_state():
    model, token_ids = tiny(lora_rank=2, lora_loops=4), some_ids()
    before = model(token_ids, 4, return_states=True).states
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("up"):
                parameter[2] += 0.5
    after = model(token_ids, 4, return_states=True).states
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_shaking_reaches_every_adapter():
    model = tiny(lora_rank=2, spread=0)
    shake(model)
    assert all(p.abs().min() > 0 for p in model.adapter_parameters().values())
