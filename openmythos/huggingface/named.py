"""Finding a model by a name as transformers has them, and what may be asked of it there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.errors import InputError
from openmythos.inference.shipped import find_model
from openmythos.model.files import WEIGHTS_FILE
from openmythos.training.machine import default_device
from openmythos.training.run import TOKENIZER
from openmythos.training.tokenizer import Tokenizer

HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""What says where on the hub files are."""
OF_LOADING = (
    "_from_auto",
    "adapter_kwargs",
    "low_cpu_mem_usage",
    "trust_remote_code",
    "use_safetensors",
)
"""What callers give that changes nothing: no code is run, and every file is safetensors."""


def one_device(device_map: Any) -> str | torch.device | None:
    """The device of a device map; None: the CPU.

    Raises:
        InputError: it names several.
    """
    if isinstance(device_map, dict):
        places = set(device_map.values())
        device_map = places.pop() if len(places) == 1 else tuple(sorted(map(str, places)))
    if device_map == "auto":
        return default_device()
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        return f"cuda:{device_map}"
    if device_map is None or isinstance(device_map, str | torch.device):
        return device_map
    raise InputError(f"device_map={device_map!r} must be one device: the model is not split")


def find_folder(name: str | Path, hub: dict[str, Any]) -> Path:
    """The folder of a name, from the hub where it is neither here nor in the package.

    Raises:
        OSError: the hub has no such model, or cannot be reached.
    """
    folder = find_model(name)
    if folder.is_dir():
        return folder
    cached_file(str(name), TOKENIZER, **hub, _raise_exceptions_for_missing_entries=False)
    config, _ = (cached_file(str(name), file, **hub) for file in (CONFIG_FILE, WEIGHTS_FILE))
    return Path(config).parent


def with_loops(read: MythosConfig, asked: MythosConfig, fields: dict[str, Any]) -> MythosConfig:
    """Return a file's config with the mean of loops that is asked for.

    Args:
        read: the file's.
        asked: a config that the caller gave, or the file's.
        fields: what else the caller gave by name.

    Raises:
        InputError: anything else is asked for.
    """
    wanted = dataclasses.asdict(asked)
    for name, value in fields.items():
        if value is None:
            continue
        if name not in wanted:
            raise InputError(f"{name}={value!r} must be left out: loading takes no such argument")
        wanted[name] = value
    for name, value in wanted.items():
        if name != "mean_loops" and value != (was := getattr(read, name)):
            raise InputError(f"{name}={value!r} must be {was!r}, as the weights were trained with")
    return dataclasses.replace(read, mean_loops=wanted["mean_loops"])


def generation_of(folder: Path) -> GenerationConfig:
    """What `generate` goes by: the folder's, or the end mark's id where there is a tokenizer."""
    if (folder / GENERATION_CONFIG_NAME).is_file():
        return GenerationConfig.from_pretrained(folder)
    end = Tokenizer.load(folder).end_id if (folder / TOKENIZER).is_file() else None
    return GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)


def check_attention(kind: str | None) -> None:
    """Refuse an implementation of attention that is not torch's own.

    Raises:
        InputError: it is another.
    """
    if kind not in (None, "sdpa"):
        raise InputError(f"attn_implementation={kind!r} must be 'sdpa', the only one there is")
