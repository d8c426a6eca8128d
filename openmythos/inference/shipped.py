"""The trained models that come inside the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from openmythos.errors import CheckpointError, InputError

LANGUAGE_MODEL, REASONER = "openmythos-lm", "openmythos-reasoner"


def shipped() -> list[str]:
    """Return the names of the models that are there."""
    folder = _folder()
    return (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    )


def find_model(name: str | Path) -> Path:
    """Return the folder that a name or a path means; a folder of one's own goes first."""
    if not Path(name).is_dir() and str(name) in shipped():
        return _folder() / str(name)
    return Path(name)


def existing(name: str | Path) -> Path:
    """Return the folder that a name or a path means, which must be there.

    Raises:
        InputError: `name` is no name.
        CheckpointError: there is no such folder; named are the models that read text.
    """
    if not isinstance(name, str | Path):
        raise InputError(f"name={name!r} must be a folder, or the name of a shipped model")
    folder = find_model(name)
    if not (str(name) and folder.is_dir()):
        names = ", ".join(name for name in shipped() if name != REASONER)
        names = names or "none in this installation"
        raise CheckpointError(
            f"model={str(name)!r} must be the folder of a model or of a run, or the name of a "
            f"model that comes with the package ({names})"
        )
    return folder


def _folder() -> Path:
    return Path(str(files("openmythos"))) / "weights"
