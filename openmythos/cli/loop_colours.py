"""Text coloured by the loops that each token took; a table of them where there are no colours."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openmythos.inference.language_model import Piece

# Of the 256 colours that terminals share: from blue for few loops, by green and yellow, to red.
PALETTE = (27, 33, 39, 45, 50, 48, 46, 118, 154, 190, 226, 220, 214, 208, 202, 196)
RESET = "\x1b[0m"
BAR = 30  # characters of the longest bar


def colours_wanted() -> bool:
    """Whether stdout is a terminal whose user has not said NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def writable(marks: str, plain: str) -> str:
    """Return marks, or plain ones in their places where stdout's encoding does not have them."""
    try:
        marks.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return plain
    return marks


class LoopColours:
    """Colours pieces of text and counts their loops, for the legend.

    Args:
        budget: the most loops a token can take, which has the last colour.
        colours: whether to colour at all.
    """

    def __init__(self, budget: int, colours: bool) -> None:
        self.budget, self.colours = budget, colours
        self.counts: Counter[int] = Counter()

    def paint(self, piece: Piece) -> str:
        """Return the piece's text in the colour of its loops, and count its token."""
        if piece.token_id is not None:
            self.counts[piece.loops] += 1
        return self._coloured(piece.text, piece.loops)

    def legend(self) -> str:
        """Return how many tokens took how many loops, a line for each number of loops."""
        tokens = self.counts.total()
        if not tokens:
            return "no tokens"
        most = max(self.counts.values())
        lines, block = ["loops  tokens"], writable("█", "#")
        for loops, count in sorted(self.counts.items()):
            bar = self._coloured(block * max(1, round(BAR * count / most)), loops)
            lines.append(f"{loops:>5}  {count:>6}  {bar} {count / tokens:.0%}")
        mean = sum(loops * count for loops, count in self.counts.items()) / tokens
        lines.append(f"mean {mean:.2f} of at most {self.budget} loops")
        return "\n".join(lines)

    def _coloured(self, text: str, loops: int) -> str:
        if not (self.colours and text):
            return text
        place = (loops - 1) / max(1, self.budget - 1)
        colour = PALETTE[round(min(place, 1.0) * (len(PALETTE) - 1))]
        return f"\x1b[38;5;{colour}m{text}{RESET}"
