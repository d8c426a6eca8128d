"""A corpus small enough to train on in a test, in the place of one that has a name."""

from pathlib import Path

from openmythos.training.corpus import Corpus, open_text

WORDS = ("we", "the", "people", "of", "these", "united", "states", "send", "this", "message")


def few_messages(folder: Path) -> Corpus:
    """Twenty documents, of which about a third are held out."""
    folder = folder / "messages"
    folder.mkdir(exist_ok=True)
    for number in range(20):
        text = " ".join(WORDS[(number + n * n) % len(WORDS)] for n in range(60 + number))
        (folder / f"{number:02}.txt").write_text(text)
    return open_text(folder, held_out=0.3)
