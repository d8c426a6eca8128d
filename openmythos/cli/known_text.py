"""Text that a model in the package read in its training, though a corpus holds it out."""

from __future__ import annotations

import sys
from pathlib import Path

from openmythos.inference.shipped import LANGUAGE_MODEL, find_model

KNOWN = {
    (LANGUAGE_MODEL, "embedded"): "a third of it, the messages of 1808 to 1810: take --corpus sotu"
}
"""By model and corpus: what of the held-out side was in the training, and what to measure with."""


def warn_of_known(model: Path, corpus: str | None) -> None:
    """Say on stderr where a model has read what it is about to be measured on."""
    for (name, known), what in KNOWN.items():
        if corpus == known and find_model(model).resolve() == find_model(name).resolve():
            print(
                f"openmythos: what corpus={corpus} holds out is not new to {name}, which was "
                f"trained on {what}",
                file=sys.stderr,
            )
