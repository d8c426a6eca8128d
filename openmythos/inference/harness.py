"""Our models in EleutherAI's lm-evaluation-harness (PyPI `lm-eval`, 0.4.13), under `openmythos`.

The harness hands over texts and asks for three things: how likely a continuation is, how likely a
whole text is, and what a model writes until a stop string. Its release knows no plugins, so
importing this file registers the class; `openmythos lm-eval` does that and then lets the
harness's own command line run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import lm_eval.models  # noqa: F401 - first, or the harness would know no model but ours
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from openmythos.config import HaltingKind
from openmythos.errors import InputError
from openmythos.inference.generate import generate
from openmythos.inference.language_model import load
from openmythos.inference.sampling import Sampling
from openmythos.inference.scoring import Continuation, Score, encode_pairs, score
from openmythos.inference.stops import HoldBack
from openmythos.inference.thinking import Thinking

NEW_TOKENS = 256
"""Tokens that a task may write where it does not say; the harness's own default."""

TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for it; the first one given counts, as in the harness."""


@runtime_checkable
class Instance(Protocol):
    """A request of the harness."""

    args: tuple[Any, ...]


@register_model("openmythos")
@final
class HarnessModel(LM):  # type: ignore[misc]  # the harness is not there when types are checked
    """A model as the harness calls it; the arguments are those of `--model_args`.

    Args:
        pretrained: folder of a model, or of a training run.
        loops: most loops a token takes; default: the model's mean.
        halting: when a token leaves the core before: none, gate, delta, kl or act.
        threshold: the rule's bound; default: its own.
        device: where to compute, as torch names it.
        batch_size: not used, because batches are made by length; nor is max_batch_size.
        max_batch_size: see there.
        unknown: refused.

    Raises:
        InputError: a value does not fit.
        CheckpointError: there is no such model.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        loops: int | None = None,
        halting: HaltingKind = "none",
        threshold: float | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        for name, value in unknown.items():
            raise InputError(
                f"model_args has {name}={value}, must have only pretrained, loops, halting and "
                "threshold: leave it out"
            )
        if pretrained is None:
            raise InputError("model_args must have pretrained=FOLDER, of a model or of a run")
        self.pretrained = str(pretrained)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness names CUDA unasked
        self.lm = load(self.pretrained, device=device)
        self._device = self.lm.model.embed.weight.device
        self.thinking = Thinking(loops=loops, halting=halting, threshold=threshold)
        end = self.lm.tokenizer.end_id
        self._score([Continuation((end,), (end,))])  # refuses loops or a rule that do not fit

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding gives it."""
        pairs = [(one.args[0], one.args[1]) for one in requests]
        asked = encode_pairs(self.lm.tokenizer, pairs)
        self._tell_cut(sum(one.cut(self.lm.model.config.max_length) > 0 for one in asked))
        return [(one.log_likelihood, one.greedy) for one in self._score(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of the model's max_length."""
        texts = self.lm.tokenizer.encode_batch([one.args[0] for one in requests])
        asked = [Continuation((self.lm.tokenizer.end_id,), tuple(token_ids)) for token_ids in texts]
        return [one.log_likelihood for one in self._score(asked)]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """What the model writes after each context, up to a stop string or the end mark.

        A context may keep what its new tokens leave of max_length, and half of that at least.
        """
        wishes = [Wish.read(one.args[1]) for one in requests]
        contexts = self.lm.tokenizer.encode_batch([one.args[0] for one in requests])
        limit = self.lm.model.config.max_length
        texts, cut = [], 0
        for context, wish in zip(tqdm(contexts, "openmythos writes"), wishes, strict=True):
            whole = [self.lm.tokenizer.end_id, *context]
            most = max(limit - len(whole), limit // 2, 1)
            kept = whole[-(limit - min(most, wish.new_tokens)) :]
            cut += len(kept) < len(whole)
            texts.append(self._write(kept, min(most, wish.new_tokens), wish))
        self._tell_cut(cut)
        return texts

    @property
    def tokenizer_name(self) -> str:
        """What the harness asks for first where a chat template is wanted.

        Raises:
            InputError: always, because no template of ours can be filled in by the harness.
        """
        raise self._no_template()

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Refuse, as `tokenizer_name` does."""
        raise self._no_template()

    def _no_template(self) -> InputError:
        # What a `chat_template.jinja` writes has end marks, which are tokens; in the texts that
        # the harness hands over, they would be characters.
        return InputError(
            f"apply_chat_template must be left out: {self.pretrained} has no chat template that "
            "the harness can fill in, and is asked in plain text"
        )

    def _write(self, token_ids: Sequence[int], new_tokens: int, wish: Wish) -> str:
        tokenizer = self.lm.tokenizer
        text, hold, shown = tokenizer.text_stream(), HoldBack(wish.stops), ""
        tokens = generate(
            self.lm.model,
            torch.tensor([token_ids], device=self._device),
            max_new_tokens=new_tokens,
            thinking=self.thinking,
            sampling=wish.sampling,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
        )
        for token in tokens:
            token_id = int(token.token_ids)
            if token_id == tokenizer.end_id:
                break
            shown += hold.push(text.push(token_id))
            if hold.stopped:
                return shown
        return shown + hold.push(text.finish()) + hold.finish()

    def _score(self, asked: Sequence[Continuation]) -> list[Score]:
        with tqdm(desc="openmythos reads", disable=len(asked) < 2) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return score(
                self.lm.model,
                asked,
                self.thinking,
                vocab_size=self.lm.tokenizer.vocab_size,
                progress=progress,
            )

    def _tell_cut(self, count: int) -> None:
        if count:
            limit = self.lm.model.config.max_length
            logging.getLogger(__name__).warning(
                "cut %d contexts on the left, to fit into max_length=%d", count, limit
            )


@dataclass(frozen=True)
class Wish:
    """What a task asks of a text to be written: its `generation_kwargs`."""

    stops: tuple[str, ...]
    new_tokens: int
    sampling: Sampling

    @classmethod
    def read(cls, given: dict[str, Any]) -> Wish:
        """Read them.

        Raises:
            InputError: one is unknown, or out of range.
        """
        asked = {name: value for name, value in given.items() if value is not None}
        until = asked.pop("until", ())
        sizes = [int(asked.pop(name)) for name in TOKEN_LIMITS if name in asked]
        new_tokens = (*sizes, NEW_TOKENS)[0]
        sampled = asked.pop("do_sample", None)
        temperature = float(asked.pop("temperature", 1.0 if sampled else 0.0))
        filters = {name: asked.pop(name) for name in ("top_k", "top_p", "min_p") if name in asked}
        if asked.get("num_beams") == 1:  # many tasks say so: one text is followed, as here
            del asked["num_beams"]
        for name, value in asked.items():
            raise InputError(
                f"generation_kwargs has {name}={value}, must have only until, do_sample, "
                f"temperature, top_k, top_p, min_p, num_beams=1 and {TOKEN_LIMITS[0]}: leave it out"
            )
        if new_tokens < 1:
            raise InputError(f"{TOKEN_LIMITS[0]}={new_tokens} must be 1 or more")
        stops = (until,) if isinstance(until, str) else tuple(until)
        sampling = Sampling(temperature=0.0 if sampled is False else temperature, **filters)
        return cls(tuple(filter(None, stops)), new_tokens, sampling)
