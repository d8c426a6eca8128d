"""Pages are free, cached or used; columns are found by what they hold; addresses follow exits."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from openmythos.inference.pages import PAGE, Column, Layout, Pages, Table


class Holding(RuleBasedStateMachine):
    """Chains of columns that start alike, held and let go in any order."""

    @initialize(total=st.integers(1, 12))
    def make(self, total):
        self.pages, self.total = Pages(total), total
        self.chains = []  # of columns held, with their token ids and exits

    def take(self, size):
        column = Column()
        for slot in range(size):
            column.pages[slot] = self.pages.take()
        return column

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=3), size=st.integers(1, 3))
    def write(self, text, size):
        """Go through a text of columns: found ones are shared, others written and published."""
        token_ids = [token for token in text for _ in range(PAGE)]
        held = self.pages.find("salt", token_ids)
        for number, column in enumerate(held):
            assert column.key[1] == tuple(token_ids[number * PAGE : (number + 1) * PAGE])
            self.pages.share(column)
        missing = len(text) - len(held)
        if not self.pages.promise(missing * size):
            for column in reversed(held):
                self.pages.release(column)
            return
        for number in range(len(held), len(text)):
            column = self.take(size)
            ids = tuple(token_ids[number * PAGE : (number + 1) * PAGE])
            exits = (size - 1,) * PAGE
            kept = self.pages.publish(column, held[-1] if held else "salt", ids, exits)
            assert kept is column  # it was not found, so it is nowhere yet
            held.append(column)
        self.chains.append(held)

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def let_go(self, data):
        chain = self.chains.pop(data.draw(st.integers(0, len(self.chains) - 1)))
        for column in reversed(chain):
            self.pages.release(column)

    @precondition(lambda self: self.chains)
    @rule(data=st.data(), size=st.integers(1, 3))
    def write_the_same_beside(self, data, size):
        """Two who wrote the same go on with the pages of one."""
        chain = data.draw(st.sampled_from(self.chains))
        if not self.pages.promise(size):
            return
        free = self.pages.free + self.pages.cached
        column = self.take(size)
        kept = self.pages.publish(column, *chain[0].key, (size - 1,) * PAGE)
        assert kept is chain[0]
        assert self.pages.free + self.pages.cached == free
        self.pages.release(kept)

    @invariant()
    def books_are_right(self):
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        used = {page for chain in self.chains for c in chain for page in c.pages.values()}
        assert self.pages.used == len(used)
        assert self.pages.free + self.pages.cached + self.pages.used == self.total

    def teardown(self):
        if hasattr(self, "pages"):
            while self.chains:
                for column in reversed(self.chains.pop()):
                    self.pages.release(column)
            self.pages.forget()
            assert self.pages.free == self.total


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_a_column_unused_for_longest_is_given_up_first_and_later_ones_before_earlier():
    pages = Pages(3)
    chains = []
    assert pages.promise(3)
    for text in ([1, 1], [2]):
        before, chain = "salt", []
        for token in text:
            column = Column({0: pages.take()})
            before = pages.publish(column, before, (token,) * PAGE, (0,) * PAGE)
            chain.append(column)
        chains.append(chain)
    for chain in chains:
        for column in reversed(chain):
            pages.release(column)
    for found in ([1, 1], [0, 1], [0, 0]):
        assert pages.promise(1)
        pages.take()
        lengths = [len(pages.find("salt", [t] * 2 * PAGE)) for t in (1, 2)]
        assert lengths == found


def test_nothing_is_found_after_forgetting_and_no_page_is_lost():
    pages, chain = Pages(4), []
    assert pages.promise(3)
    for token, before in ((1, None), (2, None), (3, 1)):
        column = Column({0: pages.take()})
        pages.publish(column, "salt" if before is None else chain[before], (token,) * PAGE, (0,))
        chain.append(column)
    pages.release(chain[0])  # the others are in use
    pages.forget()
    pages.check()
    assert (pages.free, pages.cached, pages.used) == (2, 0, 2)
    assert pages.find("salt", [1] * PAGE) == pages.find("salt", [2] * PAGE) == []
    for column in (chain[2], chain[1]):
        pages.release(column)
    pages.check()
    assert pages.free == pages.total


def test_a_table_counts_as_the_pages_whose_memory_it_takes():
    of_keys = Layout(outer=1, loops=3)
    both = Layout(outer=1, loops=3, page_bytes=1000)
    table = Table(Pages(1), both, 50, 0)
    size = table.addresses.nbytes + table.exits.nbytes
    assert both.pages(40, 10) - of_keys.pages(40, 10) == -(-size // 1000)
    assert both.fork_pages(40, 10) - of_keys.fork_pages(40, 10) == -(-size // 1000)


def test_nothing_is_found_behind_another_salt_or_other_tokens():
    pages = Pages(2)
    assert pages.promise(1)
    column = Column({0: pages.take()})
    pages.publish(column, ("loops", 3), (7,) * PAGE, (0,) * PAGE)
    assert pages.find(("loops", 3), [7] * PAGE) == [column]
    assert pages.find(("loops", 4), [7] * PAGE) == []
    assert pages.find(("loops", 3), [7] * (PAGE - 1)) == []
    assert pages.find(("loops", 3), [7] * (PAGE - 1) + [8]) == []


class Colliding:
    """Hashes like every other of its kind."""

    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return self.value == other.value


def test_equal_hashes_do_not_make_texts_equal():
    pages = Pages(2)
    assert pages.promise(1)
    column = Column({0: pages.take()})
    pages.publish(column, Colliding("a"), (7,) * PAGE, (0,) * PAGE)
    assert pages.find(Colliding("b"), [7] * PAGE) == []
    assert pages.find(Colliding("a"), [7] * PAGE) == [column]


def test_a_reader_finds_each_position_at_its_loop_or_where_it_left():
    layout = Layout(outer=1, loops=4)
    pages = Pages(layout.pages(PAGE, 4))
    assert pages.promise(pages.total)
    table = Table(pages, layout, PAGE + 4, pages.total)
    exits = [loop % 4 for loop in range(PAGE + 4)]
    written = {}
    for position, last in enumerate(exits):
        table.write(0, position)
        for loop in range(last + 1):
            written[position, loop] = table.write(layout.first + loop, position)
        table.leave(position, last)
    assert len(set(written.values())) == len(written)
    for position, last in enumerate(exits):
        for loop in range(4):
            expected = written[position, min(loop, last)]
            assert table.addresses[layout.first + loop, position] == expected
    table.release()
    assert pages.free == pages.total


def test_found_columns_are_read_as_they_were_written():
    layout = Layout(outer=2, loops=3)
    pages = Pages(20)
    assert pages.promise(20)
    table = Table(pages, layout, PAGE, 20)
    for position in range(PAGE):
        for slot in (0, 1, *range(2, 3 + position % 3)):
            table.write(slot, position)
        table.leave(position, position % 3)
    table.complete(PAGE, list(range(PAGE)), "salt")
    other = Table(pages, layout, PAGE, 0)
    other.adopt(pages.find("salt", list(range(PAGE))))
    assert np.array_equal(other.addresses, table.addresses)
    assert np.array_equal(other.exits, table.exits)


def test_the_end_of_a_text_is_given_up_before_its_start():
    layout = Layout(outer=1, loops=1)
    pages = Pages(layout.pages(3 * PAGE, 0))
    assert pages.promise(pages.total)
    table = Table(pages, layout, 3 * PAGE, pages.total)
    for position in range(3 * PAGE):
        for slot in (0, 1):
            table.write(slot, position)
        table.leave(position, 0)
    token_ids = list(range(3 * PAGE))
    table.complete(3 * PAGE, token_ids, "salt")
    table.release()
    for left in (3, 2, 1):
        assert len(pages.find("salt", token_ids)) == left
        assert pages.promise(2)
        for _ in range(2):
            pages.take()
    assert pages.find("salt", token_ids) == []


def test_pages_of_loops_that_nobody_reached_are_not_taken():
    layout = Layout(outer=1, loops=8)
    pages = Pages(layout.pages(PAGE, 0))
    assert pages.promise(9)
    table = Table(pages, layout, PAGE, 9)
    for position in range(PAGE):
        for slot in (0, 1, 2):
            table.write(slot, position)
        table.leave(position, 1)
    assert pages.used == 3
    assert pages.promised == 6
    table.complete(PAGE, [0] * PAGE, None)
    assert pages.promised == 0


@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize(("prompt", "new"), [(1, 0), (16, 0), (15, 3), (16, 1), (33, 40)])
def test_promised_pages_are_those_that_full_depth_takes(latest, prompt, new):
    layout = Layout(outer=1, loops=3, latest=latest)
    pages = Pages(500)
    promised = layout.pages(prompt, new)
    assert pages.promise(promised)
    table = Table(pages, layout, prompt + new, promised)
    for position in range(prompt + new):
        read = not latest or position < prompt
        for slot in range(layout.slots if read else layout.first):
            table.write(slot, position)
        table.leave(position, 2)
        if latest and position == prompt - 1:
            assert pages.used == -(-prompt // PAGE) * layout.slots
            table.end_prompt(prompt)
    assert table.promised == pages.promised == 0
    table.release()
    assert pages.free == 500
