"""One folder for both: what one side writes, the other reads."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_model, save_model
from tiny import some_ids, tiny
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import openmythos
from openmythos import OpenMythos
from openmythos.errors import CheckpointError, InputError
from openmythos.huggingface import OpenMythosConfig, OpenMythosForCausalLM
from openmythos.inference.shipped import find_model
from openmythos.training.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and the dog sat on the log"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny(vocab_size=270).save_pretrained(path, Tokenizer.train([TEXT], vocab_size=270))
    return path


@pytest.mark.parametrize("weights", [None, "fp32", "bf16", "int8"])
@pytest.mark.parametrize("tie_head", [True, False])
def test_a_folder_of_ours_is_read_with_any_weights(weights, tie_head, tmp_path):
    own = tiny(tie_head=tie_head)
    own.save_pretrained(tmp_path, weights=weights)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = OpenMythos.from_pretrained(tmp_path)
    assert isinstance(read, OpenMythosForCausalLM)
    assert not read.training
    assert torch.equal(read(some_ids()).logits, expected(some_ids()).logits)
    assert (read.get_output_embeddings().weight is read.get_input_embeddings().weight) == tie_head


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_saved_model_is_read_by_ours(weights, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = model.model.config.replace(max_length=128)
    model.save_pretrained(tmp_path, weights=weights)
    assert model.model.config.replace(max_length=128) == before
    assert model.model.config.replace(mean_loops=5).lora_loops == 5  # it follows, as nobody set it
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    lm = openmythos.load(tmp_path)
    wanted = openmythos.load(folder).model
    if weights is None:
        assert torch.equal(lm.model(some_ids()).logits, wanted(some_ids()).logits)
    else:
        assert_close(lm.model(some_ids()).logits, wanted(some_ids()).logits, atol=0.2, rtol=0)
    assert lm.prompt_ids("the cat") == openmythos.load(folder).prompt_ids("the cat")


def test_tensors_that_were_gathered_elsewhere_are_written(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=gathered)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path, state_dict=gathered, save_function=torch.save)  # as accelerate
    read = OpenMythos.from_pretrained(tmp_path).state_dict()
    for name, tensor in read.items():
        assert torch.equal(tensor, gathered[f"model.{name}"]), name


def test_how_to_generate_is_kept(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = Tokenizer.load(folder).end_id
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == end
    model.generation_config = GenerationConfig(eos_token_id=7, temperature=0.5, do_sample=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (again.eos_token_id, again.temperature) == (7, 0.5)
    unknown = OpenMythosForCausalLM.of(OpenMythos.from_pretrained(folder))
    assert unknown.generation_config.eos_token_id is None
    unknown.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, use_cache=False)
    assert read.generation_config.eos_token_id == read.config.pad_token_id == end
    assert read.generation_config.use_cache is False
    own = GenerationConfig(max_new_tokens=3)
    given = OpenMythosForCausalLM.from_pretrained(folder, generation_config=own)
    assert given.generation_config.max_new_tokens == 3


def test_a_shipped_model_writes_its_text():
    lm = openmythos.load("openmythos-lm")
    expected = lm.generate("Fellow citizens", max_new_tokens=5, temperature=0)
    writer = pipeline("text-generation", model=str(find_model("openmythos-lm")))
    (made,) = writer("Fellow citizens", max_new_tokens=5, do_sample=False)
    assert made["generated_text"] == f"Fellow citizens{expected}"
    by_name = OpenMythosForCausalLM.from_pretrained("openmythos-lm")
    assert by_name.num_parameters() == sum(p.numel() for p in lm.model.parameters())


def test_the_mean_of_loops_may_be_another(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, mean_loops=5, trust_remote_code=False)
    assert (model(some_ids()).loops == 5).all()
    config = OpenMythosConfig.of(model.model.config)
    config.mean_loops = 2
    again = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert (again(some_ids()).loops == 2).all()
    again.config.mean_loops = 4
    again.save_pretrained(tmp_path)
    assert openmythos.load(folder).model.config.mean_loops == 3
    assert OpenMythos.from_pretrained(tmp_path).config.mean_loops == 4
    again.config.hidden_size = 32
    with pytest.raises(InputError, match="hidden_size=32 must be 24"):
        again.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_weights_are_cast(dtype, folder):
    assert AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).dtype == torch.bfloat16
    model = OpenMythosForCausalLM.from_pretrained(folder, torch_dtype=dtype, device_map="cpu")
    assert model(some_ids()).logits.dtype == torch.bfloat16
    assert OpenMythosForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float32


def test_a_new_model_has_the_weights_of_its_seed(folder):
    config = OpenMythosConfig.of(tiny(spread=0).config)
    made = AutoModelForCausalLM.from_config(config)
    for name, tensor in tiny(spread=0).state_dict().items():
        assert torch.equal(made.state_dict()[f"model.{name}"], tensor), name
    narrow = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in tiny(spread=0).bfloat16().state_dict().items():
        assert torch.equal(narrow.state_dict()[f"model.{name}"], tensor), name
        assert narrow.state_dict()[f"model.{name}"].dtype == tensor.dtype


@pytest.mark.parametrize("tie_head", [True, False])
def test_a_state_is_written_and_read_by_safetensors(tie_head, tmp_path):
    model = OpenMythosForCausalLM.of(tiny(tie_head=tie_head))
    save_model(model, str(tmp_path / "state.safetensors"))
    other = OpenMythosForCausalLM.of(tiny(tie_head=tie_head, seed=1))
    load_model(other, str(tmp_path / "state.safetensors"))
    assert torch.equal(other(some_ids()).logits, model(some_ids()).logits)
    assert (other.model.head.weight is other.model.embed.weight) == tie_head
    plain = {name.removeprefix("model."): x for name, x in model.state_dict().items()}
    other = OpenMythosForCausalLM.of(tiny(tie_head=tie_head, seed=1))
    other.load_state_dict(plain)
    assert torch.equal(other(some_ids()).logits, model(some_ids()).logits)


def test_a_copy_stands_by_itself(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    copied = copy.deepcopy(model)
    before = copied(some_ids()).logits.detach()
    with torch.no_grad():
        model.model.embed.weight.zero_()
    assert torch.equal(copied(some_ids()).logits, before)
    copied.tie_weights()
    assert copied.model.head.weight is copied.model.embed.weight


REFUSED = {
    "a shape": ({"hidden_size": 32}, "hidden_size=32 must be 24, as the weights were trained"),
    "a typo": ({"dvice": "cpu"}, "dvice='cpu' must be left out: loading takes no such argument"),
    "several devices": ({"device_map": {"a": 0, "b": 1}}, "must be one device"),
    "a way to share": ({"device_map": "balanced"}, "device_map='balanced' must be one device"),
    "attention": ({"attn_implementation": "eager"}, "attn_implementation='eager' must be 'sdpa'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused(folder, name):
    given, sentence = REFUSED[name]
    for kind in (OpenMythosForCausalLM, AutoModelForCausalLM):
        with pytest.raises(InputError, match=sentence):
            kind.from_pretrained(folder, **given)


def test_what_changes_nothing_may_be_said(folder):
    config = AutoConfig.from_pretrained(folder)
    given = {"attn_implementation": "sdpa", "ignore_mismatched_sizes": False, "revision": None}
    model = AutoModelForCausalLM.from_pretrained(folder, **given, num_attention_heads=6)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="attn_implementation='eager' must be 'sdpa'"):
        AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(InputError, match="attn_implementation='eager' must be 'sdpa'"):
        model.set_attn_implementation("eager")
    for kind in (OpenMythosForCausalLM, AutoModelForCausalLM):
        told = kind.from_pretrained(folder, output_hidden_states=True, return_dict=False)
        assert len(told(some_ids())) == 3  # logits, states and loops
        assert told(some_ids(), output_hidden_states=False, return_dict=True).loops is not None


def test_a_damaged_folder_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"model\.safetensors must exist"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "kv_heads": 4}))
    with pytest.raises(ValueError, match="kv_heads=4 must divide num_heads=6"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_words_are_not_added(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.resize_token_embeddings(270) is model.get_input_embeddings()
    with pytest.raises(InputError, match="new_num_tokens=300 must be vocab_size=270"):
        model.resize_token_embeddings(300)
    for name in ("push_to_hub", "weight"):
        with pytest.raises(InputError, match=f"{name} must be left out"):
            model.save_pretrained(folder, **{name: True})
