"""Text in which passages recur, so that a model learns to look back.

    python recipes/recurring_passages.py FOLDER OUT.jsonl

Small corpora are learnt by heart before anything rewards copying from the context: a model of 7 M
parameters that had read 64 M tokens predicted the second half of a repeated text no better than the
first. Each document written here is made of three passages of the folder's texts, drawn again and
again, and has to be read with an eye on what stands before.
"""

import json
import sys
from pathlib import Path

import numpy as np

SHARE = 1 / 3
"""Characters written over characters read."""
PASSAGES, DRAWS = 3, 14
"""Different passages in a document, and how many stand in it."""
LENGTH = (40, 400)
"""Fewest and most characters of a passage, which begins and ends between words."""


def main(folder: Path, out: Path) -> None:
    """Write the file; the same for the same texts."""
    texts = [
        json.loads(line)["text"]
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    sizes = np.array([len(text) for text in texts], dtype=np.float64)
    random = np.random.default_rng(0)
    written = 0
    with out.open("w", encoding="utf-8") as file:
        while written < SHARE * sizes.sum():
            chosen = random.choice(len(texts), PASSAGES, p=sizes / sizes.sum())
            passages = [passage(texts[text], random) for text in chosen]
            document = " ".join(passages[n] for n in random.integers(0, PASSAGES, DRAWS))
            file.write(json.dumps({"text": document}) + "\n")
            written += len(document)


def passage(text: str, random: np.random.Generator) -> str:
    """Draw a passage of whole words."""
    start = int(random.integers(0, max(1, len(text) - LENGTH[1])))
    words = text[start : start + int(random.integers(*LENGTH))].split()
    return " ".join(words[1:-1] or words)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
