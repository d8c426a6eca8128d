"""Rows run in an order in which everything they read has been written, and all comes to an end."""

import math
import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from openmythos.inference.pages import PAGE, Layout, Pages
from openmythos.inference.scheduler import SPARE, WAIT, Job, Scheduler
from openmythos.inference.speculation import drafting, verify


def chance(*of):
    """A number that looks random and depends on its arguments alone."""
    return zlib.crc32(repr(of).encode()) % 997  # a prime, or parities would go together


class Serving(RuleBasedStateMachine):
    """Jobs of all kinds, whose exits and tokens are pure functions of what came before them.

    A storage beside notes what each address holds; every read of every row is compared with what
    a reader at its loop must find.
    """

    @initialize(
        total=st.integers(30, 90),
        budget=st.integers(1, 9),
        chunk=st.integers(1, 20),
        key_weight=st.sampled_from([0.0, 0.1]),
    )
    def make(self, total, budget, chunk, key_weight):
        self.pages = Pages(total)
        self.scheduler = Scheduler(self.pages, budget=budget, chunk=chunk, key_weight=key_weight)
        self.storage, self.coda, self.jobs, self.number = {}, {}, [], 0
        self.overtaken = {}

    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 40),
        new=st.integers(1, 20),
        loops=st.integers(1, 4),
        choices=st.sampled_from([1, 1, 2, 3, 8, 9]),
        priority=st.integers(0, 1),
        kind=st.sampled_from(["shared", "private", "fresh", "latest"]),
        draft=st.sampled_from([None, 1, 2]),
    )
    def add(self, start, length, new, loops, choices, priority, kind, draft):
        token_ids = tuple(chance(start, at // 20) % 3 for at in range(length))
        shared = kind in ("shared", "fresh")
        job = Job(
            self.number,
            token_ids,
            new,
            loops,
            choices,
            priority,
            Layout(outer=1, loops=loops, latest=kind == "latest"),
            salt=("salt", loops) if shared else None,
            use_cached=kind == "shared",
            draft_loops=None if kind == "latest" or draft == loops else draft,
        )
        if job.pages > self.pages.total or choices > self.scheduler.budget:
            return
        self.number += 1
        self.jobs.append(job)
        self.scheduler.add(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data):
        job = self.jobs.pop(data.draw(st.integers(0, len(self.jobs) - 1)))
        self.scheduler.drop(job)
        assert not job.tracks

    @rule(count=st.integers(1, 6))
    def ticks(self, count):
        for _ in range(count):
            self.tick()
            self.scheduler.check()

    def tick(self):
        scheduler = self.scheduler
        self.admit()
        decoding = [track for track in scheduler.tracks if track.decoding]
        reading = [track for track in scheduler.tracks if not track.decoding]
        rows = scheduler.plan()
        assert len(rows) <= scheduler.budget + scheduler.budget // SPARE
        held = scheduler.held
        assert {row.track for row in rows} | set(held) >= set(decoding)
        assert all(track.waited < track.job.loops // WAIT and not track.rows for track in held)
        prompts = [row for row in rows if not row.track.decoding]
        running = {row.track for row in rows if row.track.decoding}
        if running:
            half = max(1, scheduler.budget // 2)
            work = [scheduler._work(row.position) for row in prompts]
            assert len(prompts) <= half
            assert sum(work) <= half + max(work, default=0)
        if reading:
            # The first one advances in every tick, so each does that becomes the first.
            first = [row for row in prompts if row.track is reading[0]]
            assert first
            if not (running and scheduler.key_weight):
                assert 2 * len(first) >= len(prompts) or len(first) == len(reading[0].rows)
        assert bool(rows) == bool(scheduler.tracks)
        self.may_run(rows)
        for row in rows:
            self.run(row)
        for row in rows:
            self.read(row)
        scheduler.ran(rows, [self.fires(row) for row in rows])
        drafts, out = drafting(rows), []
        for track in scheduler.tracks:
            out += track.ready() + [row for row in drafts if row.track is track]
        for row in out:
            self.pass_coda(row)
        gone = set()
        for row in out:
            if row.track in gone or row.track not in scheduler.tracks:
                continue
            if row in drafts:
                prefix = tuple(row.track.token_ids)
                right = chance("right", prefix) % 3 > 0
                row.track.token_ids.append((self.token(row.track, prefix) + 1 - right) % 3)
            else:
                assert row.position == row.track.passed
                scheduler.passed(row)
                if not self.carry_on(row):
                    gone.add(row.track)

    def admit(self):
        """What passes what, and that nobody is left who may start."""
        scheduler = self.scheduler
        places = sum(1 + track.job.unopened for track in scheduler.tracks)
        started = [track.job for track in scheduler.admit()]
        waiting = sorted(
            (job for *_, job in scheduler.waiting), key=lambda job: (-job.priority, job.number)
        )
        for job in waiting:
            passing = [other for other in started if other.priority < job.priority]
            assert not passing, "a job has passed one of higher priority"
            passing = [o for o in started if o.priority == job.priority and o.number > job.number]
            pages = sum(other.pages for other in passing)
            self.overtaken[job] = self.overtaken.get(job, 0) + pages
            assert self.overtaken[job] <= job.pages
        if started:
            return
        several = any(len(track.job.tracks) + track.job.unopened > 1 for track in scheduler.tracks)
        spare = scheduler.budget // SPARE if several else 0
        room = math.inf
        for job in waiting:
            if job.priority < waiting[0].priority:
                break
            most = scheduler.budget + (spare if job.choices == 1 else 0)
            fits = job.pages <= scheduler.pages.available and places + job.choices <= most
            assert not (fits and job.pages <= room), "a job waits that may start"
            room = min(room, job.pages - self.overtaken[job])

    def may_run(self, rows):
        """Every earlier position has run this loop, or runs it now, or has left."""
        now = {(id(row.track), row.position) for row in rows}
        for row in rows:
            for other in row.track.rows:
                if other.position < row.position:
                    runs = (id(row.track), other.position) in now
                    assert other.loop > row.loop or (other.loop == row.loop and runs)

    def content(self, track, position, slot):
        return (*track.job.layout.__dict__.values(), tuple(track.token_ids[: position + 1]), slot)

    def run(self, row):
        track, slot = row.track, row.track.slot(row)
        if row.loop == 0:
            self.storage[track.table.write(0, row.position)] = self.content(track, row.position, 0)
        name = row.loop if slot >= track.job.layout.first else "latest"
        address = track.table.write(slot, row.position)
        self.storage[address] = self.content(track, row.position, name)
        if (also := track.also(row)) is not None:
            address = track.table.write(also, row.position)
            self.storage[address] = self.content(track, row.position, "latest")

    def read(self, row):
        track, slot = row.track, row.track.slot(row)
        for position in range(row.position + 1):
            exit_loop = track.table.exits[position]
            loop = row.loop if exit_loop < 0 else min(row.loop, int(exit_loop))
            name = loop if slot >= track.job.layout.first else "latest"
            held = self.storage[track.table.addresses[slot, position]]
            assert held == self.content(track, position, name)
            outer = self.storage[track.table.addresses[0, position]]
            assert outer == self.content(track, position, 0)

    def pass_coda(self, row):
        track = row.track
        self.coda[track.table.write(0, row.position)] = tuple(track.token_ids[: row.position + 1])
        for position in range(row.position + 1):
            held = self.coda[track.table.addresses[0, position]]
            assert held == tuple(track.token_ids[: position + 1])

    @staticmethod
    def token(track, prefix):
        return chance("token", prefix, track.choice) % 3

    @staticmethod
    def fires(row):
        prefix = tuple(row.track.token_ids[: row.position + 1])
        return chance("exit", prefix, row.loop) % 3 == 0

    def carry_on(self, row):
        track, job = row.track, row.track.job
        if row.position < len(job.token_ids) - 1:
            return True
        tracks, stands = [track], True
        if row.position == len(job.token_ids) - 1:
            opened, copies = self.scheduler.fork(track)
            for source, target in copies:
                for offset in range(PAGE):
                    for held in (self.storage, self.coda):
                        if source * PAGE + offset in held:
                            held[target * PAGE + offset] = held[source * PAGE + offset]
            tracks += opened
        for track in tracks:
            prefix = tuple(track.token_ids[: track.passed])
            token = self.token(track, prefix)
            right, dropped = verify(track, token)
            assert right is False or not dropped
            assert track.token_ids[track.passed] == token
            stands &= right is not False
            written = track.passed + 1 - len(job.token_ids)
            if written == job.max_new_tokens or chance("end", prefix) % 10 == 0:
                self.scheduler.finish(track)
        if not job.tracks:
            self.jobs.remove(job)
        return stands

    @invariant()
    def books_are_right(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if not self.jobs:
                break
            self.tick()
        assert not self.jobs, "a job never ends"
        self.scheduler.check()
        assert self.pages.used == self.pages.promised == 0
        assert self.pages.free + self.pages.cached == self.pages.total


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def one_job(*, length, loops, budget, chunk, new=1, key_weight=0.0):
    layout = Layout(outer=1, loops=loops)
    pages = Pages(1000)
    scheduler = Scheduler(pages, budget=budget, chunk=chunk, key_weight=key_weight)
    scheduler.add(Job(0, tuple(range(length)), new, loops, 1, 0, layout))
    scheduler.admit()
    return scheduler


def carry(scheduler):
    """Take what is ready through the coda."""
    ready = [row for track in scheduler.tracks for row in track.ready()]
    for row in ready:
        scheduler.passed(row)
    return ready


def test_a_prompt_runs_as_a_wave_its_parts_one_loop_apart():
    scheduler = one_job(length=12, loops=3, budget=12, chunk=4)
    shapes = []
    while True:
        rows = scheduler.plan()
        if not rows:
            break
        shapes.append([[row.loop for row in rows].count(loop) for loop in range(3)])
        scheduler.ran(rows, [False] * len(rows))
        carry(scheduler)
    assert shapes == [[4, 0, 0], [4, 4, 0], [4, 4, 4], [0, 4, 4], [0, 0, 4]]


def test_a_position_passes_the_coda_only_after_all_before_it_have_left():
    scheduler = one_job(length=3, loops=4, budget=8, chunk=8)
    passed = []
    while True:
        rows = scheduler.plan()
        if not rows:
            break
        # The rule fires at once on the last position; the others run to the end.
        scheduler.ran(rows, [row.position == 2 for row in rows])
        passed.append([(row.position, row.loop) for row in carry(scheduler)])
    assert passed == [[], [], [], [(0, 4), (1, 4), (2, 2)]]


def prompt_beside_a_writer(length, key_weight=0.0):
    scheduler = one_job(length=1, loops=2, budget=8, chunk=8, new=50, key_weight=key_weight)
    for _ in range(2):
        rows = scheduler.plan()
        scheduler.ran(rows, [False])
        carry(scheduler)
    scheduler.tracks[0].token_ids.append(0)
    scheduler.add(Job(1, tuple(range(length)), 1, 2, 1, 0, Layout(outer=1, loops=2)))
    scheduler.admit()
    return scheduler


def test_a_long_prompt_leaves_half_of_a_tick_to_those_that_write():
    rows = prompt_beside_a_writer(100).plan()
    assert [row.track.job.number for row in rows] == [0, 1, 1, 1, 1]


def test_deep_in_a_prompt_fewer_rows_make_up_half_of_a_tick():
    scheduler = prompt_beside_a_writer(15, key_weight=0.4)
    _, prompt = scheduler.tracks
    taken = []
    while not prompt.decoding:
        rows = [row for row in scheduler.plan() if row.track is prompt]
        taken.append([row.position for row in rows])
        assert sum(1 + 0.4 * row.position for row in rows) <= 4 or len(rows) == 1
        scheduler.ran(rows, [False] * len(rows))
        carry(scheduler)
    assert taken[0] == [0, 1]  # 1 + 1.4, where another would make 4.2
    assert taken[-1] == [14]


def phases(late, loops=(8, 8), ticks=28):
    """Ticks in which two sequences enter the core, the second one started `late` ticks later."""
    scheduler = Scheduler(Pages(400), budget=8, chunk=8)
    entered = [[], []]
    for tick in range(ticks):
        for number in (0, 1):
            if tick == number * late:
                layout = Layout(outer=1, loops=loops[number])
                scheduler.add(Job(number, (1,), 90, loops[number], 1, 0, layout))
        scheduler.admit()
        rows = scheduler.plan()
        for row in rows:
            if row.loop == 0:
                entered[row.track.job.number].append(tick)
        scheduler.ran(rows, [False] * len(rows))
        for row in carry(scheduler):
            row.track.token_ids.append(0)
        scheduler.check()
    return entered


def test_sequences_of_one_depth_meet_and_stay_together():
    first, second = phases(late=2)
    assert first[:3] == [0, 8, 18]  # held back for 2 loops, once
    assert second[:3] == [2, 10, 18]
    assert second[2:] == first[2:]


def test_nobody_waits_for_more_than_a_part_of_its_loops_nor_for_another_depth():
    first, second = phases(late=3)
    assert first[:3] == [0, 8, 16]
    assert second[:3] == [3, 11, 19]
    shallow, deep = phases(late=1, loops=(2, 8))
    assert shallow == list(range(0, 28, 2))
    assert deep == list(range(1, 28, 8))


def test_drafted_tokens_run_a_few_loops_behind_and_fall_where_one_was_wrong():
    scheduler = one_job(length=1, loops=4, budget=8, chunk=8, new=20)
    job = scheduler.tracks[0].job
    job.draft_loops = 1
    track, loops = scheduler.tracks[0], []
    for _ in range(4):
        rows = scheduler.plan()
        loops.append([row.loop for row in rows])
        scheduler.ran(rows, [False] * len(rows))
        for row in drafting(rows):
            row.track.token_ids.append(5)
    assert loops == [[0], [1, 0], [2, 1, 0], [3, 2, 1, 0]]
    assert [row.position for row in carry(scheduler)] == [0]
    assert verify(track, 5) == (True, [])
    rows = scheduler.plan()
    scheduler.ran(rows, [False] * len(rows))
    assert [row.position for row in carry(scheduler)] == [1]
    right, dropped = verify(track, 6)
    assert right is False
    assert [row.position for row in dropped] == [2, 3, 4]
    assert track.token_ids[1:] == [5, 6]
    scheduler.check()
    assert [(row.position, row.loop) for row in scheduler.plan()] == [(2, 0)]


def job(number, *, length=1, loops=1, new=1, choices=1, priority=0):
    token_ids = tuple(range(length))
    return Job(number, token_ids, new, loops, choices, priority, Layout(outer=1, loops=loops))


def step(scheduler):
    """A tick without halting, with pages; return the jobs whose prompt has been read by it."""
    scheduler.admit()
    rows = scheduler.plan()
    for row in rows:
        for slot in (0, row.track.slot(row)):
            row.track.table.write(slot, row.position)
    scheduler.ran(rows, [False] * len(rows))
    passed = carry(scheduler)
    for track in {row.track for row in passed if row.track.decoding}:
        for one in [track, *scheduler.fork(track)[0]]:
            if one.passed == len(one.job.token_ids) + one.job.new_positions:
                scheduler.finish(one)
            else:
                one.token_ids.append(0)
    scheduler.check()
    last = [row for row in passed if row.position == len(row.track.job.token_ids) - 1]
    return [row.track.job.number for row in last]


def ticks_until_read(scheduler, number, most=10_000):
    """Ticks until a job's prompt has been read."""
    for tick in range(1, most + 1):
        if number in step(scheduler):
            return tick
    raise AssertionError(f"not read within {most} ticks")


@pytest.mark.parametrize("writers", [0, 3])
@pytest.mark.parametrize("long", [{"loops": 64}, {"loops": 8}])
@pytest.mark.parametrize("count", [1, 6])
def test_a_short_prompt_is_read_as_if_long_ones_were_not_there(writers, long, count):
    scheduler = Scheduler(Pages(100_000), budget=64, chunk=32, key_weight=0.001)
    for number in range(writers):
        scheduler.add(job(100 + number, new=2000, loops=4))
    for _ in range(8):
        step(scheduler)
    for number in range(count):
        scheduler.add(job(number, length=1000, **long))
    for _ in range(20):
        step(scheduler)
    scheduler.add(job(10, length=2))
    scheduler.add(job(11, length=3, loops=5))
    scheduler.add(job(12, length=64, loops=2))
    assert ticks_until_read(scheduler, 10, 1)
    assert ticks_until_read(scheduler, 11, 4)
    assert ticks_until_read(scheduler, 12, 8)


def test_prompts_of_one_kind_are_read_in_turn_and_no_row_is_wasted():
    scheduler = Scheduler(Pages(100_000), budget=16, chunk=8)
    for number in range(3):
        scheduler.add(job(number, length=64, loops=4))
    read, counts = [], []
    while len(read) < 3:
        scheduler.admit()
        before = sum(len(track.rows) for track in scheduler.tracks)
        read += step(scheduler)
        counts.append(before)
    assert read == [0, 1, 2]
    assert len(counts) <= 3 * 64 * 4 / 16 + 4  # as many ticks as rows fill, and a wave to end


def test_a_long_prompt_keeps_half_of_the_rows_however_many_short_ones_come():
    scheduler = Scheduler(Pages(100_000), budget=16, chunk=16)
    scheduler.add(job(0, length=400, loops=2))
    for number in range(1, 1000):
        scheduler.add(job(number, length=8, loops=2))
        scheduler.add(job(1000 + number, length=8, loops=2))
        if 0 in step(scheduler):
            break
    assert number <= 400 * 2 / 8 + 2


def test_among_prompts_the_higher_priority_is_read_first_but_for_what_the_first_one_keeps():
    scheduler = Scheduler(Pages(100_000), budget=16, chunk=16)
    for number, priority in enumerate([0, 0, 0, 1]):
        scheduler.add(job(number, length=100 - number, loops=2, priority=priority))
        scheduler.admit()
    rows = [row.track.job.number for row in scheduler.plan()]
    assert [rows.count(number) for number in range(4)] == [8, 0, 0, 8]


def test_a_small_job_passes_large_ones_for_which_pages_are_lacking():
    large = job(0, new=1000, loops=64)
    scheduler = Scheduler(Pages(2 * large.pages + 20), budget=64, chunk=32)
    for number in range(4):
        scheduler.add(job(number, new=1000, loops=64))
    for _ in range(10):
        step(scheduler)
    assert [track.job.number for track in scheduler.tracks] == [0, 1]
    scheduler.add(job(4))
    assert ticks_until_read(scheduler, 4, 1)
    scheduler.add(job(5, length=8, new=20, loops=2))
    assert ticks_until_read(scheduler, 5, 3)


def test_the_jobs_that_pass_one_need_together_no_more_pages_than_it_does():
    large = job(0, new=64, loops=4).pages
    scheduler = Scheduler(Pages(2 * large - 4), budget=8, chunk=8)
    scheduler.add(job(0, new=64, loops=4))
    scheduler.add(job(1, new=64, loops=4))
    passed = set()
    for number in range(2, 1000):  # without a bound, some of these would always be there
        scheduler.add(job(number, new=16, loops=2))
        step(scheduler)
        running = {track.job.number for track in scheduler.tracks}
        if 1 in running:
            break
        passed |= running - {0}
    assert 1 in running
    assert len(passed) == large // job(2, new=16, loops=2).pages


def test_nobody_passes_a_job_of_higher_priority():
    scheduler = Scheduler(Pages(20), budget=8, chunk=8)
    scheduler.add(job(0, new=64, loops=3))
    scheduler.admit()
    scheduler.add(job(1, new=64, loops=3, priority=1))
    scheduler.add(job(2))
    scheduler.add(job(3, priority=1))
    assert [track.job.number for track in scheduler.admit()] == [3]
    assert [job.number for *_, job in scheduler.waiting] == [1, 2]


def test_jobs_passed_and_those_behind_start_once_what_held_them_up_is_gone():
    scheduler = Scheduler(Pages(20), budget=8, chunk=8)
    first, large, small = job(0, new=64, loops=3), job(1, new=64, loops=3), job(2, new=17)
    for one in (first, large):
        scheduler.add(one)
    assert len(scheduler.admit()) == 1
    large.overtaken = large.pages
    scheduler.add(small)
    assert not scheduler.admit()
    scheduler.drop(large)
    assert [track.job for track in scheduler.admit()] == [small]


def test_a_request_whose_choices_fill_the_budget_leaves_room_for_others():
    scheduler = Scheduler(Pages(100_000), budget=64, chunk=32)
    scheduler.add(job(0, new=150, loops=3, choices=64))
    assert ticks_until_read(scheduler, 0, 3)
    scheduler.add(job(1, new=150, choices=64))
    scheduler.add(job(2, length=2))
    for number in range(3, 20):
        scheduler.add(job(number, length=20, loops=64))
    assert ticks_until_read(scheduler, 2, 1)
    assert scheduler.places == 64 + 7  # the eighth has just been read
    rows = scheduler.plan()
    assert len(rows) == 64 + 8
    assert {track for track in scheduler.tracks if track.decoding} <= {row.track for row in rows}


def test_loops_run_at_once_stay_together_within_a_ticks_budget():
    scheduler = one_job(length=2, loops=64, budget=8, chunk=8)
    assert scheduler.steady(scheduler.plan()) == 4
