"""A tied head is the embedding, whatever is loaded, and is never saved as something else."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from openmythos.errors import CheckpointError
from openmythos.model.files import WEIGHTS_FILE
from openmythos.model.transformer import OpenMythos
from tests.tiny import some_ids, tiny


def on_meta(model):
    with torch.device("meta"):
        return OpenMythos(model.config)


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / WEIGHTS_FILE)


class Wrapped(nn.Module):
    """A model inside another module."""

    def __init__(self, model):
        super().__init__()
        self.inner = model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["a file's tensors", "all of a state dict"])
def test_loading_keeps_the_tie(tmp_path, assign, whole):
    source = tiny()
    tensors = source.state_dict() if whole else saved(source, tmp_path)
    assert ("head.weight" in tensors) == whole
    bare = on_meta(source) if assign else tiny(seed=1)
    for model in (bare, copy.deepcopy(bare), Wrapped(copy.deepcopy(bare))):
        prefix = "inner." if isinstance(model, Wrapped) else ""
        given = {prefix + name: tensor for name, tensor in tensors.items()}
        model.load_state_dict(given, assign=assign)
        loaded = getattr(model, "inner", model).eval()
        assert loaded.head.weight is loaded.embed.weight
        assert loaded(some_ids()).logits.equal(source(some_ids()).logits)
    assert ("head.weight" in tensors) == whole  # what was given is as it was


def test_a_model_trained_after_loading_is_saved_as_it_is(tmp_path):
    source = tiny()
    model = on_meta(source)
    model.load_state_dict(source.state_dict(), assign=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(some_ids()).logits.square().mean().backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = OpenMythos.from_pretrained(tmp_path)
    assert again(some_ids()).logits.equal(model(some_ids()).logits)


@pytest.mark.parametrize("assign", [False, True])
def test_weights_with_a_head_of_their_own_are_refused(assign):
    tensors = tiny(tie_head=False).state_dict()
    model = on_meta(tiny()) if assign else tiny()
    with pytest.raises(RuntimeError, match=r"head.weight must be embed.weight, as tie_head=True"):
        model.load_state_dict(tensors, assign=assign)
    assert model.head.weight is model.embed.weight


def test_a_head_that_came_apart_is_not_dropped_by_saving(tmp_path):
    model = tiny()
    model.head.weight = nn.Parameter(model.head.weight * 2)
    sentence = "head.weight must be embed.weight itself, as tie_head=True says: set model.head"
    with pytest.raises(CheckpointError, match=sentence):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_state_dict_that_is_not_finite_is_still_of_a_tied_model():
    model, other = tiny(), tiny(seed=1)
    with torch.no_grad():
        model.embed.weight[3, 0] = torch.nan
    other.load_state_dict(model.state_dict())
    assert other.embed.weight[3, 0].isnan()
