"""Events on their way from the engine's thread to a coroutine."""

import asyncio
import threading

import pytest

from openmythos.inference.request import FinishEvent, TokenEvent
from openmythos.inference.server.mailbox import Mailbox, TooSlowError


class Submission:
    cancelled = False

    def cancel(self):
        self.cancelled = True


def token(number):
    return TokenEvent(choice=0, token_id=number, text="", loops=1)


END = FinishEvent(choice=0, reason="stop")


def test_events_of_many_threads_arrive_in_order_and_all():
    async def main():
        mailbox, got = Mailbox(), {}
        for _ in range(4):
            mailbox.expect(Submission(), 1)

        def engine(listener):
            for event in [*map(token, range(500)), END]:
                listener(event)

        threads = [threading.Thread(target=engine, args=(mailbox.listener(n),)) for n in range(4)]
        for thread in threads:
            thread.start()
        async for batch in mailbox.batches():
            for number, event in batch:
                got.setdefault(number, []).append(event)
        assert not any(thread.join() for thread in threads)
        assert got == {n: [*map(token, range(500)), END] for n in range(4)}

    asyncio.run(main())


def test_what_comes_while_the_reader_is_away_comes_in_one_batch():
    async def main():
        mailbox = Mailbox()
        mailbox.expect(Submission(), 1)
        for event in (token(1), token(2), END):
            mailbox.listener(0)(event)
        assert [[e for _, e in batch] async for batch in mailbox.batches()] == [
            [token(1), token(2), END]
        ]

    asyncio.run(main())


def test_more_than_may_wait_cancels_at_once_and_is_told_to_the_reader():
    async def main():
        mailbox, submission = Mailbox(most=3), Submission()
        mailbox.expect(submission, 1)
        for number in range(3):
            mailbox.listener(0)(token(number))
        await asyncio.sleep(0.01)
        assert not submission.cancelled
        mailbox.listener(0)(token(4))
        await asyncio.sleep(0.01)
        assert submission.cancelled  # though nobody has read
        with pytest.raises(TooSlowError):
            await anext(mailbox.batches())

    asyncio.run(main())


def test_closing_cancels_and_takes_no_more():
    async def main():
        closed = []
        mailbox, submission = Mailbox(on_close=closed.append), Submission()
        mailbox.expect(submission, 1)
        mailbox.close()
        assert submission.cancelled
        assert closed == [mailbox]
        mailbox.listener(0)(token(1))
        assert not mailbox._waiting

    asyncio.run(main())


def test_the_engine_does_not_fail_where_the_loop_has_ended():
    async def main():
        return Mailbox()

    asyncio.run(main()).listener(0)(token(1))
