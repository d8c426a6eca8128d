"""A model and its tokenizer together: text in, text out."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from openmythos.config import (
    CONFIG_FILE,
    CachePolicy,
    HaltingKind,
    MythosConfig,
    WeightsChoice,
    WeightsKind,
)
from openmythos.errors import CheckpointError, InputError, TokenizerError
from openmythos.inference.generate import generate
from openmythos.inference.precision import (
    check_weights,
    find_device,
    weights_of,
    with_weights,
)
from openmythos.inference.sampling import Sampling
from openmythos.inference.shipped import REASONER, existing, find_model
from openmythos.inference.stops import HoldBack, check_stops
from openmythos.inference.thinking import Thinking
from openmythos.model.files import kept_weights, load_model
from openmythos.model.native.describe import parts_of
from openmythos.model.transformer import OpenMythos
from openmythos.numbers import whole
from openmythos.training.checkpoint import is_checkpoint
from openmythos.training.run import (
    SETTINGS,
    TOKENIZER,
    gate_trained,
    keep_trained_length,
    load_from_run,
    model_in,
    trained_length,
)
from openmythos.training.tokenizer import Tokenizer

Ending = Literal["end", "stop", "length"]
"""Why a text ended: at the end of its document, at a stop string, or where no more were to come."""


@dataclass(frozen=True)
class Piece:
    """Text that a new token made whole (possibly none), and the loops the token took."""

    text: str
    token_id: int | None
    """None: no token, but text that was held back until the end."""
    loops: int


class LanguageModel:
    """A loaded model with its tokenizer. Made by `openmythos.load`."""

    def __init__(
        self,
        model: OpenMythos,
        tokenizer: Tokenizer,
        trained_length: int | None = None,
        gate_trained: bool | None = None,
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"tokenizer has vocab_size={tokenizer.vocab_size}, and must have at most the "
                f"model's {model.config.vocab_size}: it belongs to another model"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.trained_length = trained_length
        """Tokens of the windows it was trained on, where that is known."""
        self.gate_trained = gate_trained
        """Whether its halting gate was trained, where that is known."""

    def __repr__(self) -> str:
        """Say how large it is, and what its weights are."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        config = self.model.config
        return (
            f"LanguageModel({millions:.2f} M parameters, vocab_size={self.tokenizer.vocab_size}, "
            f"max_length={config.max_length}, mean_loops={config.mean_loops}, "
            f"{weights_of(self.model)} on {self.model.embed.weight.device})"
        )

    def save(self, folder: str | Path, weights: WeightsKind | None = None) -> None:
        """Write config, weights and tokenizer, for `openmythos.load`.

        It replaces a model that is in the folder already, as Hugging Face's `save_pretrained` does;
        `openmythos export` refuses such a folder.

        Args:
            folder: made where it is missing.
            weights: what the file holds; see `OpenMythos.save_pretrained`.

        Raises:
            CheckpointError: a file cannot be written.
        """
        self.model.save_pretrained(folder, self.tokenizer, weights)
        if self.trained_length is not None:
            keep_trained_length(Path(folder), self.trained_length, gate=self.gate_trained)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 256,
        loops: int | None = None,
        halting: HaltingKind = "none",
        threshold: float | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        cache_policy: CachePolicy = "per_loop",
    ) -> str:
        """Return the text that follows `prompt`, without it.

        Args as for `stream`.
        """
        pieces = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            loops=loops,
            halting=halting,
            threshold=threshold,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            cache_policy=cache_policy,
        )
        return "".join(piece.text for piece in pieces)

    def stream(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 256,
        loops: int | None = None,
        halting: HaltingKind = "none",
        threshold: float | None = None,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        cache_policy: CachePolicy = "per_loop",
    ) -> Generator[Piece, None, Ending]:
        """Yield the text that follows `prompt`, token by token, in whole characters.

        Ends at the end-of-document token, at a stop string (not included), after
        `max_new_tokens`, or where the model's max_length is reached; which of them is what the
        generator returns: `end`, `stop` or, of the last two, `length`.

        Args:
            prompt: text to continue; empty starts a document.
            max_new_tokens: most tokens to make.
            loops: most loops a token takes; default: the model's mean. May exceed it.
            halting: when a token leaves the core before: none, gate, delta, kl, act.
            threshold: the rule's bound; None is its own default.
            temperature: 0 takes the likeliest token.
            top_k: keep the k likeliest; 0 keeps all.
            top_p: keep the likeliest whose probabilities reach p.
            min_p: keep tokens at least min_p times as likely as the likeliest.
            seed: the same seed gives the same text, here and by the engine.
            stop: strings that end the text, wherever token boundaries fall.
            cache_policy: `per_loop`, or `last` for a cache that is `loops` times smaller.

        Raises:
            InputError: a value is out of range, or the prompt fills the model's max_length.
        """
        thinking = Thinking(
            loops=loops, halting=halting, threshold=threshold, cache_policy=cache_policy
        )
        sampling = Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        if not isinstance(stop, Sequence):
            raise InputError(f"stop={stop!r} must be a string or a list of strings")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return self.write(prompt, max_new_tokens, thinking, sampling, stops)

    def write(
        self,
        prompt: str,
        max_new_tokens: int,
        thinking: Thinking,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> Generator[Piece, None, Ending]:
        """Yield text as `stream` does, with its choices in two dataclasses."""
        check_stops(stop)
        self.warn_of_gate(thinking.halting)
        token_ids = self.prompt_ids(prompt)
        room = self.model.config.max_length - len(token_ids)
        if room < 1:
            raise InputError(
                f"prompt has {len(token_ids)} tokens, and must leave room within "
                f"max_length={self.model.config.max_length}: shorten it"
            )
        tokens = generate(
            self.model,
            torch.tensor([token_ids], device=self.model.embed.weight.device),
            max_new_tokens=min(max_new_tokens, room) if whole(max_new_tokens) else max_new_tokens,
            thinking=thinking,
            sampling=sampling,
            vocab_size=self.tokenizer.vocab_size,
            end_id=self.tokenizer.end_id,
        )
        return self._pieces(((int(n.token_ids), int(n.loops)) for n in tokens), stop)

    def warn_of_gate(self, halting: HaltingKind) -> None:
        """Warn where this rule is a gate that was never trained: it knows nothing of exits."""
        if halting == "gate" and self.gate_trained is False:
            warnings.warn(
                "halting='gate' has a gate that was not trained, so its exits mean nothing: finish "
                "the run with --gate-steps 100, or take halting='delta'",
                stacklevel=3,
            )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids that a prompt is read as: behind the mark that starts a document."""
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r} must be a string")
        return [self.tokenizer.end_id, *self.tokenizer.encode(prompt)]

    def _pieces(
        self, tokens: Iterator[tuple[int, int]], stops: Sequence[str]
    ) -> Generator[Piece, None, Ending]:
        text, hold = self.tokenizer.text_stream(), HoldBack(stops)
        ending: Ending = "length"
        loops = 0
        for token_id, taken in tokens:
            if token_id == self.tokenizer.end_id:
                ending = "end"
                break
            loops = taken
            yield Piece(hold.push(text.push(token_id)), token_id, loops)
            if hold.stopped:
                return "stop"
        rest = hold.push(text.finish()) + hold.finish()
        if rest:
            yield Piece(rest, None, loops)
        return "stop" if hold.stopped else ending


def load(
    name: str | Path,
    weights: WeightsChoice | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel:
    """Load a model's folder, or a training run's: its finished model, else its last checkpoint.

    Args:
        name: the folder, or that of one checkpoint of a run.
        weights: what they are in memory, whatever the file holds. `int8` takes a quarter of the
            memory, on a CPU (see `openmythos.model.quantised.quantise`); `bf16` half; `auto` is
            `bf16` where this model reads and writes quicker so on this machine, and else `fp32`;
            `file` keeps int8 where the file has it and native code multiplies it, which is the
            quickest to write with. Default, and `file` for any other file: as
            `OpenMythos.from_pretrained`.
        device: where they lie, as for `torch.device`. Default: the CPU.

    Raises:
        InputError: there are no such `weights`, no such `device` here, or `name` is no name.
        CheckpointError: there is no model, or it is damaged.
        TokenizerError: its tokenizer is missing or damaged.
    """
    check_weights(weights)
    place = find_device(device, weights)
    folder = model_in(existing(name))
    if (folder / CONFIG_FILE).is_file():
        MythosConfig.load(folder)  # what is wrong there is said first
        if not (folder / TOKENIZER).is_file():
            raise TokenizerError(_without_tokenizer(name, folder))
        model, weights = _loaded(folder, place, weights)
        tokenizer = Tokenizer.load(folder)
    else:
        if not (is_checkpoint(folder) or (folder / SETTINGS).is_file()):
            raise CheckpointError(
                f"model={str(folder)!r} must hold {SETTINGS}, as a training run does, or "
                f"{CONFIG_FILE}, as a model does: choose another folder"
            )
        model, tokenizer = load_from_run(folder)
    model = with_weights(model.to(place), weights)
    return LanguageModel(model, tokenizer, trained_length(folder), gate_trained(folder))


def _loaded(
    folder: Path, place: torch.device, weights: WeightsChoice | None
) -> tuple[OpenMythos, WeightsChoice | None]:
    """Return a folder's model, and its weights where `file` was asked for; None: as usual."""
    if weights == "file":
        if place.type == "cpu" and kept_weights(folder) == "int8":
            model = load_model(OpenMythos, folder, int8=True)
            if parts_of(model) is not None:
                return model, "int8"
        weights = None
    return load_model(OpenMythos, folder, int8=weights == "int8"), weights


def _without_tokenizer(name: str | Path, folder: Path) -> str:
    if folder == find_model(REASONER):
        return (
            f"model={str(name)!r} must be one that reads text: walks are for `openmythos reason`, "
            "or openmythos.inference.reasoner.load_reasoner"
        )
    return (
        f"model={str(name)!r} must have a {TOKENIZER} beside its weights: save it by "
        "LanguageModel.save, or give save_pretrained its tokenizer"
    )
