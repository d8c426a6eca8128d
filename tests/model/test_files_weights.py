"""Files of fp32, bf16 and int8 weights: what they hold, what comes back, what is refused."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import some_ids, tiny
from torch.testing import assert_close

from openmythos.errors import CheckpointError, ConfigError, InputError
from openmythos.model.attention import ATTENTION
from openmythos.model.files import WEIGHTS_FILE, load_model
from openmythos.model.int8 import Int8Weight
from openmythos.model.quantised import matrices, quantise
from openmythos.model.transformer import OpenMythos

WEIGHTS = ["fp32", "bf16", "int8"]
WIDE = ("norm.weight", "router.weight", "decay.step", "decay.rate", "gate.weight", "gate.bias")
WIDE += ("gate.threshold", "gate.w_in", "gate.bias_in", "_scale", "_bias")


def model_of(**changes):
    return tiny(lora_rank=2, q_latent=14, learned_act=True, **changes)


def written(folder):
    """The file's tensors and its word for what they are."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        metadata = file.metadata()
    return load_file(folder / WEIGHTS_FILE), metadata.get("weights")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_file_holds_what_its_name_for_the_weights_says(tmp_path, weights, attention):
    model = model_of(attention=attention)
    model.save_pretrained(tmp_path, weights=weights)
    tensors, word = written(tmp_path)
    assert word == weights
    scales = {name for name in tensors if name.endswith(".scale")}
    assert scales == ({f"{name}.scale" for name in matrices(model)} if weights == "int8" else set())
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[weights]
    for name, tensor in tensors.items():
        if name in matrices(model):
            assert tensor.dtype == narrow, name
        elif name.endswith("router.balance"):
            assert tensor.dtype == torch.int32
        elif name in scales or name.endswith(WIDE) or ".act." in name or weights == "fp32":
            assert tensor.dtype == torch.float32, name
        else:
            assert ".lora." in name or name in ("core.injection.weight", "core_output.weight")
            assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tie_head", [True, False])
def test_a_model_comes_back_in_fp32_as_near_as_its_file_allows(
    tmp_path, weights, attention, tie_head
):
    model = model_of(attention=attention, tie_head=tie_head)
    model.save_pretrained(tmp_path, weights=weights)
    stored, _ = written(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path)
    assert (loaded.head.weight is loaded.embed.weight) == tie_head
    for name, tensor in loaded.state_dict().items():
        before, kept = model.state_dict()[name], stored.get(name)
        assert tensor.dtype == before.dtype, name
        if kept is not None and kept.dtype == torch.int8:
            scale = stored[f"{name}.scale"]
            assert torch.equal(tensor, kept * scale)  # what the docs say a file means
            # Rounded twice to fp32, before and after: 127 * 2^-24 each.
            assert ((before - tensor).abs() <= scale * (0.5 + 127 * 2.0**-23)).all(), name
        elif kept is not None and kept.dtype == torch.bfloat16:
            assert torch.equal(tensor, before.bfloat16().float())
        elif kept is not None:
            assert torch.equal(tensor, before)
    with torch.no_grad():
        logits, exact = loaded(some_ids(), 3).logits, model(some_ids(), 3).logits
        error = float((logits - exact).norm() / exact.norm())
    # 0.008 or 2^-8 / sqrt(3) for each of some 30 products in a row, of random sign; and up to
    # three times that where a token takes another expert.
    most = {"fp32": 0.0, "bf16": 3 * 0.0023 * 30**0.5, "int8": 3 * 0.008 * 30**0.5}[weights]
    assert error <= most
    assert weights == "fp32" or error > 0


def test_a_file_is_a_half_or_a_quarter_as_large(tmp_path):
    model, sizes = tiny(hidden_size=64, feed_forward_size=256, expert_size=64), {}
    for weights in WEIGHTS:
        model.save_pretrained(tmp_path / weights, weights=weights)
        sizes[weights] = (tmp_path / weights / WEIGHTS_FILE).stat().st_size
    assert sizes["bf16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.35 * sizes["fp32"]


@pytest.mark.skipif(os.name == "nt", reason="of POSIX modes")
def test_a_saved_model_may_be_read_by_whom_the_users_mask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        model_of().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert set(modes.values()) == {"0o640"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_word_for_its_weights_a_model_is_saved_and_loaded_as_it_is(tmp_path, dtype):
    model = model_of().to(dtype)
    model.save_pretrained(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path)
    assert written(tmp_path)[1] is None
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_dtype_to_load_in_is_that_of_a_cast_model(tmp_path, weights, dtype):
    model_of().save_pretrained(tmp_path, weights=weights)
    loaded = OpenMythos.from_pretrained(tmp_path, dtype=dtype)
    expected = OpenMythos.from_pretrained(tmp_path).to(dtype)
    assert_close(dict(loaded.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("attention", ATTENTION)
def test_an_int8_model_and_an_int8_file_have_the_same_numbers(tmp_path, attention):
    model = model_of(attention=attention)
    model.save_pretrained(tmp_path / "file", weights="int8")
    loaded = load_model(OpenMythos, tmp_path / "file", int8=True)
    again = quantise(OpenMythos.from_pretrained(tmp_path / "file"))
    for name, weight in matrices(loaded).items():
        assert isinstance(weight, Int8Weight) != name.endswith("kv_up.weight")
        assert not weight.requires_grad or name.endswith("kv_up.weight")
        if isinstance(weight, Int8Weight):
            stored, _ = written(tmp_path / "file")
            assert torch.equal(weight.numbers, stored[name])
            assert torch.equal(weight.scale, stored[f"{name}.scale"])
            assert torch.equal(matrices(again)[name].numbers, weight.numbers)
            assert weight.few == matrices(again)[name].few
    assert loaded.head.weight is loaded.embed.weight
    with torch.no_grad():
        assert_close(loaded(some_ids(), 3).logits, again(some_ids(), 3).logits)


@pytest.mark.parametrize("weights", [None, *WEIGHTS])
def test_an_int8_model_is_saved_in_any_weights(tmp_path, weights):
    model_of().save_pretrained(tmp_path / "first", weights="int8")
    model = load_model(OpenMythos, tmp_path / "first", int8=True)
    model.save_pretrained(tmp_path / "second", weights=weights)
    assert written(tmp_path / "second")[1] == (weights or "int8")
    first = OpenMythos.from_pretrained(tmp_path / "first").state_dict()
    for name, tensor in OpenMythos.from_pretrained(tmp_path / "second").state_dict().items():
        kept = first[name].bfloat16().float() if weights == "bf16" else first[name]
        exact = name.endswith(WIDE) or weights != "bf16"
        assert torch.equal(tensor, first[name] if exact else kept) or ".act." in name


def test_a_bf16_model_loads_into_int8(tmp_path):
    model_of().bfloat16().save_pretrained(tmp_path)
    model = load_model(OpenMythos, tmp_path, int8=True)
    assert isinstance(model.embed.weight, Int8Weight)
    assert model.core_output.weight.dtype == torch.float32


def lack_a_scale(tensors):
    del tensors["embed.weight.scale"]


def have_a_scale_too_many(tensors):
    tensors["norm.weight.scale"] = torch.ones(24)


def have_a_scale_of_another_shape(tensors):
    tensors["embed.weight.scale"] = tensors["embed.weight.scale"].t().contiguous()


def have_a_scale_of_another_dtype(tensors):
    tensors["embed.weight.scale"] = tensors["embed.weight.scale"].half()


def have_a_scale_that_is_not_finite(tensors):
    tensors["embed.weight.scale"][3] = float("inf")


def have_an_int8_vector(tensors):
    tensors["norm.weight"] = torch.ones(24, dtype=torch.int8)


def lack_a_tensor(tensors):
    del tensors["norm.weight"]


def have_numbers_of_another_shape(tensors):
    tensors["embed.weight"] = tensors["embed.weight"][:-1].contiguous()
    tensors["embed.weight.scale"] = tensors["embed.weight.scale"][:-1].contiguous()


DAMAGE = {
    lack_a_scale: "has 'embed.weight' in int8 and lacks 'embed.weight.scale'",
    have_a_scale_too_many: "has 'norm.weight.scale' and no int8 tensor for it",
    have_a_scale_of_another_shape: r"is torch.float32 of shape \(1, 50\), must be torch.float32 of",
    have_a_scale_of_another_dtype: r"is torch.float16 of shape \(50, 1\), must be torch.float32 of",
    have_a_scale_that_is_not_finite: "embed.weight.scale holds NaN or infinity",
    have_an_int8_vector: "norm.weight is int8 and must be a matrix",
    lack_a_tensor: "lacks tensor 'norm.weight': it is of another config",
    have_numbers_of_another_shape: r"embed.weight has shape \(49, 24\), must be \(50, 24\)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("int8", [False, True])
def test_a_damaged_int8_file_is_refused_with_a_sentence(tmp_path, damage, int8):
    model_of().save_pretrained(tmp_path, weights="int8")
    tensors, word = written(tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt", "weights": word})
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE}.*{DAMAGE[damage]}"):
        load_model(OpenMythos, tmp_path, int8=int8)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"weights": "int4"}, "has weights='int4', must have one of fp32, bf16, int8"),
        (None, "has the unknown tensor 'coda.0.attention.out.weight.scale'"),
    ],
)
def test_a_file_with_another_word_for_its_weights_is_refused(tmp_path, metadata, sentence):
    model_of().save_pretrained(tmp_path, weights="int8")
    save_file(written(tmp_path)[0], tmp_path / WEIGHTS_FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match=sentence):
        OpenMythos.from_pretrained(tmp_path)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_torn_file_is_refused(tmp_path, weights):
    model_of().save_pretrained(tmp_path, weights=weights)
    os.truncate(tmp_path / WEIGHTS_FILE, 3000)
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        OpenMythos.from_pretrained(tmp_path)


def test_what_cannot_be_saved_leaves_the_old_files(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(InputError, match="weights='int4' must be one of fp32, bf16, int8"):
        model.save_pretrained(tmp_path, weights="int4")
    with torch.no_grad():
        model.embed.weight[7, 3] = float("inf")
    with pytest.raises(CheckpointError, match="embed.weight holds NaN or infinity: save the model"):
        model.save_pretrained(tmp_path, weights="int8")
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


class FullDisk:
    """A tokenizer for which there is no room."""

    def save(self, path):
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_leaves_the_old_model_whole(tmp_path):
    old = model_of()
    old.save_pretrained(tmp_path)
    other = model_of(mean_loops=7)
    with torch.no_grad():
        other.embed.weight.add_(1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        other.save_pretrained(tmp_path, FullDisk())
    again = OpenMythos.from_pretrained(tmp_path)
    assert again.config == old.config
    assert again.embed.weight.equal(old.embed.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS_FILE]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8 must be torch.float32, float64, bfloat16 or"),
        ({"dtype": "bf16"}, "dtype='bf16' must be torch.float32, float64, bfloat16 or float16"),
        ({"dtype": "int8"}, "dtype='int8' must be torch.float32"),
        ({"dtype": 16}, "dtype=16 must be torch.float32"),
        ({"dtype": torch.bfloat16, "int8": True}, "must be left out with int8 weights"),
    ],
)
def test_a_dtype_that_does_not_fit_is_refused(tmp_path, options, sentence):
    with pytest.raises(InputError, match=sentence):
        load_model(OpenMythos, tmp_path, **options)


def hold_nan(tensors):
    tensors["norm.weight"][3] = float("nan")


def hold_infinity(tensors):
    tensors["embed.weight"][0, 0] = float("inf")


def be_of_two_dtypes(tensors):
    tensors["norm.weight"] = tensors["norm.weight"].half()


NO_MODEL = {
    hold_nan: "norm.weight holds NaN or infinity",
    hold_infinity: "embed.weight holds NaN or infinity",
    be_of_two_dtypes: "norm.weight is torch.float16, must be torch.float32 as embed.weight is",
}


@pytest.mark.parametrize("damage", NO_MODEL, ids=lambda damage: damage.__name__)
def test_weights_that_no_model_has_are_refused(tmp_path, damage):
    model_of().save_pretrained(tmp_path)
    tensors, _ = written(tmp_path)
    damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE}.*{NO_MODEL[damage]}"):
        OpenMythos.from_pretrained(tmp_path)


PARTS = {
    "core.layers": lambda m: m.core.layers.bfloat16(),
    "coda": lambda m: m.coda.bfloat16(),
    "core.gate": lambda m: m.core.gate.double(),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_model_of_several_dtypes_is_refused_before_anything_is_written(tmp_path, part):
    model = model_of()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    PARTS[part](model)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: {part}.* as embed.weight is"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path, weights="fp32")  # of one dtype, whatever they were
    OpenMythos.from_pretrained(tmp_path)


@pytest.mark.parametrize("weights", [None, *WEIGHTS])
def test_a_layer_that_stands_twice_is_written_twice(tmp_path, weights):
    model = model_of()
    model.core.layers[1] = model.core.layers[0]
    model.save_pretrained(tmp_path, weights=weights)
    again = OpenMythos.from_pretrained(tmp_path)
    first, second = (layer.state_dict() for layer in again.core.layers)
    assert_close(first, second, rtol=0, atol=0)
    if weights in (None, "fp32"):
        assert again(some_ids(), 3).logits.equal(model(some_ids(), 3).logits)


def test_a_dtype_may_be_given_by_its_name(tmp_path):
    model_of().save_pretrained(tmp_path)
    assert OpenMythos.from_pretrained(tmp_path, "bfloat16").embed.weight.dtype == torch.bfloat16


def test_the_name_of_a_shipped_model_is_no_folder():
    with pytest.raises(
        CheckpointError, match="openmythos-lm must be a model's folder.*mythos.load"
    ):
        OpenMythos.from_pretrained("openmythos-lm")


def test_a_config_that_is_no_text_is_refused(tmp_path):
    model_of().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="config.json must be JSON in UTF-8"):
        OpenMythos.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_narrowed_from_float64_is_the_one_narrowed_from_fp32(tmp_path, dtype):
    narrowed, expected = model_of().double().to(dtype), model_of().to(dtype)
    narrowed.save_pretrained(tmp_path)
    for model in (narrowed, OpenMythos.from_pretrained(tmp_path)):
        assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 2**70),
        ("vocab_size", 2**31 - 1),
        ("rope_base", 10**400),
        ("gate_size", 2**64),
        ("max_length", 10**400),
    ],
    ids=lambda part: part if isinstance(part, str) else f"{part.bit_length()} bits",
)
def test_a_config_of_sizes_that_nothing_can_have_is_refused(tmp_path, field, value):
    model_of().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, field: value}))
    with pytest.raises((CheckpointError, ConfigError)):
        OpenMythos.from_pretrained(tmp_path)
