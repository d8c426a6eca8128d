"""Runs of a few steps, for the tests of training."""

import pytest
import torch
from safetensors.torch import load_file

from openmythos import MythosConfig
from openmythos.training.settings import Source, TrainConfig
from openmythos.training.start import start_run
from openmythos.training.trainer import Stopped

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "max_length": 64,
    "num_heads": 4,
    "kv_heads": 2,
    "prelude_layers": 1,
    "core_layers": 1,
    "coda_layers": 1,
    "mean_loops": 2,
    "experts": 4,
    "experts_per_token": 2,
    "expert_size": 16,
}
FAST = {"gate_steps": 0, "evaluate_tokens": 64, "precision": "fp32", "threads": 1}


def source(text):
    return Source(text=text, held_out=0.1)


def start(run, text, model=None, **train):
    settings = {"steps": 8, "batch_size": 4, "length": 16, "save_every": 3, "evaluate_every": 4}
    train = TrainConfig(**{**settings, **FAST, **train})
    return start_run(run, MythosConfig(**{**SHAPE, **(model or {})}), train, source=source(text))


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def same(run, other):
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def stopped(run, text, **train):
    """A run with a checkpoint of its first step."""
    trainer = start(run, text, **train)
    trainer._stop = True
    with pytest.raises(Stopped):
        trainer.fit()
    return run
