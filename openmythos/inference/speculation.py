"""Tokens drafted by a few loops, verified by the rest of the same loops. Free of torch.

After a few loops a row passes the coda once, the token it gives enters the core as a draft, and
the row goes on. When it leaves, its true token is drawn with the same noise: if it is the
drafted one, the rows behind it stand; if not, they are dropped. What is written is therefore
what would have been written without drafts, token for token, whatever was drafted.

Nothing is computed twice but the coda: a row keeps its prelude and the slots of its first loops,
and later positions read those loops only from slots already there. The rows of one sequence run
as a wave, as those of a prompt do. LayerSkip (Elhoushi et al. 2024, arXiv 2404.16710) drafts with
the first layers of a plain transformer in the same spirit.
"""

from __future__ import annotations

from collections.abc import Sequence

from openmythos.inference.scheduler import Row, Track


def drafting(rows: Sequence[Row]) -> list[Row]:
    """Choose the rows of a tick that draft the token after them, and note that they do.

    One must have run its job's `draft_loops` and be the last of its sequence. Every position
    before it must have its entry in the coda: it has passed, or has drafted itself.
    """
    chosen: list[Row] = []
    for row in rows:
        track, job = row.track, row.track.job
        if row.loop != job.draft_loops or row.position != len(track.token_ids) - 1:
            continue
        if row.position + 1 >= len(job.token_ids) + job.new_positions:
            continue  # a token after it would never enter the core
        behind = row.position - track.passed
        before = sum(other.drafted for other in [*track.rows, *track.done.values()])
        if track.rows[-1:] == [row] and before == behind:
            row.drafted = True
            chosen.append(row)
    return chosen


def verify(track: Track, token_id: int) -> tuple[bool | None, list[Row]]:
    """Put the true token behind all that has passed; return whether the draft there was right.

    None: there was no draft. Where another token had been drafted, the rows behind are dropped
    and returned, but for those that `ready` took: the caller must forget these.
    """
    length = track.passed
    if len(track.token_ids) == length:
        track.token_ids.append(token_id)
        return None, []
    if track.token_ids[length] == token_id:
        return True, []
    dropped = [*track.rows, *track.done.values()]
    track.rows, track.done = [], {}
    track.table.exits[length:] = -1
    track.token_ids[length:] = [token_id]
    track.entered = length
    return False, dropped
