"""`Trainer` and PEFT train what our own trainer would, and leave folders that are ours."""

import pytest
import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny import SIZES, some_ids, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import openmythos
from openmythos.errors import InputError
from openmythos.huggingface import (
    BalanceRouters,
    OpenMythosCache,
    OpenMythosForCausalLM,
    adapter_targets,
)
from openmythos.model.transformer import cross_entropy
from openmythos.training.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

TEXT = "the cat sat on the mat and the dog sat on the log. " * 20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model of our own that was not trained."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train([TEXT], vocab_size=270)
    tiny(vocab_size=270).save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


def windows(folder):
    ids = Tokenizer.load(folder).encode(TEXT)
    parts = [ids[at : at + 16] for at in range(0, len(ids) - 16, 16)]
    return [{"input_ids": part, "labels": part} for part in parts]


def trained(model, folder, base, steps=4, *, resume=None, **given):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=3,
        **given,
    )
    balance = [BalanceRouters()]
    trainer = Trainer(model, args, train_dataset=windows(base), callbacks=balance)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lora(model):
    maps = adapter_targets(model)
    return LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=[], target_parameters=maps)


def balances(model):
    return [layer.router.balance.clone() for layer in model.model.core.experts_layers()]


def test_the_loss_is_the_mean_over_labels(model):
    token_ids = some_ids(2, 7)
    labels = token_ids.clone()
    labels[0, :3] = -100
    own = cross_entropy(model(token_ids).logits[:, :-1], token_ids[:, 1:])
    counted = labels[:, 1:] != -100
    assert_close(model(token_ids, labels=labels).loss, own[counted].mean())
    by_count = model(token_ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    assert_close(by_count, own[counted].sum() / 5)


def test_smoothed_labels_are_shifted_as_the_others(model, base, tmp_path):
    batch = {"input_ids": some_ids(2, 7), "labels": some_ids(2, 7)}
    smoothing = TrainingArguments(
        str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[]
    )
    loss = Trainer(model.eval(), smoothing).compute_loss(model, dict(batch))
    assert_close(loss, model(**batch).loss)


def test_loops_are_drawn_in_training_alone(model):
    token_ids = some_ids(8, 5)
    model.train()
    with pytest.raises(InputError, match="cache must be left out in training"):
        model(token_ids, cache=OpenMythosCache())
    torch.manual_seed(1)
    first = model(token_ids)
    assert len(set(first.loops[:, 0].tolist())) > 1  # one depth for all: 0.2 ** 7
    assert first.cache is None
    torch.manual_seed(1)
    assert torch.equal(model(token_ids, use_cache=True).loops, first.loops)
    torch.manual_seed(1)
    drawn = torch.compile(lambda token_ids: model._drawn(token_ids) + 0, backend="eager")
    assert torch.equal(drawn(token_ids), first.loops[:, 0])
    assert (model(token_ids, loops=2).loops == 2).all()
    with torch.no_grad():
        assert (model(token_ids).loops == SIZES["mean_loops"]).all()
    assert (model.eval()(token_ids).loops == SIZES["mean_loops"]).all()


def test_the_last_loops_of_a_deep_model_carry_the_gradient_as_in_our_training(base):
    model = OpenMythosForCausalLM.of(tiny(vocab_size=270, mean_loops=10, h0="noise")).train()
    seen = []
    model.model.register_forward_pre_hook(
        lambda _m, _args, given: seen.append((given["backprop_loops"], given["h0"])),
        with_kwargs=True,
    )
    model(some_ids(2, 5))
    model.eval()(some_ids(2, 5))
    assert [window for window, _ in seen] == [5, None]
    assert seen[0][1].std() == pytest.approx((2 / 5) ** 0.5, rel=0.3)  # of 240 draws
    assert seen[1][1] is None


def test_processes_that_draw_the_same_number_have_other_loops(model, monkeypatch):
    found = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(1)
        found.append(model.train()(some_ids(8, 2)).loops[:, 0])
    monkeypatch.undo()
    torch.manual_seed(1)
    assert torch.equal(torch.cat(found), model(some_ids(16, 2)).loops[:, 0])


def test_states_may_be_asked_for_in_training(model):
    out = model.train()(some_ids(2, 5), output_hidden_states=True)
    assert all(state.requires_grad for state in out.hidden_states)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("experts", [0, 5])
def test_every_matrix_of_a_layer_has_a_place_for_an_adapter(attention, experts):
    model = OpenMythosForCausalLM.of(tiny(attention=attention, experts=experts, q_latent=8))
    adapted = get_peft_model(model, lora(model)).train()
    adapted(some_ids(2, 7), labels=some_ids(2, 7), loops=2).loss.backward()
    given = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert all(gradient.abs().max() > 0 for gradient in given.values())
    matrices = [
        name
        for name, p in adapted.named_parameters()
        if ".layers." in name and p.ndim > 1 and "lora_" not in name
    ]
    without = (
        "shared.w_in.weight",
        "shared.w_out.weight",
        "scale",
        "router.weight",
        "kv_up.weight",
        "norm.weight",
    )
    wanted = [name for name in matrices if not name.endswith(without)]
    assert len([name for name in given if ".layers." in name]) == len(wanted)


def test_act_is_refused_in_training():
    model = OpenMythosForCausalLM.of(tiny(learned_act=True)).train()
    with pytest.raises(InputError, match="learned_act=True must go with halting='act'"):
        model(some_ids(2, 5))


def test_activations_computed_anew_give_the_same_gradients(model):
    token_ids, gradients = some_ids(2, 7), []
    for anew in (False, True):
        if anew:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing == anew
        model.zero_grad(set_to_none=True)
        model.train()(token_ids, labels=token_ids, loops=4).loss.backward()
        named = model.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, msg=name)
    with pytest.raises(InputError, match="every_n_layers and offload must be left out"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_a_trainer_balances_experts_and_resumes_to_the_same_bits(model, base, tmp_path):
    before = balances(model)
    trainer = trained(model, tmp_path, base)
    assert all((new != old).any() for new, old in zip(balances(model), before, strict=True))
    assert trainer.evaluate(windows(base))["eval_loss"] < 5.6  # from ln 270
    again = AutoModelForCausalLM.from_pretrained(base)
    trained(again, tmp_path / "again", base, resume=str(tmp_path / "checkpoint-2"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name


def test_loads_of_a_step_move_the_balance_as_our_trainer_does(model):
    own = tiny(vocab_size=270)
    parts = some_ids(2, 7), some_ids(2, 7, seed=1)
    model.train()
    for token_ids, loops in zip(parts, (2, 4), strict=True):
        model(token_ids, loops=loops)
    loads = [own(part, loops).loads for part, loops in zip(parts, (2, 4), strict=True)]
    own.core.rebalance(sum(part.sum(0, keepdim=True) for part in loads))
    model.rebalance()
    model.rebalance()  # nothing since
    for new, expected in zip(balances(model), own.core.experts_layers(), strict=True):
        assert torch.equal(new, expected.router.balance)


def test_an_adapter_learns_alone_and_is_found_again(model, base, tmp_path):
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, lora(model))
    trained(adapted, tmp_path / "run", base)
    adapted.eval()
    token_ids = some_ids(2, 7)
    expected = adapted(token_ids).logits.detach()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, frozen[name]), name
    assert (fresh(token_ids).logits - expected).abs().max() > 1e-3
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(again(token_ids).logits, expected)
    with torch.inference_mode():  # in which our native code would run
        assert_close(again(token_ids).logits, expected)
        made = again.generate(token_ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(again.generate(token_ids, max_new_tokens=6, do_sample=False), made)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(by_name(token_ids).logits, expected)
    by_peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(by_peft.eval()(token_ids).logits, expected)
    with pytest.raises(InputError, match="save_pretrained must come after merge_and_unload"):
        again.get_base_model().save_pretrained(tmp_path / "merged")
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = openmythos.OpenMythos.from_pretrained(tmp_path / "merged")
    assert_close(merged(token_ids).logits, expected)


@pytest.mark.parametrize(
    ("weight", "changes"),
    [
        ("kv_up", {"attention": "mla"}),
        ("injection", {}),
        ("embed", {}),
        ("head", {}),
    ],
)
def test_adapters_that_would_be_lost_are_refused(weight, changes):
    model = OpenMythosForCausalLM.of(tiny(**changes))
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"{weight}.weight"])
    adapted = get_peft_model(model, config).train()
    with pytest.raises(InputError, match=f"adapters must leave out {weight}: "):
        adapted(some_ids(2, 5))


@pytest.mark.parametrize("weight", ["embed", "head"])
def test_an_untied_matrix_has_an_adapter_of_its_own(weight):
    model = OpenMythosForCausalLM.of(tiny(tie_head=False))
    config = LoraConfig(r=2, target_modules=[], target_parameters=[f"{weight}.weight"])
    adapted = get_peft_model(model, config).train()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    expected = adapted(some_ids(2, 5), loops=3).logits
    assert_close(adapted.merge_and_unload()(some_ids(2, 5), loops=3).logits, expected)


def test_loads_of_several_processes_add_up(monkeypatch):
    model, alone = (OpenMythosForCausalLM.of(tiny()).train() for _ in range(2))
    of_another = model.model(some_ids(2, 7, seed=1), 4).loads.sum(0, keepdim=True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda loads: loads.add_(of_another))
    model(some_ids(2, 7), loops=2)
    model.rebalance()
    monkeypatch.undo()
    alone(some_ids(2, 7), loops=2)
    alone(some_ids(2, 7, seed=1), loops=4)
    alone.rebalance()
    for found, expected in zip(balances(model), balances(alone), strict=True):
        assert torch.equal(found, expected)
