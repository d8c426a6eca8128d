"""Text up to a stop string, against searches that look at all of it again and again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmythos.inference.stops import Begun, HoldBack


def shown_until_stop(text, stops):
    """The text before the first stop to be complete, seen character by character."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


short = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(short, max_size=3))
def test_holding_back_does_not_depend_on_how_the_text_is_cut(chunks, stops):
    hold = HoldBack(stops)
    shown = "".join(hold.push(chunk) for chunk in chunks) + hold.finish()
    assert (shown, hold.stopped) == shown_until_stop("".join(chunks), stops)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(short, max_size=3))
def test_no_more_is_held_back_than_may_begin_a_stop(chunks, stops):
    hold, seen, shown = HoldBack(stops), "", ""
    for chunk in chunks:
        seen, shown = seen + chunk, shown + hold.push(chunk)
        if hold.stopped:
            return
        held = seen[len(shown) :]
        assert seen.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)


class SimpleHoldBack:
    """What `HoldBack` does, looking at all that is held back again for every piece."""

    def __init__(self, stops):
        self.stops, self.held, self.stop = stops, "", None

    def push(self, text):
        if self.stop is not None:
            return ""
        text = self.held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.stop = min(found)
            self.held = ""
            return text[:start]
        overlaps = (
            length
            for stop in self.stops
            for length in range(min(len(stop) - 1, len(text)) + 1)
            if text.endswith(stop[:length])
        )
        keep = max(overlaps, default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


longer = st.text("ab", min_size=1, max_size=9)


@settings(max_examples=500)
@given(st.lists(st.text("ab", max_size=9), max_size=12), st.lists(longer, max_size=4))
def test_holding_back_is_what_the_simple_search_does_piece_by_piece(chunks, stops):
    hold, simple = HoldBack(stops), SimpleHoldBack(stops)
    for chunk in chunks:
        assert hold.push(chunk) == simple.push(chunk)
        assert (hold.held, hold.stop, hold.stopped) == (simple.held, simple.stop, bool(simple.stop))


@pytest.mark.parametrize("end", ["b", "a"])
def test_a_long_stop_costs_each_character_once(monkeypatch, end):
    """Steps, not seconds: a search that began anew would take the square of the length."""
    steps, border = [], Begun._border

    def counted(self, length):
        steps.append(length)
        return border(self, length)

    monkeypatch.setattr(Begun, "_border", counted)
    length = 4000
    hold, text = HoldBack(["a" * length + "c"]), ("a" * (length - 1) + end) * 3
    assert "".join(map(hold.push, text)) + hold.finish() == text
    assert len(steps) <= len(text)
    assert len(hold._begun[0]._borders) <= length
