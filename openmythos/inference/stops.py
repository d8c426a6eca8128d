"""Strings that end a text: checked, and found as the text comes, piece by piece. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.errors import InputError


def check_stops(stops: Sequence[object]) -> None:
    """Raise `InputError` unless these can end a text: strings, and none of them empty."""
    for stop in stops:
        if not isinstance(stop, str):
            raise InputError(f"stop holds {stop!r}, must hold strings")
        if not stop:
            raise InputError("stop must hold no empty string: it would end every text at once")


class HoldBack:
    """Lets text through up to a stop string, holding back what may be the start of one.

    The first stop to be complete ends the text (of two that end together, the longer), so that
    it does not matter how the text was cut into pieces. Each character is looked at once.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False
        self.stop: str | None = None  # the one that ended the text
        self._begun = [Begun(stop) for stop in stops]

    def push(self, text: str) -> str:
        """Take new text; return what can be shown now."""
        if self.stopped:
            return ""
        if not self._begun:
            return text
        held, self.held = self.held, ""
        for end, character in enumerate(text, start=len(held) + 1):
            complete = [begun.stop for begun in self._begun if begun.take(character)]
            if complete:
                self.stopped, self.stop = True, max(complete, key=len)
                return (held + text)[: end - len(self.stop)]
        text = held + text
        keep = max(begun.length for begun in self._begun)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back and turned out to be text."""
        rest, self.held = self.held, ""
        return rest


class Begun:
    """How much of one stop string a text ends with: Knuth, Morris and Pratt's search.

    A character that does not go on with the stop falls back to the longest beginning that the text
    still ends with, and no character is read again: all of a text takes steps in proportion to it.
    """

    def __init__(self, stop: str) -> None:
        self.stop, self.length = stop, 0
        self._borders = [0]  # grown as far as a text has come, or long stops would cost at once

    def take(self, character: str) -> bool:
        """Go on by one character; True: the stop is complete, and nothing more may come."""
        while self.length and self.stop[self.length] != character:
            self.length = self._border(self.length)
        self.length += self.stop[self.length] == character
        return self.length == len(self.stop)

    def _border(self, length: int) -> int:
        """Longest proper beginning of the stop's first `length` characters that also ends them."""
        borders, stop = self._borders, self.stop
        while len(borders) < length:
            character, border = stop[len(borders)], borders[-1]
            while border and stop[border] != character:
                border = borders[border - 1]
            borders.append(border + (stop[border] == character))
        return borders[length - 1]
