"""A model's folder: `config.json`, `model.safetensors` and `tokenizer.json`. No pickle, no code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.errors import CheckpointError
from openmythos.files import write_atomically

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos

WEIGHTS_FILE = "model.safetensors"
TIED = "head.weight"  # the same tensor as the embedding where config.tie_head


@runtime_checkable
class Saveable(Protocol):
    """A tokenizer, as far as saving goes."""

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` into a folder."""
        ...


def save_model(model: OpenMythos, folder: Path, tokenizer: Saveable | None) -> None:
    """Write a model's folder, each file beside and then renamed.

    Raises:
        CheckpointError: a file cannot be written; the old ones are untouched.
    """
    tensors = storable(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / WEIGHTS_FILE,
            lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        )
        write_atomically(folder / CONFIG_FILE, model.config.to_json().encode())
        if tokenizer is not None:
            tokenizer.save(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"folder={folder} must be writable: {error}") from error


def load_model(kind: type[OpenMythos], folder: Path) -> OpenMythos:
    """Build a model of `kind` from a folder, in the dtype its tensors were saved in.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
    """
    config = MythosConfig.load(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} must exist: {folder} is not a model's folder")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, but: {error}. Copy it again"
        ) from error
    with torch.device("meta"):
        model = kind(config)
    fill(model, tensors, str(path))
    return model.eval()


def storable(model: OpenMythos) -> dict[str, Tensor]:
    """The tensors of a model by name, a tied head left out."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_head:
        del tensors[TIED]
    return tensors


def fill(model: OpenMythos, tensors: dict[str, Tensor], source: str) -> None:
    """Put `tensors` in place of a model's own, which may be on `meta`.

    Raises:
        CheckpointError: names or shapes are not the model's; nothing was changed.
    """
    tied = model.config.tie_head
    if tied and "embed.weight" in tensors:
        tensors = {**tensors, TIED: tensors["embed.weight"]}
    wanted = model.state_dict()
    for name in sorted(set(wanted) ^ set(tensors)):
        what = "lacks" if name in wanted else "has the unknown"
        raise CheckpointError(f"{source} {what} tensor {name!r}: it is of another config")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, must be "
                f"{tuple(wanted[name].shape)}: it is of another config"
            )
    if not model.embed.weight.is_meta:
        model.load_state_dict(tensors)
        return
    # Cloned, because a file's tensors lie anywhere in it, and a product's rounding depends on how
    # its operands are aligned.
    model.load_state_dict({name: t.clone() for name, t in tensors.items()}, assign=True)
    if tied:
        model.head.weight = model.embed.weight
