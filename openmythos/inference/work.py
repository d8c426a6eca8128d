"""A request on its way through the engine: what its choices have written, and what callers hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from openmythos.inference.request import (
    Constraint,
    Event,
    FinishEvent,
    FinishReason,
    PromptEvent,
    Request,
    TokenEvent,
)
from openmythos.inference.scheduler import Job
from openmythos.inference.stops import HoldBack
from openmythos.training.tokenizer import TextStream

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens with their logprobs."""


@dataclass(eq=False)
class Choice:
    """What one choice has written."""

    text: TextStream
    hold: HoldBack
    constraint: Constraint | None
    new_tokens: int = 0
    loops: int = 0
    finished: bool = False


@dataclass(eq=False)
class Work:
    """A request in the engine."""

    request: Request
    emit: Callable[[Event], None]
    job: Job
    seed: int
    choices: list[Choice]
    cached_tokens: int = 0
    prompt_loops: list[int] = field(default_factory=list)
    """Loops of the prompt's positions, as they come through the coda."""
    prompt_logprobs: list[tuple[float, Top]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finished for choice in self.choices)

    def tell_prompt(self) -> None:
        """Tell that the prompt has been read."""
        self.emit(
            PromptEvent(
                logprobs=(None, *(logprob for logprob, _ in self.prompt_logprobs)),
                top_logprobs=((), *(top for _, top in self.prompt_logprobs)),
                loops=tuple(self.prompt_loops),
            )
        )

    def tell_token(
        self, number: int, token_id: int, text: str, loops: int, logprob: tuple[float | None, Top]
    ) -> None:
        """Count a token that choice `number` has drawn, and tell it."""
        choice = self.choices[number]
        choice.new_tokens += 1
        choice.loops += loops
        self.emit(
            TokenEvent(
                choice=number,
                token_id=token_id,
                text=text,
                loops=loops,
                logprob=logprob[0],
                top_logprobs=logprob[1],
            )
        )

    def tell_finish(self, number: int, reason: FinishReason, error: str | None = None) -> None:
        """End choice `number` and tell it; where the last text completes a stop, that ended it."""
        choice, text = self.choices[number], ""
        if not choice.hold.stopped:
            text = choice.hold.push(choice.text.finish()) + choice.hold.finish()
        if reason == "length" and choice.hold.stop is not None:
            reason = "stop"
        choice.finished = True
        self.emit(
            FinishEvent(
                choice=number,
                reason=reason,
                text=text,
                stop=choice.hold.stop if reason == "stop" else None,
                error=error,
                prompt_tokens=len(self.request.token_ids),
                cached_tokens=self.cached_tokens,
                new_tokens=choice.new_tokens,
                loops=choice.loops,
                prompt_loops=sum(self.prompt_loops),
            )
        )
