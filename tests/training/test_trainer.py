"""A run: it learns, resumes to the bit, and refuses what does not fit."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from training.small_runs import FAST, SHAPE, same, source, start, stopped, weights

import openmythos
from openmythos import MythosConfig, OpenMythos, Tokenizer
from openmythos.cli.train_command import _better
from openmythos.errors import CheckpointError, ConfigError, DataError
from openmythos.training import checkpoint, compiled, machine, memory
from openmythos.training.evaluate import Reading, evaluate, evaluate_halting
from openmythos.training.measured import Measured
from openmythos.training.metrics import METRICS, metrics, scalars
from openmythos.training.run import (
    OfMachine,
    Settings,
    finished,
    load_from_run,
    trained_length,
)
from openmythos.training.settings import OptimizerConfig, Source, TrainConfig
from openmythos.training.start import open_run, start_run
from openmythos.training.trainer import Stopped, Trainer


def test_a_run_learns_and_its_model_loads(tmp_path, text):
    trainer = start(tmp_path / "run", text, steps=60)
    trainer.fit()
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(steps) == 60
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    for loaded in (tmp_path / "run", tmp_path / "run" / "model"):
        lm = openmythos.load(loaded)
        assert len(lm.generate("The 3 mice", max_new_tokens=5, seed=1)) > 0


def test_measurements_hold_every_depth_and_the_state_of_every_loop(tmp_path, text):
    start(tmp_path / "run", text).fit()
    measured = [line for line in metrics(tmp_path / "run") if "validation" in line]
    assert measured[-1]["final"]
    assert list(measured[-1]["validation"]) == ["1", "2", "4", "8", "16"]
    assert len(measured[-1]["state_rms"]) == 4
    share = torch.tensor(measured[-1]["expert_share"])
    assert share.shape == (4, 1, 4)  # loops, core layers, experts
    assert_close(share.sum(-1), torch.ones(4, 1), atol=1e-4, rtol=0)


def test_the_curve_ends_with_the_last_step_on_the_text_it_began_with(tmp_path, text):
    run = tmp_path / "run"
    trainer = start(run, text)
    trainer.fit()
    *curve, end = [line for line in metrics(run) if "validation" in line]
    assert [(line["step"], line.get("final", False)) for line in curve] == [(3, False), (7, False)]
    assert (end["step"], end["final"]) == (7, True)
    for line, tokens in ((curve[-1], 64), (end, None)):
        measured = trainer._evaluate(tokens).by_depth.bits_per_byte
        assert list(line["validation"].values()) == pytest.approx(measured)
    assert curve[-1]["validation"] != end["validation"]
    assert checkpoint.score(checkpoint.latest(run)) == curve[-1]["validation"]["2"]


@pytest.mark.parametrize("tokens", [10**6, 64])
def test_held_out_text_that_is_measured_whole_is_not_measured_again(
    tmp_path, text, monkeypatch, tokens
):
    measured = []

    def counting(*values, **how):
        measured.append(evaluate(*values, **how))
        return measured[-1]

    monkeypatch.setattr("openmythos.training.measured.evaluate", counting)
    trainer = start(tmp_path / "run", text, steps=2, evaluate_tokens=tokens)
    trainer.fit()
    whole = tokens > trainer.validation.tokens
    assert (trainer.measures_all, len(measured)) == (whole, 1 if whole else 2)
    point, end = [line for line in metrics(tmp_path / "run") if "validation" in line]
    assert (end == point | {"final": True}) == whole
    again = trainer._evaluate(None).by_depth
    assert list(end["validation"].values()) == list(again.bits_per_byte)
    assert again.tokens == trainer.validation.tokens


@pytest.mark.parametrize("length", [7, 8, 16])
def test_a_run_knows_whether_its_measurements_take_all_of_the_text(tmp_path, text, length):
    trainer = start(tmp_path / "run", text, steps=1, length=length)
    count = trainer.validation.tokens
    for tokens in range(max(1, count - 20), count + 3):
        trainer.config = dataclasses.replace(trainer.config, evaluate_tokens=tokens)
        assert trainer.measures_all == (trainer._evaluate(tokens).by_depth.tokens == count), tokens


def takes_denormals_for_0():
    denormal = torch.ones((), dtype=torch.int32).view(torch.float32)
    return not int((denormal * 1).view(torch.int32))


def test_a_training_leaves_the_process_as_it_was(tmp_path, text):
    before = torch.get_num_threads(), takes_denormals_for_0()
    other = before[0] + 1
    trainer = start(tmp_path / "run", text, steps=2, threads=other)
    assert (torch.get_num_threads(), takes_denormals_for_0()) == before
    inside = []
    trainer.fit(lambda _: inside.append((torch.get_num_threads(), takes_denormals_for_0())))
    assert (torch.get_num_threads(), takes_denormals_for_0()) == before
    if torch.set_flush_denormal(before[1]):  # the processor can
        assert set(inside) == {(other, True)}
    again = open_run(tmp_path / "run")
    assert torch.get_num_threads() == before[0]
    assert again.threads == other


def test_the_model_of_a_run_knows_the_windows_of_its_training(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, steps=1).fit()
    assert trained_length(run) == trained_length(checkpoint.latest(run)) == 16
    assert trained_length(run / "model") == 16
    shutil.copytree(run / "model", tmp_path / "copy")
    assert trained_length(tmp_path / "copy") == 16  # far from its run


@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, text, threads):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"threads": threads, "depth": "lognormal_poisson", "gate_steps": 2}
    start(whole, text, model={"h0": "noise"}, **options).fit()
    trainer = start(cut, text, model={"h0": "noise"}, **options)

    def stop(line):
        trainer._stop = trainer.step == 4

    with pytest.raises(Stopped):
        trainer.fit(stop)
    assert checkpoint.latest(cut).name == "step-00000004"
    again = open_run(cut)
    assert again.step == 4
    again.fit()
    assert same(whole, cut)
    for key in ("loss", "loops", "gradient_norm"):
        first, second = ([x.get(key) for x in metrics(run)] for run in (whole, cut))
        assert first == second
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of its own code
@pytest.mark.parametrize(
    "depth", ["fixed", pytest.param("uniform", marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
def test_compiled_layers_learn_as_plain_ones_and_resume_to_the_bit(tmp_path, text, depth):
    whole, cut, plain = tmp_path / "whole", tmp_path / "cut", tmp_path / "plain"
    core_alone = {"prelude_layers": 0, "coda_layers": 0}
    options = {"model": core_alone, "depth": depth, "threads": 2, "steps": 6, "evaluate_every": 2}
    start(plain, text, compile="never", **options).fit()
    torch.compiler.reset()
    model = start(whole, text, compile="always", **options).fit()
    assert all(type(layer).forward == layer.forward.__func__ for layer in model.core.layers)
    assert not torch.are_deterministic_algorithms_enabled()
    trainer = start(cut, text, compile="always", **options)

    def stop(line):
        trainer._stop = trainer.step == 3

    with pytest.raises(Stopped):
        trainer.fit(stop)
    if depth != "fixed":
        torch.compiler.reset()  # as in another process, which meets other sizes first
    again = open_run(cut)
    again.fit()
    assert again.compiled
    assert same(whole, cut)
    losses = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # rounding grows by six steps
    torch.set_num_threads(1)


def test_compiling_is_chosen_by_the_length_of_a_training(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(compiled, "_problem", lambda: None)
    assert compiled.compiling_pays("auto", 10 * compiled.LEAST_FLOPS, cpu)
    assert not compiled.compiling_pays("auto", compiled.LEAST_FLOPS / 10, cpu)
    assert not compiled.compiling_pays("auto", 10 * compiled.LEAST_FLOPS, cuda)
    assert compiled.compiling_pays("always", 0.0, cuda)
    assert not compiled.compiling_pays("never", 10 * compiled.LEAST_FLOPS, cpu)


def test_without_a_compiler_a_training_is_not_compiled(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(compiled, "_problem", lambda: "no C++ compiler")
    assert not compiled.compiling_pays("auto", 10 * compiled.LEAST_FLOPS, cpu)
    with pytest.raises(ConfigError, match=r"compile='always'.*no C\+\+ compiler"):
        compiled.compiling_pays("always", 0.0, cpu)


def test_a_run_from_before_a_field_came_goes_on(tmp_path, text, monkeypatch):
    start(tmp_path, text, steps=3).fit()
    path, load = tmp_path / "settings.json", checkpoint.load
    settings = json.loads(path.read_text())
    del settings["model"]["router_loops"], settings["train"]["compile"]
    path.write_text(json.dumps(settings))

    def older(folder):
        found = load(folder)
        for part, name in (("model", "router_loops"), ("train", "compile")):
            del found.state[part][name]
        del found.state["compiled"]
        return found

    monkeypatch.setattr(checkpoint, "load", older)
    assert open_run(tmp_path).step == 3


def test_a_run_without_a_checkpoint_yet_starts_over(tmp_path, text):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(whole, text).fit()
    start(cut, text)
    trainer = open_run(cut)
    assert trainer.step == 0
    trainer.fit()
    assert same(whole, cut)


STEADY = OptimizerConfig(warmup_steps=1, decay_share=0.5)


@pytest.mark.parametrize(("first", "then"), [(16, 10), (10, 16)])
def test_a_run_given_other_steps_before_its_decay_is_one_started_with_them(
    tmp_path, text, first, then
):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    start(whole, text, steps=then, optimizer=STEADY).fit()
    trainer = start(changed, text, steps=first, optimizer=STEADY)

    def stop(line):
        trainer._stop = trainer.step == 4

    with pytest.raises(Stopped):
        trainer.fit(stop)
    open_run(changed, steps=then).fit()
    assert same(whole, changed)
    assert Settings.load(changed).train.steps == then


def test_steps_cannot_change_once_the_learning_rate_decays(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, steps=6, optimizer=STEADY).fit()
    sentence = r"until=12 must be left out at step 6: the learning rate decays from step 3 on"
    with pytest.raises(CheckpointError, match=sentence):
        open_run(run, steps=12)
    assert Settings.load(run).train.steps == 6


def test_other_steps_that_would_be_compiled_otherwise_are_told(tmp_path, text, monkeypatch):
    run = tmp_path / "run"
    trainer = start(run, text, optimizer=STEADY)
    trainer._stop = True
    with pytest.raises(Stopped):
        trainer.fit()
    open_run(run, steps=9)
    monkeypatch.setattr("openmythos.training.trainer.compiling_pays", lambda *_: True)
    sentence = "until=10: layers stay not compiled, and those of a run started with this number"
    with pytest.warns(UserWarning, match=sentence):
        open_run(run, steps=10)


def test_what_the_machine_needs_can_be_given_anew(tmp_path, text):
    run = stopped(tmp_path / "run", text)
    quiet = OfMachine(checkpoint_activations=True, save_every=1, keep=5)
    trainer = open_run(run, of_machine=quiet)  # a warning would be an error
    assert trainer.model.core.checkpointing
    with pytest.warns(UserWarning, match="accumulation=2 for 1, threads=2 for 1: the run goes on"):
        trainer = open_run(run, of_machine=OfMachine(accumulation=2, threads=2))
    assert trainer.threads == 2
    kept = Settings.load(run).train
    assert quiet.applied(kept) == kept
    assert (kept.accumulation, kept.threads) == (2, 2)
    trainer.fit()
    assert trainer.step == 8
    open_run(run)
    before = (run / "settings.json").read_bytes()
    with pytest.raises(ConfigError, match="accumulation=3 must divide batch_size=4"):
        open_run(run, of_machine=OfMachine(accumulation=3))
    assert (run / "settings.json").read_bytes() == before
    torch.set_num_threads(1)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_goes_on_with_its_tokens_where_its_text_is_gone(tmp_path, text, begun):
    whole, cut, own = tmp_path / "whole", tmp_path / "cut", tmp_path / "own.txt"
    shutil.copy(text, own)
    start(whole, own, steps=3).fit()
    if begun:
        stopped(cut, own, steps=3)
    else:
        start(cut, own, steps=3)
    own.unlink()
    open_run(cut).fit()
    assert same(whole, cut)
    (cut / "validation.bin").unlink()
    with pytest.raises(DataError, match="must exist"):
        open_run(cut)
    shutil.copy(text, own)
    open_run(cut)
    assert (cut / "validation.bin").is_file()


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "Free some space"), (errno.EACCES, "Mend that and resume")],
)
def test_room_is_asked_for_only_where_there_is_none(tmp_path, text, monkeypatch, number, advice):
    trainer = start(tmp_path / "run", text)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("openmythos.training.checkpoint._put_in_place", refuse)
    with pytest.raises(CheckpointError, match=f"{os.strerror(number)}.*{advice}.*are intact"):
        trainer.save()


KILLED = """
import sys
from pathlib import Path
from openmythos.training.start import open_run
open_run(Path(sys.argv[1])).fit(lambda line: print(line["step"], flush=True))
"""


def kill_and_resume(run, waits):
    """Run in a process that is killed after each of `waits` seconds, then to the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(run)]
    for wait in waits:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        process.stdout.readline()  # the first step is done
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment, timeout=100)


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path, text):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"steps": 16, "save_every": 1}
    start(cut, text, **options)
    kill_and_resume(cut, [0.03])
    start(whole, text, **options).fit()
    assert same(whole, cut)


@pytest.mark.soak
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_killed_at_many_moments_end_with_the_same_bits(tmp_path, text, threads):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"steps": 200, "save_every": 1, "threads": threads, "gate_steps": 2}
    start(cut, text, **options)
    kill_and_resume(cut, [0.0, 0.011, 0.05, 0.13, 0.3, 0.02, 0.17, 0.5])
    start(whole, text, **options).fit()
    assert same(whole, cut)


def test_ctrl_c_saves_before_it_ends(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, steps=500, save_every=400, evaluate_every=400)
    process = subprocess.Popen(
        [sys.executable, "-m", "openmythos", "train", "--resume", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (run / METRICS).exists() or not (run / METRICS).read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in output
    saved = checkpoint.load(checkpoint.latest(run))
    assert saved.step == max(line["step"] for line in metrics(run)) + 1


def test_a_signal_after_the_last_step_ends_at_once_and_a_resume_finishes(
    tmp_path, text, monkeypatch
):
    run = tmp_path / "run"
    trainer = start(run, text, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_evaluate", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            trainer.fit()
    assert not (run / "model").exists()
    again = open_run(run)
    assert again.step == 3
    again.fit()
    assert (run / "model" / "config.json").is_file()


def test_a_product_that_had_to_wait_is_not_taken_for_a_hopeless_one(monkeypatch):
    seconds = iter([0.5, 0.3, 0.0001, *[0.001] * 11])
    monkeypatch.setattr(machine, "seconds_of", lambda _call, _device: next(seconds))
    fast = machine.matmul_peak(torch.float32, torch.device("cpu"))
    assert fast == pytest.approx(2 * 512**3 / 0.001)
    monkeypatch.setattr(machine, "seconds_of", lambda _call, _device: 0.05)
    slow = machine.matmul_peak(torch.float32, torch.device("cpu"))
    assert slow == pytest.approx(2 * 64 * 512**2 / 0.05)


def test_the_metrics_of_a_run_that_diverged_are_json_all_the_same(tmp_path, text):
    run = tmp_path / "run"
    trainer = start(run, text, steps=2)
    trainer.model.core.layers[0].feed_forward.w_out.register_hook(lambda g: g * math.inf)
    with (
        pytest.warns(UserWarning, match="was skipped"),
        pytest.raises(ConfigError, match="must have a finite gradient"),
    ):
        trainer.fit()

    def refuse(constant):
        raise AssertionError(constant)

    lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
    norms = [json.loads(x, parse_constant=refuse).get("gradient_norm", 0) for x in lines]
    assert norms[:2] == [None, None]
    assert [math.isnan(x["gradient_norm"]) for x in metrics(run) if "loss" in x] == [True, True]


def test_the_rates_that_are_told_are_those_that_were_applied(tmp_path, text):
    trainer = start(tmp_path / "run", text)
    line = trainer.one_step()
    applied = {type(o).__name__: o.param_groups[0]["lr"] for o in trainer.optimizers.optimizers}
    assert applied == {"Muon": line["muon_lr"], "AdamW": line["adam_lr"]}


def test_a_step_by_itself_is_computed_as_those_of_a_whole_run(tmp_path, text):
    alone = start(tmp_path / "alone", text, precision="bf16")
    losses = [alone.one_step()["loss"] for _ in range(2)]
    start(tmp_path / "run", text, precision="bf16", steps=8).fit()
    assert losses == [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line][:2]


def test_a_compiled_run_says_what_it_lacks_where_nothing_compiles(tmp_path, text, monkeypatch):
    run = tmp_path / "run"
    trainer = start(run, text, save_every=1)
    trainer.machine, trainer.compiled = machine.Machine("fp32", "a test", 1.0), True
    trainer.save()
    monkeypatch.setattr(compiled, "_problem", lambda: "no C++ compiler")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler; install g"):
        open_run(run).fit()


def test_a_model_that_learns_its_exits_is_measured_with_them(tmp_path, text):
    run = tmp_path / "run"
    trainer = start(run, text, {"learned_act": True}, evaluate_every=4)
    trainer.fit()
    asked = (trainer.model, trainer.validation, trainer.tokenizer.token_bytes)
    wanted = evaluate_halting(*asked, halting="act", budget=2, reading=Reading.of(16))
    last = next(line for line in metrics(run) if "final" in line)
    assert last["act"]["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    assert checkpoint.best_score(run) in [
        line["act"]["bits_per_byte"] for line in metrics(run) if "act" in line
    ]


def test_training_adapters_changes_the_adapters_alone(tmp_path, text):
    start(tmp_path / "base", text, steps=2).fit()
    base = tmp_path / "base" / "model"
    shape = MythosConfig(**SHAPE).replace(lora_rank=2)
    train = TrainConfig(
        steps=3,
        batch_size=4,
        length=16,
        **FAST,
        train="adapters",
        optimizer=OptimizerConfig(warmup_steps=0),
    )
    trainer = start_run(tmp_path / "tuned", shape, train, source=source(text), start_from=base)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    trainer.fit()
    changed = {n for n, t in trainer.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(".lora." in name for name in changed)
    assert set(load_file(base / "model.safetensors")) < set(weights(tmp_path / "tuned"))


def adapted(run, base, text, **adapters):
    train = TrainConfig(steps=1, batch_size=4, length=16, **FAST, train="adapters")
    shape = MythosConfig(**SHAPE).replace(**adapters)
    return start_run(run, shape, train, source=source(text), start_from=base)


def test_adapters_keep_the_loops_they_were_trained_with(tmp_path, text):
    start(tmp_path / "base", text, model={"mean_loops": 3}, steps=1).fit()
    first, second = tmp_path / "first", tmp_path / "second"
    trainer = adapted(first, tmp_path / "base" / "model", text, lora_rank=2)
    assert trainer.model_config.lora_loops == 3  # of the model, not of the flags' preset
    adapted(second, tmp_path / "base" / "model", text, lora_rank=2, lora_loops=5).fit()
    again = adapted(tmp_path / "again", second / "model", text, lora_rank=2)
    assert again.model_config.lora_loops == 5
    own = {"lora_rank": 2, "lora_loops": 5}
    for name, other in {"lora_loops": 4, "lora_rank": 3}.items():
        with pytest.raises(ConfigError, match=rf"{name}={other} must be {own[name]}, as in start"):
            adapted(tmp_path / "no", second / "model", text, **{**own, name: other})
    assert not (tmp_path / "no").exists()


def test_a_run_that_lost_the_weights_it_started_from_is_not_gone_on_with(
    tmp_path, text, monkeypatch
):
    base, run = tmp_path / "base", tmp_path / "run"
    start(base, text, steps=1).fit()
    run.mkdir()

    def full(*_):
        raise CheckpointError("no space is left")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", full)
        with pytest.raises(CheckpointError, match="no space"):
            adapted(run, base / "model", text, lora_rank=2)
    with pytest.raises(CheckpointError, match="it is not a training run"):
        open_run(run)
    adapted(run, base / "model", text, lora_rank=2)  # what was left is in nobody's way
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="as it began with the weights of .*model: start it"):
        open_run(run)


def test_what_loops_cost_is_no_part_of_the_loss_that_is_told(tmp_path, text):
    model = {"learned_act": True}
    free = start(tmp_path / "free", text, model, ponder_cost=0.0).one_step()
    dear = start(tmp_path / "dear", text, model, ponder_cost=1.0).one_step()
    assert dear["loss"] == pytest.approx(free["loss"], rel=1e-5)
    assert dear["gradient_norm"] != free["gradient_norm"]


def test_training_balances_the_experts_and_act_learns_its_exit(tmp_path, text):
    trainer = start(tmp_path / "run", text, model={"learned_act": True}, steps=6)
    exit_before = trainer.model.core.act.weight.clone()
    trainer.fit()
    assert int(trainer.model.core.layers[0].feed_forward.router.balance.abs().max()) > 0
    assert not torch.equal(trainer.model.core.act.weight, exit_before)


def test_a_trained_gate_changes_nothing_but_the_gate(tmp_path, text):
    trainer = start(tmp_path / "run", text, steps=4, gate_steps=5)
    trainer.fit()
    saved = checkpoint.load(checkpoint.latest(tmp_path / "run")).tensors["model"]
    changed = {n for n, t in weights(tmp_path / "run").items() if not torch.equal(t, saved[n])}
    parts = ("w_in", "bias_in", "weight", "bias", "threshold")
    assert changed <= {f"core.gate.{part}" for part in parts}
    assert {"core.gate.w_in", "core.gate.weight"} <= changed


def test_a_plain_transformer_is_the_same_code(tmp_path, text):
    plain = {
        "injection": "none",
        "h0": "e",
        "core_output": "none",
        "mean_loops": 1,
        "experts": 0,
        "prelude_layers": 0,
        "core_layers": 3,
        "coda_layers": 0,
    }
    start(tmp_path / "run", text, model=plain).fit()
    assert list(next(x for x in metrics(tmp_path / "run") if "final" in x)["validation"]) == ["1"]


def test_activation_checkpointing_gives_the_same_losses(tmp_path, text):
    for name, on in (("with", True), ("without", False)):
        start(tmp_path / name, text, steps=3, checkpoint_activations=on).fit()
    first, second = (
        [x["loss"] for x in metrics(tmp_path / name) if "loss" in x] for name in ("with", "without")
    )
    assert_close(torch.tensor(first), torch.tensor(second), atol=1e-6, rtol=0)


def test_resuming_with_another_tokenizer_is_refused(tmp_path, text):
    run = tmp_path / "run"
    start(run, text).fit()
    before = {name: (run / name).read_bytes() for name in ("train.bin", "validation.bin")}
    Tokenizer.train(["another text altogether"], vocab_size=300).save(run / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer=.* must be"):
        open_run(run)
    assert {name: (run / name).read_bytes() for name in before} == before
    with pytest.raises(CheckpointError, match="must be the one that .* was trained with"):
        load_from_run(run)


def test_resuming_with_other_settings_is_refused(tmp_path, text):
    run = tmp_path / "run"
    start(run, text).fit()
    settings = Settings.load(run)
    dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=99)).save(run)
    with pytest.raises(CheckpointError, match="steps=99 must be 8"):
        open_run(run)


def test_resuming_with_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, text):
    run = tmp_path / "run"
    start(run, text).fit()
    newest = checkpoint.latest(run)
    (newest / "tensors.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="passed over"):
        trainer = open_run(run)
    assert 0 < trainer.step < 8


def test_a_length_that_does_not_fit_is_told_before_the_amount_of_text(tmp_path):
    (tmp_path / "short.txt").write_text("too little text")
    with pytest.raises(ConfigError, match="length=65 must be at most the model's max_length=64"):
        start(tmp_path / "run", tmp_path / "short.txt", length=65)
    with pytest.raises(DataError, match="must have at least 64 tokens, which is one batch"):
        start(tmp_path / "run", tmp_path / "short.txt", length=16)


def test_what_is_missing_is_told_before_a_folder_is_made(tmp_path, text, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs the package: pip install tensorboard$"):
        start(tmp_path / "run", text, log="tensorboard")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="must be a folder, and is a file"):
        start(tmp_path / "file", text)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path, text):
    run = tmp_path / "run"
    start(run, text).fit()
    lines = (run / METRICS).read_bytes()
    for folder in run.glob("step-*"):
        (folder / "tensors.safetensors").write_bytes(b"torn")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match=r"delete its step-\* folders to begin anew"),
    ):
        open_run(run)
    assert (run / METRICS).read_bytes() == lines


def test_finishing_again_writes_its_last_lines_once(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, gate_steps=1).fit()
    open_run(run).fit()
    lines = list(metrics(run))
    assert sum("final" in line for line in lines) == sum("gate" in line for line in lines) == 1
    measured = [line["step"] for line in lines if "validation" in line and "final" not in line]
    assert measured == [3, 7]


def test_the_best_measurement_is_kept_whenever_it_is_made(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, steps=13, save_every=12, evaluate_every=3, keep=1).fit()
    scores = {
        line["step"]: line["validation"]["2"]
        for line in metrics(run)
        if "validation" in line and "final" not in line
    }
    assert checkpoint.best_score(run) <= min(scores.values()) + 1e-9


@pytest.mark.parametrize(("finish", "step"), [("last", 9), ("best", 3)])
def test_the_finished_model_is_the_last_or_the_best(tmp_path, text, monkeypatch, finish, step):
    scores = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(Measured, "as_trained", lambda *_: next(scores))
    run = tmp_path / "run"
    start(run, text, steps=9, save_every=9, evaluate_every=3, finish=finish).fit()
    last = next(line for line in metrics(run) if "final" in line)
    assert last["step"] == step - 1
    written = load_file(run / "model" / "model.safetensors")
    kept = checkpoint.load(run / f"step-{step:08d}").tensors["model"]
    assert_close(written["embed.weight"], kept["embed.weight"], rtol=0, atol=0)
    again = openmythos.load(run / f"step-{step:08d}").model  # a checkpoint is a model too
    assert_close(again.embed.weight.detach(), kept["embed.weight"], rtol=0, atol=0)
    better = _better(run)
    assert better is not None
    assert better.startswith("step 3 measured better, 1.0000 bits per byte against 3.0000")


def test_of_the_best_checkpoints_the_first_whole_one_is_taken(tmp_path, text, monkeypatch):
    scores = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(Measured, "as_trained", lambda *_: next(scores))
    run = tmp_path / "run"
    trainer = start(run, text, steps=9, save_every=3, evaluate_every=3, finish="best", keep=9)
    save = checkpoint.save

    def damaging(folder, step, *rest, **more):
        save(folder, step, *rest, **more)
        if step == 3:
            (run / "step-00000003" / "tensors.safetensors").write_bytes(b"torn")

    monkeypatch.setattr(checkpoint, "save", damaging)
    with pytest.warns(UserWarning, match="passed over"):
        trainer.fit()
    last = next(line for line in metrics(run) if "final" in line)
    assert last["step"] == 5


def test_while_a_finished_run_goes_on_its_earlier_model_is_not_the_finished_one(tmp_path, text):
    run = tmp_path / "run"
    start(run, text, optimizer=OptimizerConfig(decay_share=0), steps=4).fit()
    assert finished(run)
    trainer = open_run(run, steps=8)
    trainer.prepare()
    trainer._stop = True
    with pytest.raises(Stopped):
        trainer.fit()
    assert not finished(run)
    trainer = open_run(run)
    trainer.fit()
    assert finished(run)
    assert_close(openmythos.load(run).model.state_dict(), trainer.model.state_dict())


def test_no_better_step_is_named_where_the_last_is_as_good(tmp_path):
    assert _better(tmp_path) is None
    for step, bits in ((1, 1.195), (2, 1.2), (3, None)):
        checkpoint.save(tmp_path, step, {"model": {}}, {}, keep=9, bits_per_byte=bits)
        assert _better(tmp_path) is None


def test_precision_is_decided_by_a_run_that_has_not_begun(tmp_path, text):
    start(tmp_path / "first", text).fit()
    model = tmp_path / "first" / "model"
    train = TrainConfig(steps=4, batch_size=4, length=16, **{**FAST, "precision": "bf16"})
    config = MythosConfig(**SHAPE)
    start_run(tmp_path / "run", config, train, source=source(text), start_from=model)
    trainer = open_run(tmp_path / "run")
    assert trainer.machine is None
    trainer.prepare()
    assert trainer.machine.precision == "bf16"


def test_another_build_of_torch_is_told(tmp_path, text, monkeypatch):
    start(tmp_path / "run", text).fit()
    real = checkpoint.load

    def older(path):
        found = real(path)
        return dataclasses.replace(found, state={**found.state, "torch": "1.0"})

    monkeypatch.setattr(checkpoint, "load", older)
    with pytest.warns(UserWarning, match=r"was written with torch 1.0, and this is .*: the run"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    "files", [(), ("model.safetensors",), ("model.safetensors", "config.json")]
)
def test_a_model_that_a_kill_cut_short_gives_way_to_the_last_checkpoint(tmp_path, text, files):
    run = tmp_path / "run"
    start(run, text).fit()
    expected = openmythos.load(run).generate("The", max_new_tokens=5, seed=1)
    for path in (run / "model").iterdir():
        if path.name not in files:
            path.unlink()
    assert openmythos.load(run).generate("The", max_new_tokens=5, seed=1) == expected


def test_a_resumed_run_hides_what_tensorboard_was_told_of_its_steps(tmp_path, text):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    trainer = start(run, text, steps=6, log="tensorboard")

    def interrupt(line):
        if line["step"] == 4:
            raise KeyboardInterrupt  # after the checkpoint of step 3

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(interrupt)
    time.sleep(1.1)  # its files are told apart, and put in order, by the second
    open_run(run).fit()
    told = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in told.Scalars("loss")] == list(range(6))


def test_a_model_larger_than_the_memory_is_refused_where_that_is_known(monkeypatch):
    config = MythosConfig(**SHAPE)
    size = 4 * sum(parameter.numel() for parameter in OpenMythos(config).parameters())
    for known in (size, None):
        monkeypatch.setattr(memory, "physical_memory", lambda known=known: known)
        memory.check_fits(config)
    monkeypatch.setattr(memory, "physical_memory", lambda: size - 1)
    with pytest.raises(ConfigError, match=r"take 0.0 GB in fp32, must fit into this machine's"):
        memory.check_fits(config)


def test_a_line_of_metrics_becomes_numbers_by_path():
    line = {"step": 3, "loss": 1.5, "validation": {"4": 2.0}, "load": [[0.25, 0.75]]}
    numbers = {"loss": 1.5, "validation/4": 2.0, "load/0/0": 0.25, "load/0/1": 0.75}
    assert dict(scalars(line)) == numbers
    # What is measured at the end is of all held-out text, and no point of the curves before.
    apart = {f"final/{path}": number for path, number in numbers.items()}
    assert dict(scalars(line | {"final": True})) == apart


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, text):
    start(tmp_path / "run", text)
    with pytest.raises(ConfigError, match="holds a run already"):
        start(tmp_path / "run", text)


def test_text_shorter_than_a_batch_is_refused_and_leaves_nothing(tmp_path, text):
    with pytest.raises(DataError, match="one batch"):
        start(tmp_path / "run", text, batch_size=1000, length=64)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"steps": 0}, "steps=0 must be 1 or more"),
        ({"accumulation": 3}, "accumulation=3 must divide batch_size=16"),
        ({"backprop_loops": 0}, "backprop_loops=0 must be 1 or more"),
        ({"steps": 2.5}, "steps=2.5 must be an integer"),
        ({"batch_size": True}, "batch_size=True must be an integer"),
        ({"log": "wandb"}, "log='wandb' must be one of none, tensorboard"),
        ({"ponder_cost": math.nan}, "ponder_cost=nan must be a finite number"),
    ],
)
def test_settings_out_of_range_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainConfig(**fields)


def test_settings_survive_their_file(tmp_path):
    model, train = MythosConfig(**SHAPE), TrainConfig(steps=7)
    settings = Settings(model, train, Source(corpus="embedded"), "some/model")
    settings.save(tmp_path)
    assert Settings.load(tmp_path) == settings
    (tmp_path / "settings.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(CheckpointError, match="must be a whole settings file"):
        Settings.load(tmp_path)


def test_every_parameter_of_a_model_has_one_optimizer():
    model = OpenMythos(MythosConfig(**SHAPE).replace(attention="mla", q_latent=8, lora_rank=2))
    from openmythos.training.optimizer import group_of

    muon = {n for n, p in model.named_parameters() if group_of(n, p).optimizer == "muon"}
    layer = "core.layers.0"
    assert {n for n in muon if n.startswith(layer)} == {
        f"{layer}.attention.{name}.weight" for name in ("q_down", "q_up", "kv_down", "kv_up", "out")
    } | {
        f"{layer}.feed_forward.{name}"
        for name in ("w_in", "w_out", "shared.w_in.weight", "shared.w_out.weight")
    }


def test_splits_of_fused_matrices_add_up():
    for attention in ("gqa", "mla"):
        model = OpenMythos(MythosConfig(**SHAPE).replace(attention=attention))
        parameters = dict(model.named_parameters())
        for name, (axis, sizes) in model.fused_splits().items():
            assert parameters[name].shape[axis] == sum(sizes), name


def test_run_is_a_path(tmp_path):
    with pytest.raises(CheckpointError, match="must hold settings.json"):
        open_run(Path(tmp_path))
