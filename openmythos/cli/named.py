"""The folder of a model that a command was given by name."""

from __future__ import annotations

from pathlib import Path

from openmythos.errors import InputError
from openmythos.scales import SCALES


def model_folder(name: str) -> Path:
    """Return the folder of a model in the package, or the folder of this path.

    Raises:
        InputError: there is neither. Presets are named too: who calls this takes them as well.
    """
    from openmythos.inference.shipped import find_model, shipped

    folder = find_model(name)
    if not (name and folder.is_dir()):
        raise InputError(
            f"model={name!r} must be one of {', '.join([*SCALES, *shipped()])}, or the folder of a "
            "model or run"
        )
    return folder
