"""Recurrent-depth transformers: train them, run them, choose how deep they think.

The names below are the public ones; torch is imported when one that needs it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmythos.config import MythosConfig
    from openmythos.errors import (
        CacheError,
        CheckpointError,
        ConfigError,
        DataError,
        InputError,
        MythosError,
        TokenizerError,
    )
    from openmythos.inference.language_model import LanguageModel, load
    from openmythos.inference.sampling import Sampling
    from openmythos.model.cache import Cache
    from openmythos.model.transformer import MythosOutput, OpenMythos
    from openmythos.training.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOME = {
    "MythosConfig": "openmythos.config",
    "CacheError": "openmythos.errors",
    "CheckpointError": "openmythos.errors",
    "ConfigError": "openmythos.errors",
    "DataError": "openmythos.errors",
    "InputError": "openmythos.errors",
    "MythosError": "openmythos.errors",
    "TokenizerError": "openmythos.errors",
    "LanguageModel": "openmythos.inference.language_model",
    "load": "openmythos.inference.language_model",
    "Sampling": "openmythos.inference.sampling",
    "Cache": "openmythos.model.cache",
    "MythosOutput": "openmythos.model.transformer",
    "OpenMythos": "openmythos.model.transformer",
    "Tokenizer": "openmythos.training.tokenizer",
}

__all__ = [
    "Cache",
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InputError",
    "LanguageModel",
    "MythosConfig",
    "MythosError",
    "MythosOutput",
    "OpenMythos",
    "Sampling",
    "Tokenizer",
    "TokenizerError",
    "load",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'openmythos' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
