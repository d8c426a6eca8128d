"""What a submission tells its listeners and readers, whatever becomes of them."""

import pytest

from openmythos.errors import InputError
from openmythos.inference.request import FinishEvent, Request, TokenEvent
from openmythos.inference.submission import Submission


def submission(choices=1):
    request = Request(token_ids=(1,), max_new_tokens=9, choices=choices)
    return Submission(request, lambda _: None)


def token(number, choice=0):
    return TokenEvent(choice=choice, token_id=number, text="", loops=1)


def failing(event):
    raise RuntimeError("the loop is closed")


@pytest.mark.parametrize("replayed", [True, False])
def test_a_listener_that_fails_is_dropped_and_the_request_cancelled(replayed, caplog):
    cancelled, heard = [], []
    one = Submission(Request(token_ids=(1,), max_new_tokens=9), cancelled.append)
    calls = []

    def listener(event):
        calls.append(event)
        failing(event)

    if replayed:
        one.deliver(token(0))
    one.add_listener(listener)
    one.add_listener(heard.append)
    for number in (1, 2):
        one.deliver(token(number))
    assert len(calls) == 1
    assert cancelled == [one]
    assert [event.token_id for event in heard] == [0, 1, 2][not replayed :]
    assert "a listener failed" in caplog.text


def test_events_handed_over_are_heard_and_kept_no_more():
    one, heard, others = submission(), [], []
    one.add_listener(others.append)
    one.deliver(token(0))
    reader = iter(one)
    assert next(reader).token_id == 0
    one.hand_over(heard.append)
    one.deliver(token(1))
    one.deliver(FinishEvent(choice=0, reason="length"))
    assert one.finished
    assert len(heard) == 3
    assert heard == others
    assert not one._events
    for read in (lambda: next(reader), lambda: list(one), lambda: one.add_listener(heard.append)):
        with pytest.raises(InputError, match="were handed over to a listener"):
            read()


def test_choices_still_open_are_closed_in_order():
    one, heard = submission(choices=3), []
    one.add_listener(heard.append)
    one.deliver(FinishEvent(choice=1, reason="stop"))
    one.close("error", "it broke")
    assert [(e.choice, e.reason) for e in one] == [(1, "stop"), (0, "error"), (2, "error")]
    assert list(one) == heard
