"""Token ids on disk, memory-mapped, and which of them make up a batch.

A file is 4096 bytes of JSON and blanks, then the ids as uint16 or uint32, little-endian, each
document followed by the end mark. The ids are read as a ring, so that the first has a context
too: the end mark that closes the last document.
"""

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np
from jaxtyping import Int, Int64

from openmythos.errors import DataError, TokenizerError
from openmythos.files import NO_ROOM, flush_to_disk, written_together
from openmythos.training.tokenizer import Tokenizer

_FORMAT = "openmythos tokens 1"
_HEADER_BYTES = 4096
_TEXT_AT_ONCE = 1 << 20  # characters that are tokenised together


@final
class Windows(NamedTuple):
    """Where to read a file for measuring: `read(starts[i : i + batch_size], length)`."""

    starts: Int64[np.ndarray, " windows"]
    first: Int64[np.ndarray, " windows"]
    """Of a window's predictions, those from this one on count; those before were counted."""
    length: int
    """Predictions in each window: as asked for, or fewer where the file is shorter."""


@final
class TokenFile:
    """The token ids of one side of a corpus.

    A batch is a pure function of the seed and of the samples' numbers, counted over the whole
    training: nothing else is needed to resume.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = _read_header(self.path)
        self.tokens: int = header["tokens"]
        """How many ids there are, end marks too."""
        self.bytes: int = header["bytes"]
        """How many bytes of UTF-8 they stand for."""
        self.documents: int = header["documents"]
        self.vocab_size: int = header["vocab_size"]
        self.tokenizer_fingerprint: str = header["tokenizer"]
        self.source_fingerprint: str = header["source"]
        self._ids = np.memmap(
            self.path, dtype=header["dtype"], mode="r", offset=_HEADER_BYTES, shape=(self.tokens,)
        )
        if zlib.crc32(self._ids.data) != header["crc32"]:
            raise _damaged(self.path, "its checksum differs")

    def comes_from(self, source_fingerprint: str, tokenizer_fingerprint: str) -> bool:
        """Whether it was made of this text by this tokenizer."""
        made_of = (self.source_fingerprint, self.tokenizer_fingerprint)
        return made_of == (source_fingerprint, tokenizer_fingerprint)

    def windows_per_epoch(self, length: int) -> int:
        """How many windows of `length` predicted tokens fit beside each other.

        Raises:
            DataError: not even one does.
        """
        if self.tokens < length + 1:
            raise DataError(
                f"tokens={self.tokens} of {str(self.path)!r} must be at least {length + 1}, which "
                "is one window and the token after it: give more text or a smaller length"
            )
        return self.tokens // length

    def batch(
        self, samples: Sequence[int] | Int[np.ndarray, " batch"], length: int, *, seed: int
    ) -> Int64[np.ndarray, "batch sequence"]:
        """Return `length` + 1 ids for each sample, by its number since the start of training.

        An epoch has every window once, in an order and from an offset of its own.

        Raises:
            DataError: as for `windows_per_epoch`.
        """
        windows = self.windows_per_epoch(length)
        starts = [
            _epoch_starts(windows, length, seed, sample // windows)[sample % windows]
            for sample in map(int, samples)
        ]
        return self.read(np.array(starts, dtype=np.int64), length)

    def windows(self, length: int, stride: int | None = None) -> "Windows":
        """Return windows that cover the file, so that each token is predicted exactly once.

        A window gives each of its predictions at least `length` - `stride` tokens of context,
        but for those at the start of the file.

        Args:
            length: predictions in a window.
            stride: tokens from one window to the next. Default: `length`, no overlap.

        Raises:
            DataError: `stride` is not from 1 to `length`.
        """
        stride = length if stride is None else stride
        if not 1 <= stride <= length:
            raise DataError(f"stride={stride} must be from 1 to length={length}: choose one there")
        length = min(length, self.tokens)
        ends = np.arange(length, self.tokens + stride, stride, dtype=np.int64)
        ends = ends.clip(max=self.tokens)
        first = length - np.diff(ends, prepend=0)
        # The first id only gives context; before that of the file stands the last end mark.
        return Windows(starts=ends - length - 1, first=first, length=length)

    def texts(self, tokenizer: Tokenizer) -> Iterator[str]:
        """Yield the documents that the ids were made of.

        Raises:
            TokenizerError: it is not the one that made them.
        """
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise TokenizerError(
                f"tokenizer must be the one that made {str(self.path)!r}, and is another: take "
                "that of the same run"
            )
        start = 0
        for end in np.flatnonzero(self._ids == tokenizer.end_id).tolist():
            yield tokenizer.decode(self._ids[start:end].tolist())
            start = end + 1

    def read(
        self, starts: Int64[np.ndarray, " batch"], length: int
    ) -> Int64[np.ndarray, "batch sequence"]:
        """Return `length` + 1 ids from each start, around the ring."""
        places = (starts[:, None] + np.arange(length + 1)) % self.tokens
        return self._ids[places].astype(np.int64)


@final
class Wanted(NamedTuple):
    """A file of tokens to write."""

    path: Path
    least_tokens: int
    """Fewer are refused."""


def write_tokens(
    path: Path, documents: Iterable[str], tokenizer: Tokenizer, *, source: str, least_tokens: int
) -> None:
    """Tokenise documents into a file, whole or not at all.

    Args:
        path: of the file.
        documents: what it is made of.
        tokenizer: the model's.
        source: the fingerprint of the text.
        least_tokens: fewer are refused.

    Raises:
        DataError: fewer than `least_tokens` come out, or the file cannot be written.
    """
    _write((Wanted(path, least_tokens),), ((0, text) for text in documents), tokenizer, source)


def write_sides(
    sides: tuple[Wanted, Wanted],
    documents: Iterable[tuple[bool, str]],
    tokenizer: Tokenizer,
    *,
    source: str,
) -> None:
    """Tokenise documents into two files in one pass, both whole or none.

    Args:
        sides: the file of the documents marked False, and that of those marked True.
        documents: each with its mark before it.
        tokenizer: the model's.
        source: the fingerprint of the text.

    Raises:
        DataError: as for `write_tokens`.
    """
    _write(sides, documents, tokenizer, source)


def _write(
    wanted: Sequence[Wanted],
    documents: Iterable[tuple[int, str]],
    tokenizer: Tokenizer,
    source: str,
) -> None:
    """Fill the files that are wanted, all in one folder, and put them in place together."""
    try:
        with written_together(wanted[0].path.parent) as beside, ExitStack() as opened:
            files = [opened.enter_context((beside / one.path.name).open("wb")) for one in wanted]
            sides = [
                _Ids(file, tokenizer, one.least_tokens)
                for file, one in zip(files, wanted, strict=True)
            ]
            for number, text in documents:
                sides[number].add(text)
            for side in sides:
                side.finish(source)
            opened.close()
            for one in wanted:
                flush_to_disk(beside / one.path.name)
    except OSError as error:
        room = "make room for about as many bytes as the text has, or choose another folder"
        advice = room if error.errno in NO_ROOM else "choose another folder"
        raise DataError(
            f"tokens={str(wanted[0].path)!r} must be written, but {error.strerror}: {advice}"
        ) from error


class _Ids:
    """The ids of one file, written in bunches: worth the cores, and none fills the memory."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, least_tokens: int) -> None:
        self.file, self.tokenizer, self.least_tokens = file, tokenizer, least_tokens
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self.documents = self.bytes = self.tokens = self.checksum = self.characters = 0
        self.bunch: list[str] = []
        file.write(b" " * _HEADER_BYTES)

    def add(self, text: str) -> None:
        """Write a document, now or with others that follow."""
        self.bunch.append(text)
        self.characters += len(text)
        if self.characters >= _TEXT_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        encoded, end = self.tokenizer.encode_batch(self.bunch), self.tokenizer.end_id
        ids = np.fromiter(chain.from_iterable([*e, end] for e in encoded), self.dtype)
        self.file.write(ids.tobytes())
        self.checksum = zlib.crc32(ids.data, self.checksum)
        self.documents += len(self.bunch)
        self.bytes += sum(len(text.encode()) for text in self.bunch)
        self.tokens += len(ids)
        self.bunch, self.characters = [], 0

    def finish(self, source: str) -> None:
        """Write what is left, and what is said of all of it at the beginning."""
        self._flush()
        if self.tokens < self.least_tokens:
            raise DataError(
                f"tokens={self.tokens} to train on, of {self.bytes:,} bytes, must be at least "
                f"{self.least_tokens}, which is one batch: give more text, or a smaller batch"
            )
        header = {
            "format": _FORMAT,
            "source": source,
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "dtype": self.dtype.str,
            "crc32": self.checksum,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
        }
        self.file.seek(0)
        self.file.write(json.dumps(header, indent=1).encode().ljust(_HEADER_BYTES - 1) + b"\n")


@functools.lru_cache(maxsize=4)
def _epoch_starts(
    windows: int, length: int, seed: int, epoch: int
) -> Int64[np.ndarray, " windows"]:
    """Where the windows of an epoch start, in its order."""
    random = np.random.default_rng([seed, epoch])
    offset = random.integers(length)
    return offset + length * random.permutation(windows)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"tokens={str(path)!r} must be readable ({error.strerror}): prepare the text again"
        ) from None
    try:
        header: dict[str, Any] = json.loads(raw)
        if header["format"] != _FORMAT:
            raise _damaged(path, f"its format is {header['format']!r}")
        expected = _HEADER_BYTES + header["tokens"] * np.dtype(header["dtype"]).itemsize
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise _damaged(path, "its first 4096 bytes are not a header") from None
    if size != expected:
        raise _damaged(path, f"it has {size} bytes of {expected}")
    return header


def _damaged(path: Path, how: str) -> DataError:
    return DataError(
        f"tokens={str(path)!r} must be a whole file of tokens, but {how}: delete it, and it is "
        "made again from the text"
    )
