"""A model loaded with the weights a caller asks for, whatever its file holds."""

import jaxtyping
import pytest
import torch
from tiny import some_ids, tiny

import openmythos
from openmythos.errors import InputError
from openmythos.inference import precision
from openmythos.inference.language_model import LanguageModel
from openmythos.model.int8 import Int8Weight
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
    monkeypatch.setattr("openmythos.model.int8._int8_mm", None)
    packed = openmythos.load(folders["int8"], weights="int8").model
    wide = openmythos.load(folders["int8"]).model
    with torch.no_grad():
        error = (packed(some_ids()).logits - wide(some_ids()).logits).abs().max()
    assert error < 1e-4


@pytest.mark.parametrize(
    ("products", "writes", "dtype"),
    [("fp32", None, torch.float32), ("bf16", 0.5, torch.bfloat16), ("bf16", 2.0, torch.float32)],
)
def test_auto_takes_bf16_where_this_model_is_quicker_with_it(
    folders, monkeypatch, products, writes, dtype
):
    timed = []

    def seconds(model):
        timed.append(model.embed.weight.dtype)
        assert writes is not None, "needless where no product is quicker"
        return writes if timed[-1] == torch.bfloat16 else 1.0

    monkeypatch.setattr(precision, "measure", lambda *_: Machine(products, "measured", 1.0))
    monkeypatch.setattr(precision, "seconds", seconds)
    lm = openmythos.load(folders["int8"], weights="auto")
    assert lm.model.embed.weight.dtype == dtype
    assert timed == ([] if writes is None else [torch.float32, torch.bfloat16])


def test_the_time_to_read_and_write_is_measured_within_a_models_length():
    assert 0 < precision.seconds(tiny(max_length=5)) < 60


def test_weights_that_do_not_exist_are_refused_before_the_folder_is_read(tmp_path):
    with pytest.raises(InputError, match="weights='int4' must be one of fp32, bf16, int8, auto"):
        openmythos.load(tmp_path / "nothing", weights="int4")
