"""The trained models that come inside the package, by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

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


def _folder() -> Path:
    return Path(str(files("openmythos"))) / "weights"
