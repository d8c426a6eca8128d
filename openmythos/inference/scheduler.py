"""Which rows run in a tick: admission, the order of loops, and who has left. Free of torch.

A row is a position of a sequence in the core. Rows of any loop and any sequence share a tick; the
one rule among the rows of a sequence is that a row may run loop t once every earlier position
has written slot t (in this tick at the latest) or has left the core. So the parts of a long
prompt follow each other as a wave, one loop apart.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, islice, takewhile

from openmythos.inference.pages import PAGE, Layout, Pages, Table

WAIT = 4
"""A token is held back for at most a `WAIT`th of its loops. Sequences of one depth that have met
stay together, and then share prelude, coda and ticks for the price of one wait."""

SPARE = 8
"""Beside requests of several choices a `SPARE`th of the budget is added for those of one choice, in
places and in rows. A request whose choices fill the budget would otherwise hold up all others."""


@dataclass(eq=False)
class Row:
    """A position in the core."""

    track: Track
    position: int
    loop: int = 0
    """The loop it runs next; once it has left, the loops it took."""
    drafted: bool = False
    """Whether it has passed the coda once before it left, to draft the token after it."""
    fired: bool = False
    """Whether its halting rule has fired: it leaves after the next loop."""
    seat: int = -1
    """Where its state is kept; the model's side of the engine knows."""


@dataclass(eq=False)
class Job:
    """A request, as far as its scheduling goes."""

    number: int
    """In order of arrival."""
    token_ids: tuple[int, ...]
    max_new_tokens: int
    loops: int
    choices: int
    priority: int
    layout: Layout
    salt: Hashable = None
    """What must be equal for columns to be shared, beside token ids; None: nothing is."""
    halting: Hashable = None
    """Names its halting rule to the model's side."""
    use_cached: bool = True
    """Whether its own prompt may be taken from columns that others wrote."""
    draft_loops: int | None = None
    """Loops after which its rows draft the next token; see `openmythos.inference.speculation`."""
    tracks: list[Track] = field(default_factory=list)
    """Sequences in flight; none before the job is admitted."""
    unopened: int = 0
    """Choices that wait for the prompt to be read."""
    overtaken: int = 0
    """Pages of all jobs together that came later and were admitted before it."""

    @property
    def looks_up(self) -> bool:
        """Whether its prompt is looked for in columns that others wrote."""
        return self.salt is not None and self.use_cached

    @property
    def new_positions(self) -> int:
        """Most positions after the prompt: the last token drawn never enters the core."""
        return max(0, self.max_new_tokens - 1)

    @cached_property
    def pages(self) -> int:
        """Most pages it can need, with nothing found in the cache."""
        prompt = len(self.token_ids)
        others = (self.choices - 1) * self.layout.fork_pages(prompt, self.new_positions)
        return self.layout.pages(prompt, self.new_positions) + others


@dataclass(eq=False)
class Track:
    """One choice's sequence in flight."""

    job: Job
    choice: int
    token_ids: list[int]
    table: Table
    entered: int = 0
    """Positions that have entered the core, or were found."""
    passed: int = 0
    """Positions that have left it, with all before them, and are through the coda."""
    rows: list[Row] = field(default_factory=list)
    """Rows in the core, in order of position."""
    done: dict[int, Row] = field(default_factory=dict)
    """Rows that have left the core, until all before them have and they pass the coda."""
    found: int = 0
    """Positions taken from the cache."""
    waited: int = 0
    """Loops for which its next position has been held back, to enter together with others."""

    @property
    def decoding(self) -> bool:
        """Whether the prompt has been read."""
        return self.passed >= len(self.job.token_ids)

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts prompts: by priority, then by the most loops that are left to read it."""
        unread = len(self.job.token_ids) - self.passed
        return -self.job.priority, unread * self.job.loops

    @property
    def patience(self) -> int:
        """Loops that its next position can still be held back; 0 where it is in the core."""
        if self.rows or self.job.draft_loops is not None:
            return 0
        return self.job.loops // WAIT - self.waited

    def ready(self) -> list[Row]:
        """Take the rows that can pass the coda: all positions before them have left the core."""
        rows: list[Row] = []
        while self.passed + len(rows) in self.done:
            rows.append(self.done.pop(self.passed + len(rows)))
        return rows

    def slot(self, row: Row, ahead: int = 0) -> int:
        """The slot that a row reads and writes at its loop, or so many loops ahead."""
        layout = self.job.layout
        if layout.latest and row.position >= len(self.job.token_ids):
            return layout.outer
        return layout.first + row.loop + ahead

    def also(self, row: Row) -> int | None:
        """Another slot that it writes."""
        latest = self.job.layout.latest and row.position < len(self.job.token_ids)
        return self.job.layout.outer if latest else None


class Scheduler:
    """Jobs that wait, sequences in flight, and what runs next.

    Args:
        pages: where entries are kept.
        budget: most rows of a tick, and so most sequences in flight: each that decodes always
            runs. See `SPARE` for what comes on top.
        chunk: most positions of one prompt that enter the core in one tick.
        key_weight: what each position before a row's own adds to its work, as a share of the
            work of a row that has none.
    """

    def __init__(self, pages: Pages, *, budget: int, chunk: int, key_weight: float = 0.0) -> None:
        self.pages, self.budget, self.chunk = pages, budget, chunk
        self.spare = budget // SPARE
        self.key_weight = key_weight
        self.tracks: list[Track] = []
        self.waiting: list[tuple[int, int, Job]] = []  # sorted: priority first, then arrival
        self.held: list[Track] = []  # those whose next position was held back from the last plan
        self._full: tuple[int, int] | None = None  # free pages and places when all were tried

    def add(self, job: Job) -> None:
        """Let a job wait for admission."""
        insort(self.waiting, self._entry(job))
        self._full = None

    @property
    def places(self) -> int:
        """Sequences in flight, with those that wait for their prompt to be read."""
        return sum(1 + track.job.unopened for track in self.tracks)

    @property
    def most_places(self) -> int:
        """Most places with one more job of one choice; those of several stay within the budget."""
        several = any(track.job.choices > 1 for track in self.tracks)
        return self.budget + self.spare if several else self.budget

    def admit(self) -> list[Track]:
        """Start jobs in their order, but let some that fit pass those for which too little is free.

        A job may pass others of its own priority, never one of a higher. All jobs that ever pass
        another need together no more pages than that one does itself. So small jobs get past
        large ones, and make none wait for much longer than one more job of its own size would.
        """
        if not self.waiting:
            return []
        admitted: list[Track] = []
        passed: list[Job] = []
        room = math.inf  # pages that all of `passed` still let by
        places, most = self.places, self.most_places
        # Where no more is free than when all were tried, only a prefix now found lets one in.
        tried = self._full == (self.pages.available, places)
        for *_, job in self.waiting[: 1 if tried else None]:
            outranked = passed and job.priority < passed[0].priority
            if outranked or not room or places >= most:
                break
            enough = self.budget if job.choices > 1 else most
            fits = job.pages <= room and places + job.choices <= enough
            track = self._start(job) if fits else None
            if track is None:
                passed.append(job)
                room = min(room, job.pages - job.overtaken)
                continue
            admitted.append(track)
            self.waiting.remove(self._entry(job))
            for other in passed:
                other.overtaken += job.pages
            room -= job.pages
            places, most = places + job.choices, self.most_places
        self._full = None if admitted else (self.pages.available, places)
        return admitted

    @staticmethod
    def _entry(job: Job) -> tuple[int, int, Job]:
        return -job.priority, job.number, job

    def _start(self, job: Job) -> Track | None:
        columns = []
        if job.looks_up:
            # The last position is always run, because a token is drawn from its logits.
            columns = self.pages.find(job.salt, job.token_ids[:-1])
        for column in columns:
            self.pages.share(column)  # now, or the promise below would count on its pages
        promised = job.pages - len(columns) * job.layout.slots
        track = None
        if self.pages.promise(promised):
            capacity = len(job.token_ids) + job.new_positions
            table = Table(self.pages, job.layout, capacity, promised)
            table.adopt(columns)
            length = len(columns) * PAGE
            track = Track(job, 0, list(job.token_ids), table, length, length, found=length)
            job.unopened = job.choices - 1
            job.tracks.append(track)
            self.tracks.append(track)
        for column in reversed(columns):
            self.pages.release(column)
        return track

    def drop(self, job: Job) -> None:
        """Forget a job, wherever it is."""
        entry = self._entry(job)
        if entry in self.waiting:
            self.waiting.remove(entry)
            self._full = None
        for track in list(job.tracks):
            self.finish(track)
        job.unopened = 0

    def forget(self) -> None:
        """Let nothing that has been read so far be found any more: other weights would read it."""
        self.pages.forget()
        for track in self.tracks:
            track.table.findable = False

    def plan(self) -> list[Row]:
        """Return the rows of the next tick, those of a sequence in order of position.

        Each sequence that decodes runs its first row, unless another of the same depth leaves so
        soon that its next position can wait for that one's. Prompts get at most half of the
        budget while anything decodes, and a row counts by its work there: deep in a long prompt it
        attends to so many keys that half the rows would hold up the others for several ticks'
        time. What is left goes to rows behind drafted tokens.
        """
        decoding, reading = list[Track](), list[Track]()
        for track in self.tracks:
            (decoding if track.decoding else reading).append(track)
        self.held = self._to_hold(decoding)
        decoding = [track for track in decoding if track not in self.held]
        prompts = self._read(reading, len(decoding)) if reading else []
        left = max(0, self.budget - len(decoding) - len(prompts))
        planned: list[Row] = []
        for track in decoding:
            rows = self._walk(track, 1 + left)
            left -= len(rows) - 1
            planned += rows
        return planned + prompts

    def _read(self, tracks: Sequence[Track], decoding: int) -> list[Row]:
        """Choose rows of prompts, beside so many sequences that decode.

        Half of them are kept for the prompt admitted first, so that each gets its turn. The rest
        goes to the highest priority and, within it, to the prompt with the least left to read: a
        short or shallow one hardly waits for those that are long and deep. What one does not need
        goes to the next.
        """
        most = self._most_read(decoding)
        work = float(most) if decoding else math.inf
        first, planned = tracks[0], list[Row]()
        coming = len(first.rows) + min(self.chunk, len(first.token_ids) - first.entered)
        later, later_work = most - min(coming, most - most // 2), work / 2
        for track in sorted(tracks, key=lambda track: track.urgency):
            if track is first:
                rows = self._walk(track, max(1, self._within(track, most, work)))
            else:
                rows = self._walk(track, self._within(track, later, later_work))
            done = sum(self._work(row.position) for row in rows)
            most, work = most - len(rows), work - done
            later, later_work = later - len(rows), later_work - done
            if track is first:
                later, later_work = most, work
            planned += rows
        return planned

    def _most_read(self, decoding: int) -> int:
        """Most rows of prompts beside so many sequences that decode: at least one."""
        if not decoding:
            return self.budget
        spare = min(self.spare, self.budget + self.spare - decoding)
        return min(max(self.budget - decoding, spare), max(1, self.budget // 2))

    @staticmethod
    def _to_hold(decoding: Sequence[Track]) -> list[Track]:
        """Choose sequences that wait for others of the same depth to leave."""
        soon: dict[int, int] = {}
        for track in decoding:
            if track.rows:
                row, depth = track.rows[0], track.job.loops
                left = 1 if row.fired else depth - row.loop
                soon[depth] = min(left, soon.get(depth, depth))
        return [
            track
            for track in decoding
            if soon.get(track.job.loops, track.job.loops) <= track.patience
        ]

    def _work(self, position: int) -> float:
        """What a row costs, where the first of a sequence costs 1."""
        return 1 + self.key_weight * position

    def _within(self, track: Track, most: int, work: float) -> int:
        """Return how many of a prompt's first rows stay within the work."""
        entering = range(track.entered, len(track.token_ids))
        positions = chain((row.position for row in track.rows), entering)
        together = accumulate(map(self._work, islice(positions, most)))
        return sum(1 for _ in takewhile(lambda so_far: so_far <= work, together))

    def _walk(self, track: Track, most: int) -> list[Row]:
        """Choose the first rows of one sequence, and let new positions enter behind them.

        Always the first ones, so that no row ever overtakes one before it; that alone keeps the
        rule at the top of this file.
        """
        planned = track.rows[:most]
        known = len(track.token_ids)
        entering = min(known - track.entered, self.chunk, most - len(planned))
        for position in range(track.entered, track.entered + entering):
            row = Row(track, position)
            track.rows.append(row)
            planned.append(row)
        track.entered += entering
        track.waited = 0
        return planned

    def steady(self, rows: Sequence[Row]) -> int:
        """Return how many loops these rows of a plan can run before another plan is needed.

        Until a row leaves or drafts by the number of its loops, if no other row can join and no
        job waits; its rule may end them sooner. The rows' loops together stay within a tick's
        budget, so that a request that comes in between does not wait longer than in other ticks.
        """
        count = max(1, self.budget // len(rows))
        if count == 1 or self.waiting or sum(len(track.rows) for track in self.tracks) > len(rows):
            return 1
        for track in self.tracks:
            if track in self.held:
                count = min(count, track.patience)
            elif track.entered < len(track.token_ids):
                return 1
        for row in rows:
            count = min(count, row.track.job.loops - row.loop)
            drafts = row.track.job.draft_loops
            if drafts is not None and row.loop < drafts:
                count = min(count, drafts - row.loop)
        return count

    def ran(self, rows: Sequence[Row], exits: Iterable[bool], loops: int = 1) -> list[Row]:
        """Count loops for each row; return those that have left the core.

        `exits` says on which rows the halting rule fired. A row that it fired on runs one loop
        more, so that its last slot shows the state the rule decided on.
        """
        for track in self.held:
            track.waited += loops
        left: list[Row] = []
        for row, fires in zip(rows, exits, strict=True):
            track = row.track
            row.loop += loops
            leaves = row.fired or row.loop == track.job.loops
            row.fired = fires
            if leaves:
                track.rows.remove(row)
                track.done[row.position] = row
                track.table.leave(row.position, row.loop - 1)
                left.append(row)
        return left

    @staticmethod
    def passed(row: Row) -> None:
        """Note that a row, just taken by `ready`, is through the coda."""
        track = row.track
        track.passed += 1
        track.table.complete(track.passed, track.token_ids, track.job.salt)
        if track.passed == len(track.job.token_ids):
            track.table.end_prompt(track.passed)

    def fork(self, track: Track) -> tuple[list[Track], list[tuple[int, int]]]:
        """Open the job's other choices behind a prompt just read; return pages to copy as well."""
        job, opened, copies = track.job, [], []
        promised = job.layout.fork_pages(track.passed, job.new_positions)
        for choice in range(1, job.unopened + 1):
            table, copied = track.table.fork(track.passed, promised)
            read = track.passed
            token_ids = track.token_ids[:read]  # without drafts
            other = Track(job, choice, token_ids, table, read, read, found=track.found)
            opened.append(other)
            copies += copied
        job.unopened = 0
        job.tracks += opened
        self.tracks += opened
        return opened, copies

    def finish(self, track: Track) -> None:
        """Forget a sequence and give its pages back."""
        track.table.release()
        track.job.tracks.remove(track)
        self.tracks.remove(track)
        track.rows, track.done = [], {}

    def check(self) -> None:
        """Assert what always holds, for tests."""
        self.pages.check()
        assert sum(track.table.promised for track in self.tracks) == self.pages.promised
        assert self.places <= self.budget + self.spare
        assert self.waiting == sorted(self.waiting)
        assert all(job.overtaken <= job.pages for *_, job in self.waiting)
        users: dict[int, int] = {}
        for track in self.tracks:
            assert track in track.job.tracks
            assert track.passed <= track.entered <= len(track.token_ids)
            positions = [row.position for row in track.rows]
            assert positions == sorted(positions)
            loops = [row.loop for row in track.rows]
            assert loops == sorted(loops, reverse=True), "a row has overtaken another"
            flying = {row.position for row in track.rows} | set(track.done)
            assert flying == set(range(track.passed, track.entered))
            for column in track.table.columns:
                users[id(column)] = users.get(id(column), 0) + 1
        pages: set[int] = set()
        seen: set[int] = set()
        for track in self.tracks:
            for column in track.table.columns:
                assert column.users == users[id(column)]
                if id(column) not in seen:
                    seen.add(id(column))
                    assert pages.isdisjoint(column.pages.values()), "a page has two columns"
                    pages |= set(column.pages.values())
        assert len(pages) == self.pages.used
