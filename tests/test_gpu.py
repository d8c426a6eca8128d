"""On a GPU the model computes what it computes on the CPU; skipped where there is none."""

import copy
from functools import partial

import pytest
import torch
from tiny import some_ids, some_loops, tiny
from torch.testing import assert_close

from openmythos import MythosConfig, Tokenizer
from openmythos.evidence import recorded
from openmythos.evidence.fit import Batch, FitConfig, _loss, fit
from openmythos.inference.engine import Engine, EngineSettings
from openmythos.inference.generate import generate
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.request import Request, TokenEvent
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking
from openmythos.training.machine import default_device
from openmythos.training.settings import Source, TrainConfig
from openmythos.training.start import open_run, start_run

GPU = default_device()
pytestmark = pytest.mark.skipif(GPU.type == "cpu", reason="there is no GPU here")

SHAPES = {
    "gqa, experts": {},
    "mla, experts": {"attention": "mla"},
    "dense, lora": {"experts": 0, "lora_rank": 2, "lora_loops": 3},
    "squared relu, a router per loop": {"feed_forward": "relu2", "router_loops": 3},
    "linear injection": {"injection": "linear", "experts": 0},
}
CALLS = {
    "loops": {"loops": 3},
    "by sequence": {"loops": some_loops(2)},
    "by token": {"loops": some_loops(2, 7)},
    "delta": {"loops": 5, "halting": "delta", "threshold": 0.4},
    "gate": {"loops": 5, "halting": "gate", "threshold": 0.4},
}


def close(actual, expected):
    assert_close(actual.cpu(), expected, rtol=1e-3, atol=2e-4)


def moved(how):
    return {k: v.to(GPU) if isinstance(v, torch.Tensor) else v for k, v in how.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_loops_are_the_cpus(shape, call):
    model, token_ids, how = tiny(**SHAPES[shape]), some_ids(), CALLS[call]
    with torch.no_grad():
        expected = model(token_ids, **how)
        actual = model.to(GPU)(token_ids.to(GPU), **moved(how))
    close(actual.logits, expected.logits)
    assert (actual.loops.cpu() == expected.loops).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_cpus(shape):
    model, token_ids = tiny(**SHAPES[shape]), some_ids()
    other = copy.deepcopy(model).to(GPU)
    model(token_ids, 3).logits.square().mean().backward()
    other(token_ids.to(GPU), 3).logits.square().mean().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            close(two.grad, one.grad)


@pytest.mark.parametrize("shape", ["gqa, experts", "mla, experts"])
def test_a_cache_gives_what_the_whole_text_gives(shape):
    model, token_ids = tiny(**SHAPES[shape]).to(GPU), some_ids().to(GPU)
    with torch.no_grad():
        whole = model(token_ids, 3).logits
        cache = model.new_cache(2, 16, loops=3)
        parts = [model(token_ids[:, at : at + 1], 3, cache=cache).logits for at in range(7)]
    close(torch.cat(parts, 1), whole.cpu())


def test_bf16_experts_are_near_the_wide_ones():
    model, token_ids = tiny(expert_size=16).to(GPU), some_ids(4, 9).to(GPU)
    with torch.no_grad():
        wide = model(token_ids, 3).logits
        with torch.autocast(GPU.type, dtype=torch.bfloat16):
            narrow = model(token_ids, 3).logits.float()
    assert float((narrow - wide).norm() / wide.norm()) < 0.03


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    lines = [f"The {n} mice ran up the clock, and the clock struck {n % 12}." for n in range(150)]
    path.write_text("\n\n".join(lines))
    return Source(text=path, held_out=0.1)


SHAPE = {"vocab_size": 300, "hidden_size": 32, "max_length": 64, "num_heads": 4, "kv_heads": 2}
EXPERTS = {"core_layers": 1, "mean_loops": 2, "experts": 4, "experts_per_token": 2}
TRAINING = {"steps": 8, "batch_size": 4, "length": 16, "save_every": 4, "evaluate_tokens": 64}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_resumes_and_writes_its_model(tmp_path, text, precision):
    config = MythosConfig(**SHAPE, **EXPERTS, expert_size=16)
    train = TrainConfig(**TRAINING, precision=precision, gate_steps=2)
    lines = []
    start_run(tmp_path / "run", config, train, source=text).fit(lines.append)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    again = open_run(tmp_path / "run")
    assert again.step == 8
    assert again.device.type == GPU.type


def test_a_claims_training_learns_and_stays_on_the_gpu(tmp_path):
    model, token_ids, losses = tiny(), some_ids(4, 8), []

    def batch(_step):
        return Batch(token_ids[:, :-1], token_ids[:, 1:], 2)

    config = FitConfig(steps=6, report_every=1)
    fit(model, batch, config, tmp_path, report=lambda _step, loss: losses.append(loss))
    assert model.embed.weight.device.type == GPU.type
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("most", [16, 1], ids=["each size recorded", "one recorded"])
def test_recorded_passes_train_as_those_that_are_not(tmp_path, monkeypatch, most):
    def batch(step):
        token_ids = some_ids(4, 8 + step % 2)
        return Batch(token_ids[:, :-1], token_ids[:, 1:], 1 + step % 3)

    monkeypatch.setattr(recorded, "MOST", most)
    trained = {}
    for name, loss in {"recorded": None, "not": partial(_loss, window=None)}.items():
        model = tiny(experts=0, lora_rank=2, lora_loops=3)
        fit(model, batch, FitConfig(steps=12), tmp_path / name, loss=loss)
        trained[name] = dict(model.named_parameters())
    for name, parameter in trained["not"].items():
        assert_close(trained["recorded"][name], parameter, rtol=1e-3, atol=1e-4)


def test_generating_and_the_engine_write_the_same():
    tokenizer = Tokenizer.train(["the cat sat on the mat and ate the rat " * 20], vocab_size=270)
    model = tiny(vocab_size=tokenizer.vocab_size).to(GPU)
    lm, prompt = LanguageModel(model, tokenizer), tuple(some_ids(1, 9, vocab=256)[0].tolist())
    thinking, sampling = Thinking(loops=3), Sampling(temperature=0)
    alone = generate(
        model,
        torch.tensor([prompt], device=GPU),
        max_new_tokens=12,
        thinking=thinking,
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
    )
    expected = [int(new.token_ids[0]) for new in alone]
    request = Request(
        token_ids=prompt,
        max_new_tokens=12,
        thinking=thinking,
        sampling=sampling,
        stop_at_end=False,
    )
    with Engine(lm, EngineSettings(cache_bytes=1 << 22)) as engine:
        events = list(engine.submit(request))
    assert [event.token_id for event in events if isinstance(event, TokenEvent)] == expected
