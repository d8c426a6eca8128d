"""A model's folder: `config.json`, `model.safetensors` and `tokenizer.json`. No pickle, no code.

The weights' file is a plain safetensors file, tensors by their names in the model. Where it was
written with `weights`, its metadata has that word:

    fp32    every floating tensor is fp32
    bf16    matrices are bf16; norms, routers, learned exits and A's raw values stay fp32
    int8    as bf16, and the layers' matrices and the embedding are two tensors: `name`, int8, and
            `name.scale`, fp32, one for each output; the matrix is `name * name.scale`
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, get_args, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.config import CONFIG_FILE, MythosConfig, WeightsKind
from openmythos.errors import CheckpointError, InputError
from openmythos.files import write_atomically, written_together
from openmythos.model.call import floating
from openmythos.model.int8 import Int8Weight, input_axis, pack
from openmythos.model.quantised import matrices, quantise, stays_wide_in_memory
from openmythos.model.tied import EMBED, HEAD

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos

WEIGHTS_FILE = "model.safetensors"
WEIGHTS = "weights"  # the metadata's key
SCALE = ".scale"


@runtime_checkable
class Saveable(Protocol):
    """A tokenizer, as far as saving goes."""

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` into a folder."""
        ...


def save_model(
    model: OpenMythos,
    folder: Path,
    tokenizer: Saveable | None,
    weights: WeightsKind | None = None,
) -> None:
    """Write a model's folder: every file beside, and when all are whole, each renamed.

    Raises:
        InputError: there are no such `weights`.
        CheckpointError: a file cannot be written, a weight is NaN or infinite, or cannot be int8,
            or a tied head has become a matrix of its own, or, without `weights`, parts of the
            model are of other dtypes; the old files are untouched.
    """
    if weights is not None and weights not in get_args(WeightsKind):
        raise InputError(f"weights={weights!r} must be one of {', '.join(get_args(WeightsKind))}")
    if weights is None and any(isinstance(p, Int8Weight) for p in model.parameters()):
        weights = "int8"
    _check_finite(model, f"folder={folder}", "save the model before its training diverged")
    if weights is None:
        _check_dtypes(model, f"folder={folder}")
    tensors = _apart(encoded(model, weights))
    metadata = {"format": "pt"} | ({} if weights is None else {WEIGHTS: weights})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_together(folder) as beside:
            write_atomically(
                beside / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata)
            )
            write_atomically(beside / CONFIG_FILE, model.config.to_json().encode())
            if tokenizer is not None:
                tokenizer.save(beside)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(
            f"folder={folder} must be a folder, and it or one above is a file: choose another path"
        ) from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"folder={folder} must be writable, and is not: {reason}") from error


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares its memory with another: a layer that a model has twice is written twice.

    Read again, the two are equal and no longer one, as nothing in a config says that they are.
    """
    seen: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return tensors


def encoded(model: OpenMythos, weights: WeightsKind | None) -> dict[str, Tensor]:
    """The tensors of a model as a file of these `weights` holds them; None: as they are."""
    tensors, packed = storable(model), matrices(model)
    if weights is None:
        return tensors
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if weights == "int8" and name in packed:
            as_int8 = tensor if isinstance(tensor, Int8Weight) else pack(name, tensor)
            stored[name], stored[name + SCALE] = as_int8.numbers.contiguous(), as_int8.scale
        elif tensor.is_floating_point():
            narrow = weights != "fp32" and (name in packed or _may_be_bf16(name, tensor))
            wide = tensor.dense() if isinstance(tensor, Int8Weight) else tensor
            stored[name] = wide.to(torch.bfloat16 if narrow else torch.float32).contiguous()
        else:
            stored[name] = tensor
    return stored


def _may_be_bf16(name: str, tensor: Tensor) -> bool:
    """Whether a tensor that is never int8 may be bf16: LoRA, and the core's B and C."""
    outer = name in ("core.injection.weight", "core_output.weight") and tensor.ndim == 2
    return outer or ".lora." in name


def load_model(
    kind: type[OpenMythos],
    folder: Path,
    *,
    dtype: torch.dtype | str | None = None,
    int8: bool = False,
) -> OpenMythos:
    """Build a model of `kind` from a folder.

    Args:
        kind: the model's class.
        folder: what `save_model` wrote.
        dtype: cast to this one, or to that of this name. Default: fp32 where the file says
            `weights`, and else the dtype its tensors were saved in.
        int8: keep matrices in int8; see `openmythos.model.quantised`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the config.
        InputError: `dtype` is none of the floating ones, or given with `int8`.
    """
    dtype = None if dtype is None else floating(dtype)
    if dtype is not None and int8:
        raise InputError(f"{dtype=} must be left out with int8 weights: the rest stays fp32")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} must be a model's folder: a model that comes with the package is loaded by "
            "its name with openmythos.load"
        )
    _check_no_run(folder)
    config = MythosConfig.load(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} must exist: {folder} is not a model's folder")
    tensors = decoded(path)
    for name, tensor in tensors.items():
        if isinstance(tensor, Int8Weight) and (not int8 or stays_wide_in_memory(name)):
            tensors[name] = tensor.dense()
    try:
        with torch.device("meta"):
            model = kind(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # torch counts bytes in 64 bits
        raise CheckpointError(
            f"{folder / CONFIG_FILE} must describe a model that can be built ({error})"
        ) from None
    fill(model, tensors, str(path))
    check_values(model, str(path))
    if int8:
        quantise(model.float())
    return (model if dtype is None else model.to(dtype)).eval()


def _check_no_run(folder: Path) -> None:
    """Refuse a training run's folder, and say where its model is; the names are a run's own."""
    if (folder / CONFIG_FILE).is_file() or not (folder / "settings.json").is_file():
        return
    model = folder / "model"
    where = f"{model}, or openmythos.load" if (model / CONFIG_FILE).is_file() else "openmythos.load"
    raise CheckpointError(
        f"{folder} must be a model's folder, and is a training run's: give {where}"
    )


def kept_weights(folder: Path) -> str | None:
    """What the weights in a model's file are, as `WeightsKind` has it; None where it says nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / WEIGHTS_FILE
    return _kept(path) if path.is_file() else None


def _kept(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} must be a whole safetensors file, but: {error}. Copy it again")


def decoded(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights' file by their names in the model: fp32 or int8 where it says so.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not known here.
    """
    weights = _kept(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _not_whole(path, error) from error
    if weights is None:
        return tensors
    if weights not in get_args(WeightsKind):
        raise CheckpointError(
            f"{path} has {weights=}, must have one of {', '.join(get_args(WeightsKind))}: read it "
            "with the openmythos that wrote it"
        )
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(SCALE)}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = _with_scale(name, tensor, scales.pop(name + SCALE, None), path)
        elif tensor.is_floating_point():
            tensors[name] = tensor.float()
    for name in scales:
        raise CheckpointError(f"{path} has {name!r} and no int8 tensor for it: export it again")
    return tensors


def check_values(model: OpenMythos, source: str) -> None:
    """Refuse weights that no model of ours could have been saved with.

    Raises:
        CheckpointError: a number is NaN or infinite, or of another dtype than `model.to` gives.
    """
    _check_dtypes(model, source)
    remedy = "copy it again, or take a checkpoint from before training diverged"
    _check_finite(model, source, remedy)


def _check_dtypes(model: OpenMythos, source: str) -> None:
    dtype = model.embed.weight.dtype
    with torch.device("meta"):
        wanted = type(model)(model.config).to(dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Int8Weight) or name not in wanted:
            continue
        if tensor.dtype != wanted[name].dtype:
            raise CheckpointError(
                f"{source}: {name} is {tensor.dtype}, must be {wanted[name].dtype} as embed.weight "
                f"is {dtype}: save the model after model.to(dtype)"
            )


def _check_finite(model: OpenMythos, source: str, remedy: str) -> None:
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Int8Weight) or tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinity: {remedy}")


def _with_scale(name: str, numbers: Tensor, scale: Tensor | None, path: Path) -> Int8Weight:
    wanted = list(numbers.shape)
    if numbers.ndim not in (2, 3):
        raise CheckpointError(f"{path}: {name} is int8 and must be a matrix: export it again")
    wanted[input_axis(numbers)] = 1
    if scale is None:
        raise CheckpointError(
            f"{path} has {name!r} in int8 and lacks {name + SCALE!r}: copy it again"
        )
    if list(scale.shape) != wanted or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{path}: {name}{SCALE} is {scale.dtype} of shape {tuple(scale.shape)}, must be "
            f"torch.float32 of shape {tuple(wanted)}: export it again"
        )
    if not bool(scale.isfinite().all()):
        raise CheckpointError(f"{path}: {name}{SCALE} holds NaN or infinity: copy it again")
    return Int8Weight(numbers, scale)


def storable(model: OpenMythos) -> dict[str, Tensor]:
    """The tensors of a model by name, a tied head left out.

    Raises:
        CheckpointError: the head ought to be tied and is another matrix, which would be lost.
    """
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_head:
        if model.head.weight is not model.embed.weight:
            raise CheckpointError(
                f"{HEAD} must be {EMBED} itself, as tie_head=True says: set "
                "model.head.weight = model.embed.weight, or build the model with tie_head=False"
            )
        del tensors[HEAD]
    return tensors


def fill(model: OpenMythos, tensors: dict[str, Tensor], source: str) -> None:
    """Put `tensors` in place of a model's own, which may be on `meta`.

    Raises:
        CheckpointError: names or shapes are not the model's; nothing was changed.
    """
    wanted = model.state_dict()
    if model.config.tie_head:  # the model takes its embedding for it
        wanted, tensors = ({n: t for n, t in x.items() if n != HEAD} for x in (wanted, tensors))
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
