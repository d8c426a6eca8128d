"""One tick after another: admit, one loop over all rows, coda, sample, back in. No threads here.

A tick runs one loop of the core over every row in flight, whatever its loop and sequence. Rows
that leave go through the coda; tokens are drawn from those that end a sequence, and enter the
core in the next tick. A request in flight thus never waits for a deeper one to leave. It may wait
for rows to read its prompt, and each of its tokens, for at most a quarter of its loops
(`scheduler.WAIT`), for others of its depth to go on together with.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.config import CachePolicy
from openmythos.errors import InputError, MythosError
from openmythos.inference.generate import check_room, not_empty
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.noise import draw_at
from openmythos.inference.pages import Pages
from openmythos.inference.passes import Passes, layout
from openmythos.inference.request import Constraint, Event, FinishReason, Request
from openmythos.inference.sampling import with_text
from openmythos.inference.scheduler import Job, Row, Scheduler, Track
from openmythos.inference.speculation import drafting, verify
from openmythos.inference.stops import HoldBack
from openmythos.inference.work import Choice, Top, Work
from openmythos.model.call import check_loops


@dataclass(kw_only=True)
class Counts:
    """What an engine has done since its start."""

    ticks: int = 0
    row_loops: int = 0
    """Rows of all ticks: positions times loops."""
    prompt_tokens: int = 0
    """Of admitted requests."""
    looked_up_tokens: int = 0
    """Of these, looked up in the prefix cache."""
    cached_tokens: int = 0
    """Of these, found there."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of those drafted, the ones that turned out to be true."""


class Ticker:
    """All requests in flight and the ticks that carry them. Used by one thread.

    Args:
        lm: model and tokenizer.
        pages: how many to allocate.
        budget: most rows of a tick, and choices in flight; see `Scheduler`.
        chunk: most positions of a prompt that enter in one tick.
        deterministic: whether results may depend on the request alone.
        prefix_sharing: whether sequences share the pages of equal beginnings.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        pages: int,
        budget: int,
        chunk: int,
        deterministic: bool,
        prefix_sharing: bool,
    ) -> None:
        self.model, self.tokenizer = lm.model, lm.tokenizer
        self.pages, self.prefix_sharing = Pages(pages), prefix_sharing
        alone, among = (lm.model.core.flops(keys, decoding=True) for keys in (1, 1025))
        self.scheduler = Scheduler(
            self.pages, budget=budget, chunk=chunk, key_weight=(among / alone - 1) / 1024
        )
        self.passes = Passes(lm.model, pages, deterministic=deterministic)
        self.works: dict[Job, Work] = {}
        self.counts = Counts()
        self._number = 0

    def prepare(self, request: Request) -> None:
        """Check what a request's own validation cannot know; may run on any thread.

        Raises:
            InputError: the model, the tokenizer or the pages cannot serve it.
        """
        config, thinking = self.model.config, request.thinking
        loops = thinking.loops_of(config)
        check_room(len(request.token_ids), request.max_new_tokens, config.max_length)
        check_loops(loops, 1, 1)
        if max(request.token_ids) >= self.tokenizer.vocab_size:
            raise InputError(
                f"token_ids holds {max(request.token_ids)}, must be below vocab_size="
                f"{self.tokenizer.vocab_size}: encode with this model's tokenizer"
            )
        if thinking.cache_policy not in get_args(CachePolicy):
            raise InputError(
                f"cache_policy={thinking.cache_policy!r} must be one of "
                f"{', '.join(get_args(CachePolicy))}"
            )
        self.model.rule(thinking.halting, thinking.threshold)  # raises where it cannot be made
        if request.draft_loops is not None and request.draft_loops >= loops:
            raise InputError(f"draft_loops={request.draft_loops} must be below loops={loops}")
        if request.choices > self.scheduler.budget:
            raise InputError(
                f"choices={request.choices} must be at most {self.scheduler.budget}, the rows of "
                "a tick: ask for fewer"
            )
        needed = self.pages_needed(request)
        if needed > self.pages.total:
            raise InputError(
                f"max_new_tokens={request.max_new_tokens} after a prompt of "
                f"{len(request.token_ids)} tokens needs {needed} pages, the cache has "
                f"{self.pages.total}: ask for fewer tokens, loops or choices, or give the engine "
                "more pages"
            )

    def pages_needed(self, request: Request, max_new_tokens: int | None = None) -> int:
        """Return the most pages that a request may need, or would with so many new tokens."""
        job = self._job(request, 0)
        if max_new_tokens is not None:
            job.max_new_tokens = max_new_tokens
        return job.pages

    def _job(self, request: Request, number: int) -> Job:
        thinking, loops = request.thinking, request.thinking.loops_of(self.model.config)
        halting = thinking.halting, thinking.threshold
        shared = self.prefix_sharing and thinking.cache_policy == "per_loop"
        return Job(
            number,
            request.token_ids,
            request.max_new_tokens,
            loops,
            request.choices,
            request.priority,
            layout(self.model, loops, thinking.cache_policy),
            salt=(loops, halting) if shared else None,
            halting=halting,
            use_cached=not request.prompt_logprobs,
            draft_loops=request.draft_loops,
        )

    def add(self, request: Request, emit: Callable[[Event], None]) -> Work:
        """Let a request that `prepare` has checked wait; its events go to `emit`."""
        job = self._job(request, self._number)
        self._number += 1
        seed = request.sampling.seed
        constraint = request.constraint
        choices = [
            Choice(
                self.tokenizer.text_stream(after=request.token_ids),
                HoldBack(request.stop),
                None if constraint is None else constraint.copy(),
            )
            for _ in range(request.choices)
        ]
        seed = secrets.randbits(63) if seed is None else seed
        work = Work(request, emit, job, seed, choices)
        thinking, used = request.thinking, {other.halting for other in self.works}
        rule = self.model.rule(thinking.halting, thinking.threshold)
        self.passes.rules.have(job.halting, rule, used)
        self.works[job] = work
        self.scheduler.add(job)
        return work

    def end(self, work: Work, reason: FinishReason, error: str | None = None) -> None:
        """End all choices of a request that have not ended, wherever it is."""
        for track in work.job.tracks:
            self.passes.stand_up([*track.rows, *track.done.values()])
        self.scheduler.drop(work.job)
        self.works.pop(work.job, None)
        for choice, state in enumerate(work.choices):
            if not state.finished:
                work.tell_finish(choice, reason, error)

    def fail(self, error: str) -> None:
        """End all requests in flight with an error; those that wait go on waiting."""
        for work in [work for work in self.works.values() if work.job.tracks]:
            self.end(work, "error", error)
        self.passes.clear()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.works

    def tick(self) -> None:
        """Admit what fits, run every row planned for a loop, and carry on what leaves.

        For some loops where nothing can change in between.
        """
        if self.passes.changed():  # before anything is taken from the cache
            self.scheduler.forget()
        for track in self.scheduler.admit():
            self._count_prompt(track)
        rows = self.scheduler.plan()
        if not rows:
            return
        self.passes.check()
        loops = self.scheduler.steady(rows) if self.passes.may_run_ahead(rows) else 1
        through = all(self._goes_through(row) for row in rows)
        fires, loops = self.passes.run(rows, loops, through=through)
        left = self.scheduler.ran(rows, fires, loops)
        self.passes.leave(left)
        self.counts.ticks += 1
        self.counts.row_loops += len(rows) * loops
        self._carry_on(drafting(rows))

    def _count_prompt(self, track: Track) -> None:
        """Count the prompt of a request just admitted, and what of it was found."""
        job, length = track.job, len(track.job.token_ids)
        self.works[job].cached_tokens = track.found
        self.counts.prompt_tokens += length
        self.counts.looked_up_tokens += length if job.looks_up else 0
        self.counts.cached_tokens += track.found

    def _carry_on(self, drafts: list[Row]) -> None:
        """Take rows that left, and those that draft, through coda and head; draw what follows."""
        rows: list[Row] = []
        for track in self.scheduler.tracks:
            rows += track.ready()
            rows += [row for row in drafts if row.track is track]
        if not rows:
            return
        wanted = [row for row in rows if self._wants_logits(row)]
        logits = self.passes.finish(rows, wanted)
        self.passes.stand_up([row for row in rows if row not in drafts])
        found: dict[Row, Tensor | None] = {}
        if logits is not None:
            logits = with_text(logits, self.tokenizer.vocab_size)
            sound = _sound(logits)
            found = {
                row: values if finite else None
                for row, values, finite in zip(wanted, logits, sound, strict=True)
            }
        gone: set[Track] = set()
        for row in rows:
            if row.track in gone or row.track not in self.scheduler.tracks:
                continue  # what it drew from turned out wrong, or its sequence has ended
            if row in drafts:
                self._draft(row, found[row])
            elif not self._pass(row, found):
                gone.add(row.track)

    def _pass(self, row: Row, found: dict[Row, Tensor | None]) -> bool:
        """Carry on one row that is through the coda; False: rows behind it are gone."""
        track = row.track
        work = self.works[track.job]
        if row.position < len(work.request.token_ids):
            work.prompt_loops.append(row.loop)
        self.scheduler.passed(row)
        if row not in found:
            return True
        logits = found[row]
        if logits is None:
            self.end(work, "error", "the model's logits are not finite")
            return False
        if row.position < len(work.request.token_ids) - 1:
            self._note_prompt(work, row, logits)
            return True
        return self._draw_next(work, row, logits)

    def _draft(self, row: Row, logits: Tensor | None) -> None:
        """Draw the token after a row before it has left, as if these were its last logits."""
        if logits is None:
            return
        track, work = row.track, self.works[row.track.job]
        token_id = self._draw_token(work, track, row.position + 1, logits)
        if token_id == self.tokenizer.end_id and work.request.stop_at_end:
            return  # nothing follows it
        track.token_ids.append(token_id)
        self.counts.drafted_tokens += 1

    def _draw_token(self, work: Work, track: Track, position: int, logits: Tensor) -> int:
        logits = not_empty(logits, track.token_ids[position - 1], self.tokenizer.end_id)
        return draw_at(logits, work.request.sampling, work.seed, track.choice, position)

    def _goes_through(self, row: Row) -> bool:
        """Whether a row, and it alone, can pass the coda as soon as it leaves, and wants logits."""
        track = row.track
        first = row.position == track.passed and not track.done
        return first and track.job.draft_loops is None and self._wants_logits(row)

    def _wants_logits(self, row: Row) -> bool:
        job = row.track.job
        last = row.position >= len(job.token_ids) - 1
        return last or self.works[job].request.prompt_logprobs

    def _note_prompt(self, work: Work, row: Row, logits: Tensor) -> None:
        following = work.request.token_ids[row.position + 1]
        work.prompt_logprobs.append(_logprobs(logits, following, work.request.logprobs or 0))

    def _draw_next(self, work: Work, row: Row, logits: Tensor) -> bool:
        """Draw a token for a sequence; where its prompt has just been read, for every choice.

        False: rows behind the sequence's are gone.
        """
        tracks = [row.track]
        if row.position == len(work.request.token_ids) - 1:
            if work.request.prompt_logprobs:
                work.tell_prompt()
            if not work.request.max_new_tokens:
                self.end(work, "length")
                return False
            opened, copies = self.scheduler.fork(row.track)
            self.passes.copy(copies)
            tracks += opened
        stands = True
        for track in tracks:
            try:
                stands &= self._draw(work, track, row.loop, logits)
            except Exception as error:  # noqa: BLE001 - a constraint is the caller's own code
                self._finish(work, track, "error", error=told(error))
        return stands

    def _draw(self, work: Work, track: Track, loops: int, logits: Tensor) -> bool:
        """Draw the token behind all that has passed and tell it; False: drafts were wrong."""
        request, choice = work.request, work.choices[track.choice]
        allowed = _allow(logits, choice.constraint)
        token_id = self._draw_token(work, track, track.passed, allowed)
        ends = token_id == self.tokenizer.end_id and request.stop_at_end
        text = "" if ends else choice.hold.push(choice.text.push(token_id))
        right, dropped = verify(track, token_id)
        self.passes.stand_up(dropped)
        self.counts.accepted_tokens += right is True
        logprob: tuple[float | None, Top] = (None, ())
        if request.logprobs is not None:
            logprob = _logprobs(logits, token_id, request.logprobs)
        work.tell_token(track.choice, token_id, text, loops, logprob)
        if choice.constraint is not None and token_id != self.tokenizer.end_id:
            choice.constraint.accept(token_id)
            ends = ends or choice.constraint.finished()
        if ends or choice.hold.stopped:
            self._finish(work, track, "stop")
        elif choice.new_tokens == request.max_new_tokens:
            self._finish(work, track, "length")
        return right is not False

    def _finish(
        self, work: Work, track: Track, reason: FinishReason, error: str | None = None
    ) -> None:
        self.passes.stand_up([*track.rows, *track.done.values()])
        self.scheduler.finish(track)
        work.tell_finish(track.choice, reason, error)
        if work.finished:
            del self.works[work.job]


def told(error: BaseException) -> str:
    """Return what an error says; of one that is not ours, its kind too."""
    return str(error) if isinstance(error, MythosError) else f"{type(error).__name__}: {error}"


def vocabulary_mask(constraint: Constraint, vocab: int) -> np.ndarray:
    """Return which of `vocab` tokens a constraint allows, `(vocab,)` bool.

    Raises:
        InputError: it allows none, or its mask has another form.
    """
    mask = np.asarray(constraint.allowed())
    if mask.dtype in (np.int32, np.uint32):
        mask = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise InputError(
            f"constraint.allowed() has dtype {mask.dtype} and {mask.ndim} axes, must be bool "
            "(vocab,) or bits in int32 or uint32 words"
        )
    allowed = np.zeros(vocab, dtype=bool)
    allowed[: len(mask)] = mask[:vocab]
    if not allowed.any():
        raise InputError(
            "constraint.allowed() allows no token, must allow one until it is finished"
        )
    return allowed


def _allow(logits: Tensor, constraint: Constraint | None) -> Tensor:
    if constraint is None:
        return logits
    allowed = torch.from_numpy(vocabulary_mask(constraint, len(logits)))
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def _logprobs(logits: Tensor, token_id: int, count: int) -> tuple[float, Top]:
    """Logprob of a token, and the `count` likeliest with theirs."""
    wide = logits.float() if logits.itemsize < 4 else logits
    logprobs = wide.log_softmax(-1)
    return float(logprobs[token_id]), likeliest(logprobs, count)


def _sound(logits: Float[Tensor, "rows vocab"]) -> list[bool]:
    """Whether all of each row is finite. NumPy takes a tenth of torch's time for one row."""
    if logits.device.type == "cpu" and logits.itemsize > 2:
        return [bool(np.isfinite(row).all()) for row in logits.numpy()]
    return logits.isfinite().all(-1).tolist()


def likeliest(logprobs: Float[Tensor, " vocab"], count: int) -> Top:
    """Return the `count` likeliest tokens with their logprobs, ties by lower id.

    The smallest that counts is found first, and only what reaches it is sorted: for 20 of 32,768
    that takes 0.08 ms, where a stable sort of all takes 2.5.
    """
    if not count:
        return ()
    least = logprobs.topk(min(count, len(logprobs)), sorted=False).values.min()
    values = logprobs.cpu().numpy()
    ids = np.flatnonzero(values >= least.cpu().numpy())
    ids = ids[np.argsort(-values[ids], kind="stable")[:count]]
    return tuple(zip(ids.tolist(), values[ids].tolist(), strict=True))
