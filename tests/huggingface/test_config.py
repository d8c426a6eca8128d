"""A config and a tokenizer in transformers' hands say what they say in ours."""

import dataclasses
import sys

import pytest
from tiny import SIZES
from transformers import AutoConfig, AutoTokenizer

import openmythos
from openmythos import MythosConfig
from openmythos.errors import ConfigError, TokenizerError
from openmythos.huggingface import OpenMythosConfig, OpenMythosTokenizer
from openmythos.scales import SCALES
from openmythos.training.tokenizer import END, Tokenizer

TEXT = "the cat sat on the mat and the dog sat on the log"


@pytest.mark.parametrize("name", SCALES)
def test_every_field_of_a_config_is_kept(name, tmp_path):
    config = MythosConfig.preset(name)
    OpenMythosConfig.of(config).save_pretrained(tmp_path)
    assert MythosConfig.load(tmp_path) == config
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, OpenMythosConfig)
    assert dataclasses.asdict(read.mythos) == dataclasses.asdict(config)


def test_sizes_have_the_names_that_transformers_asks_for():
    config = OpenMythosConfig(**{**SIZES, "prelude_layers": 3})
    assert config.num_hidden_layers == 3 + SIZES["core_layers"] + 1
    assert config.num_attention_heads == SIZES["num_heads"]
    assert config.num_key_value_heads == SIZES["kv_heads"]
    assert config.max_position_embeddings == SIZES["max_length"]
    assert config.tie_word_embeddings is True
    assert OpenMythosConfig(num_attention_heads=2, max_position_embeddings=9).mythos.num_heads == 2
    assert OpenMythosConfig(max_position_embeddings=9).mythos.max_length == 9


def test_a_config_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="kv_heads=3 must divide num_heads=8"):
        OpenMythosConfig(kv_heads=3)
    config = OpenMythosConfig()
    config.mean_loops = 0
    with pytest.raises(ConfigError, match="mean_loops=0 must be 1 or more"):
        _ = config.mythos


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer alone, and a config that says whose it is."""
    path = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([TEXT], vocab_size=280).save(path)
    (path / "config.json").write_text(MythosConfig(vocab_size=280).to_json())
    return path


def test_a_text_has_the_ids_that_the_model_was_trained_on(folder):
    own, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, OpenMythosTokenizer)
    for text in ("the cat", "", f"a {END} written out", "é\u3000🐋\n\n x"):
        assert theirs(text).input_ids == [own.end_id, *own.encode(text)]
        assert theirs(text, add_special_tokens=False).input_ids == own.encode(text)
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    marked = theirs(f"a{END}", split_special_tokens=False).input_ids
    assert marked == [own.end_id, *own.encode("a"), own.end_id]
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == own.end_id


def test_a_batch_is_padded_on_the_left(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the cat sat", "the"], padding=True, return_tensors="pt")
    short = len(tokenizer("the").input_ids)
    width = batch.input_ids.shape[1]
    assert batch.attention_mask[1].tolist() == [0] * (width - short) + [1] * short
    assert batch.input_ids[1, width - short :].tolist() == tokenizer("the").input_ids


def test_a_saved_tokenizer_is_read_by_both(folder, tmp_path):
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    text = "the dog on the mat"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load(folder).encode(text)
    assert again.padding_side == "left"
    parsed = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
    parsed.save_pretrained(tmp_path)
    kept = AutoTokenizer.from_pretrained(tmp_path)
    assert kept(END, add_special_tokens=False).input_ids == [kept.eos_token_id]


def test_a_tokenizer_knows_the_models_length_and_a_templates_marks(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == MythosConfig(vocab_size=280).max_length
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    said = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}])["input_ids"]
    own = Tokenizer.load(folder)
    assert said == [*own.encode("the cat"), own.end_id]


def test_a_shipped_model_has_its_tokenizer_by_name():
    lm = openmythos.load("openmythos-lm")
    tokenizer = OpenMythosTokenizer.from_pretrained("openmythos-lm")
    assert tokenizer("Fellow citizens").input_ids == lm.prompt_ids("Fellow citizens")


def test_a_tokenizer_without_an_end_mark_is_refused(folder, tmp_path):
    text = (folder / "tokenizer.json").read_text().replace(END, "<|start|>")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(TokenizerError, match="special tokens must include one of"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_missing_library_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("openmythos.huggingface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="transformers must be installed: pip install"):
        import openmythos.huggingface  # noqa: F401
