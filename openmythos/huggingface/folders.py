"""Models by the names that transformers has for them: folders, and repositories of the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.errors import InputError
from openmythos.huggingface.config import OpenMythosConfig
from openmythos.inference.precision import find_device
from openmythos.inference.shipped import find_model
from openmythos.model.files import WEIGHTS_FILE, load_model
from openmythos.model.transformer import OpenMythos
from openmythos.training.machine import default_device
from openmythos.training.run import TOKENIZER
from openmythos.training.tokenizer import Tokenizer

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""What says where files are."""
OF_LOADING = ("_from_auto", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")
"""What callers give that changes nothing: no code is run, and every file is safetensors."""
OF_OUTPUT = ("output_hidden_states", "return_dict")
"""What callers give that says what a call returns."""
OF_SAVING = (
    "distributed_checkpoint",
    "max_shard_size",
    "safe_serialization",
    "save_function",
    "save_original_format",
    "save_peft_format",
    "token",
)
"""What callers give that changes nothing: the file is one, and safetensors."""
MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_folder(
    folder: Path,
    config: OpenMythosConfig | None,
    dtype: torch.dtype | str | None,
    device_map: Any,
    fields: dict[str, Any],
) -> OpenMythos:
    """Read a folder's model.

    Args:
        folder: as `OpenMythos.from_pretrained` reads.
        config: one that the caller gave.
        dtype: see there; `auto` is none.
        device_map: see `one_device`.
        fields: what else the caller gave by name.

    Raises:
        CheckpointError: there is no model in it, or a damaged one.
        InputError: an argument is not known, or does not fit.
    """
    device = find_device(one_device(device_map))
    read = MythosConfig.load(folder)
    wanted = with_loops(read, read if config is None else config.mythos, fields)
    model = load_model(OpenMythos, folder, dtype=None if dtype == "auto" else dtype).to(device)
    model.config = wanted
    return model


def one_device(device_map: Any) -> str | torch.device | None:
    """The device of a device map; None: the CPU.

    Raises:
        InputError: it names several, or a way to share them.
    """
    if isinstance(device_map, dict):
        places = set(device_map.values())
        device_map = places.pop() if len(places) == 1 else tuple(sorted(map(str, places)))
    if device_map == "auto":
        return default_device()
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    shares = ("balanced", "balanced_low_0", "sequential")
    if device_map is None or (
        isinstance(device_map, str | torch.device) and device_map not in shares
    ):
        return device_map
    raise InputError(f"device_map={device_map!r} must be one device: the model is not split")


def find_folder(name: str | Path, hub: dict[str, Any]) -> Path:
    """The folder of a name, from the hub where it is neither here nor in the package.

    Raises:
        OSError: the hub has no such model, or cannot be reached.
    """
    folder = find_model(name)
    if folder.is_dir():
        return folder / (hub.get("subfolder") or "")
    for file in (TOKENIZER, GENERATION_CONFIG_NAME):
        cached_file(str(name), file, **hub, _raise_exceptions_for_missing_entries=False)
    config, _ = (cached_file(str(name), file, **hub) for file in (CONFIG_FILE, WEIGHTS_FILE))
    return Path(config).parent


def with_loops(read: MythosConfig, asked: MythosConfig, fields: dict[str, Any]) -> MythosConfig:
    """Return the config of weights with the mean of loops that is asked for.

    Args:
        read: the weights'.
        asked: a config that the caller has, or the same.
        fields: what else the caller gave by name.

    Raises:
        InputError: anything else is asked for.
    """
    wanted = dataclasses.asdict(asked)
    for name, value in fields.items():
        if name in wanted:
            wanted[name] = value
        elif value not in (None, False):  # so arguments are left out, too
            raise InputError(f"{name}={value!r} must be left out: loading takes no such argument")
    for name, value in wanted.items():
        if name != "mean_loops" and value != (was := getattr(read, name)):
            raise InputError(f"{name}={value!r} must be {was!r}, as the weights were trained with")
    loops = wanted["mean_loops"]  # where it is the same, fields that nobody set go on to follow
    return read if loops == read.mean_loops else dataclasses.replace(read, mean_loops=loops)


def generation_of(folder: Path) -> GenerationConfig:
    """What `generate` goes by: the folder's own, with the end mark where it says none."""
    found = GenerationConfig()
    if (folder / GENERATION_CONFIG_NAME).is_file():
        found = GenerationConfig.from_pretrained(folder)
    if (folder / TOKENIZER).is_file():
        mark_ends(found, Tokenizer.load(folder).end_id)
    return found


def mark_ends(generation: GenerationConfig, end_id: int) -> None:
    """Let the end mark begin, end and pad texts, where nothing else does."""
    for name in MARKS:
        if getattr(generation, name) is None:
            setattr(generation, name, end_id)


def check_attention(kind: str | None) -> None:
    """Refuse an implementation of attention that is not torch's own.

    Raises:
        InputError: it is another.
    """
    if kind not in (None, "sdpa"):
        raise InputError(f"attn_implementation={kind!r} must be 'sdpa', the only one there is")
