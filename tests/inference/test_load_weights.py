"""A model loaded with the weights a caller asks for, whatever its file holds."""

import jaxtyping
import pytest
import torch
from tiny import some_ids, tiny

import openmythos
from openmythos.errors import InputError
from openmythos.inference import language_model
from openmythos.inference.language_model import LanguageModel
from openmythos.model.quantised import Int8Weight
from openmythos.training.machine import Machine
from openmythos.training.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and the cat ate the rat " * 20
OF_FILES = [None, "fp32", "bf16", "int8"]


@pytest.fixture(autouse=True)
def _do_not_check_shapes():
    # The checks take more than half of the time, and test_transformer.py has them.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model's folder for each kind of file."""
    tokenizer, found = Tokenizer.train([TEXT], vocab_size=280), {}
    lm = LanguageModel(tiny(vocab_size=tokenizer.vocab_size, hidden_size=32), tokenizer)
    for weights in OF_FILES:
        found[weights] = tmp_path_factory.mktemp("model")
        lm.model.save_pretrained(found[weights], tokenizer, weights)
    return found


@pytest.mark.parametrize("stored", OF_FILES)
@pytest.mark.parametrize("weights", [None, "fp32", "bf16", "int8"])
def test_any_file_loads_into_any_weights_and_writes(folders, stored, weights):
    lm = openmythos.load(folders[stored], weights=weights)
    weight = lm.model.embed.weight
    assert weight.dtype == (torch.bfloat16 if weights == "bf16" else torch.float32)
    assert isinstance(weight, Int8Weight) == (weights == "int8")
    assert lm.model.core.injection.decay.step.dtype == torch.float32
    options = {"max_new_tokens": 3, "seed": 3, "loops": 3, "halting": "delta"}
    assert lm.generate("the cat", **options) == lm.generate("the cat", **options)


def test_int8_weights_write_what_the_int8_file_means(folders, monkeypatch):
    monkeypatch.setattr("openmythos.model.quantised._int8_mm", None)
    packed = openmythos.load(folders["int8"], weights="int8").model
    wide = openmythos.load(folders["int8"]).model
    with torch.no_grad():
        error = (packed(some_ids()).logits - wide(some_ids()).logits).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_auto_takes_bf16_where_this_machine_is_quicker_with_it(folders, monkeypatch, faster):
    asked = []

    def measure(precision, device):
        asked.append((precision, device.type))
        return Machine(faster, "measured", 1.0)

    monkeypatch.setattr(language_model, "measure", measure)
    lm = openmythos.load(folders["int8"], weights="auto")
    assert asked == [("auto", "cpu")]
    assert lm.model.embed.weight.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[faster]


def test_weights_that_do_not_exist_are_refused_before_the_folder_is_read(tmp_path):
    with pytest.raises(InputError, match="weights='int4' must be one of fp32, bf16, int8, auto"):
        openmythos.load(tmp_path / "nothing", weights="int4")
