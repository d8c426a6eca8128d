"""A run that starts: what is refused before any work, and what a start leaves behind."""

import json
import os

import pytest
from training.small_runs import FAST, SHAPE, source, start

from openmythos import MythosConfig
from openmythos.errors import ConfigError, InputError, MythosError
from openmythos.model.accounting import on_meta
from openmythos.training import compiled, corpus, machine, memory
from openmythos.training.memory import check_fits, training_bytes
from openmythos.training.run import OfMachine
from openmythos.training.settings import OptimizerConfig, TrainConfig
from openmythos.training.start import open_run, start_run
from openmythos.training.threads import THREADS_PER_CPU, check_threads

TOO_MANY = THREADS_PER_CPU * (os.cpu_count() or 1) + 1


@pytest.mark.parametrize(
    ("train", "model", "sentence"),
    [
        ({"backprop_loops": 1}, {"learned_act": True}, "backprop_loops=1 must be left out with"),
        ({"train": "adapters"}, {}, "train='adapters' must go with lora_rank of 1 or more"),
        ({"length": 65}, {}, "length=65 must be at most the model's max_length=64"),
        ({"threads": TOO_MANY}, {}, f"threads={TOO_MANY} must be from 1 to {TOO_MANY - 1}"),
        ({"threads": 10**6}, {}, "threads=1000000 must be from 1 to"),
        ({"compile": "always"}, {}, r"compile='always' must have a compiler .*no C\+\+ compiler"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_text_is_looked_at(
    tmp_path, monkeypatch, train, model, sentence
):
    monkeypatch.setattr(compiled, "_problem", lambda: "no C++ compiler")
    with pytest.raises(MythosError, match=sentence):
        start(tmp_path / "run", tmp_path / "no such text.txt", model, **train)
    assert not list(tmp_path.iterdir())


def test_threads_are_bounded_where_a_run_goes_on_too(tmp_path, text):
    start(tmp_path, text)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(InputError, match=f"threads={TOO_MANY} must be from 1 to {TOO_MANY - 1}"):
        open_run(tmp_path, of_machine=OfMachine(threads=TOO_MANY))
    assert (tmp_path / "settings.json").read_bytes() == before
    for threads in (1, TOO_MANY - 1):
        check_threads(threads)


@pytest.mark.parametrize("left", ["step-00000003", "metrics.jsonl", "model"])
def test_a_folder_with_what_is_left_of_a_run_is_refused(tmp_path, text, left):
    run = tmp_path / "run"
    (run / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"must hold nothing of another run, and holds {left}:"):
        start(run, text)
    assert [path.name for path in run.iterdir()] == [left]


def test_tokens_and_a_tokenizer_may_be_there_before(tmp_path, text):
    run = tmp_path / "run"
    start(run, text)
    (run / "settings.json").unlink()
    start(run, text)


def test_a_start_that_fails_does_not_keep_the_next_from_starting(tmp_path, text, monkeypatch):
    base, run = tmp_path / "base", tmp_path / "run"
    start(base, text, steps=1).fit()
    run.mkdir()
    train = TrainConfig(steps=1, batch_size=4, length=16, **FAST)
    given = (run, MythosConfig(**SHAPE), train)
    how = {"source": source(text), "start_from": base / "model"}
    with monkeypatch.context() as broken:
        broken.setattr("openmythos.training.start.Settings.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start_run(*given, **how)
    assert not list(run.glob("step-*"))
    start_run(*given, **how)


def test_a_text_is_read_three_times_where_whole_documents_are_held_out(tmp_path, monkeypatch):
    path = tmp_path / "many.jsonl"
    texts = [f"The {n} mice ran up the clock, and it struck {n % 12}." for n in range(150)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    read, passes = corpus._READERS[".jsonl"], []

    def counting(file, field):
        passes.append(file)
        return read(file, field)

    monkeypatch.setitem(corpus._READERS, ".jsonl", counting)
    start(tmp_path / "run", path)
    assert len(passes) == 3  # to divide it, for the tokenizer, for both files of tokens


def of_memory(monkeypatch, size):
    monkeypatch.setattr(memory, "physical_memory", lambda: size)


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(),
        TrainConfig(train="adapters"),
        TrainConfig(optimizer=OptimizerConfig(matrices="adamw")),
    ],
    ids=["all", "adapters", "adamw"],
)
def test_a_training_needs_room_for_gradients_and_optimizers_too(monkeypatch, train):
    monkeypatch.setattr(memory, "default_device", lambda: machine.torch.device("cpu"))
    config = MythosConfig(**SHAPE).replace(lora_rank=2)
    needed = training_bytes(on_meta(config), train)
    of_memory(monkeypatch, needed.total)
    check_fits(config, train)
    of_memory(monkeypatch, needed.total - 1)
    with pytest.raises(
        ConfigError, match=r"their gradients and optimizer state take .* GB in fp32"
    ):
        check_fits(config, train)
    of_memory(monkeypatch, needed.weights)
    check_fits(config)


def test_what_adapters_alone_need_is_less_and_adamw_needs_more():
    model = on_meta(MythosConfig(**SHAPE).replace(lora_rank=2))
    whole = training_bytes(model)
    adapters = training_bytes(model, TrainConfig(train="adapters"))
    adamw = training_bytes(model, TrainConfig(optimizer=OptimizerConfig(matrices="adamw")))
    lora = 4 * sum(p.numel() for p in model.adapter_parameters().values())
    assert adapters == (whole.weights, lora, 2 * lora)
    assert adamw.optimizer == 2 * whole.gradients > whole.optimizer


def test_on_a_gpu_only_the_weights_have_to_fit_into_this_memory(monkeypatch):
    monkeypatch.setattr(memory, "default_device", lambda: machine.torch.device("cuda"))
    config = MythosConfig(**SHAPE)
    of_memory(monkeypatch, training_bytes(on_meta(config)).weights)
    check_fits(config, TrainConfig())
