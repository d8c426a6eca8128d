"""Byte-level BPE: any text to token ids and back, with nothing lost.

Merges are learnt as by Sennrich et al. 2016 (arXiv 1508.07909), over bytes as in GPT-2, so no text
is out of vocabulary. Decoding joins the bytes that the tokens stand for, and decodes those.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers
from jaxtyping import Int64
from tokenizers import decoders, models, pre_tokenizers, trainers

from openmythos.errors import TokenizerError
from openmythos.files import write_atomically
from openmythos.training.run import TOKENIZER

END = "<|end|>"
"""Marks the end of a document; id 0 in tokenizers trained here."""

_END_MARKS = (END, "<|endoftext|>")
_EVERYTHING = "One  two\n\n\tIT's 4_5 \u00e9 e\u0301 \ufb01\u3000\u96ea\U0001f40b <|end|> \r\n "
_SMALLEST = 257  # every byte, and the end mark
_PIECE = 1 << 18  # characters; longer texts are encoded in pieces, to bound the memory


@final
class Tokenizer:
    """Text to token ids and back; `vocab_size` ids, of which `end_id` marks a document's end."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        # The end mark written out in a text is text: only `end_id` itself ends a document.
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._bytes = _bytes_of_tokens(inner)
        self.vocab_size = len(self._bytes)
        self.end_id = _end_id(inner)
        self.end_mark = str(inner.id_to_token(self.end_id))
        self.fingerprint = _fingerprint(inner)
        self._check_nothing_is_lost()

    def _check_nothing_is_lost(self) -> None:
        if getattr(self._inner.model, "dropout", None):
            raise TokenizerError("dropout must be 0: the same text must have the same tokens")
        given = self.decode(self.encode(_EVERYTHING))
        if given != _EVERYTHING:
            raise TokenizerError(
                f"text={_EVERYTHING!r} must come back unchanged, but comes as {given!r}: switch "
                "off the tokenizer's normalizer and add_prefix_space, and let it split as GPT-2's"
            )

    @classmethod
    def train(cls, documents: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learn merges from documents until there are `vocab_size` tokens.

        The vocabulary stays smaller when the documents repeat too little to fill it.

        Raises:
            TokenizerError: `vocab_size` is below 257 (every byte and the end mark).
        """
        if vocab_size < _SMALLEST:
            raise TokenizerError(
                f"vocab_size={vocab_size} must be at least {_SMALLEST}, which is every byte and "
                f"the end mark: choose {_SMALLEST} or more"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(_BYTE_OF_CHARACTER),
            show_progress=False,
        )
        pieces = (piece for document in documents for piece in _pieces(document))
        inner.train_from_iterator(pieces, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            TokenizerError: it is missing, damaged or not byte-level BPE.
        """
        path = Path(path)
        if path.is_dir():
            path = path / TOKENIZER
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise TokenizerError(
                f"tokenizer={str(path)!r} must exist: give the path of a tokenizer.json"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"tokenizer={str(path)!r} must be readable ({error}): give another tokenizer.json"
            ) from error
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(
                f"tokenizer={str(path)!r} must be a whole tokenizer.json ({error}): "
                "copy it again or train a new one"
            ) from error
        try:
            return cls(inner)
        except TokenizerError as error:
            raise TokenizerError(f"tokenizer={str(path)!r}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` (into `path` when that is a folder), whole or not at all."""
        path = Path(path)
        if path.is_dir():
            path = path / TOKENIZER
        write_atomically(path, self._inner.to_str(pretty=True).encode())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end mark."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without end marks, on all cores."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        try:
            encoded = iter(self._inner.encode_batch_fast(flat, add_special_tokens=False))
        except TypeError:  # so the library refuses half a surrogate pair
            _require_unicode(texts)
            raise
        return [[token for _ in parts for token in next(encoded).ids] for parts in pieces]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text; U+FFFD stands where the bytes are not UTF-8, nothing for end marks."""
        return self.decode_bytes(token_ids).decode("utf-8", "replace")

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Return the bytes that the tokens stand for, which need not be whole characters."""
        return b"".join(self._token(token_id) for token_id in token_ids)

    def name(self, token_id: int) -> str:
        """Return how the vocabulary writes a token; end marks and other special ones have one."""
        return self._inner.id_to_token(token_id) or f"<|{token_id}|>"

    def text_stream(self, after: Sequence[int] = ()) -> "TextStream":
        """Return a decoder that takes one token at a time.

        Args:
            after: what stands before them: a character that begins there is made whole.
        """
        return TextStream(self, after)

    @property
    def token_bytes(self) -> Int64[np.ndarray, " vocab"]:
        """How many bytes of text each token stands for; 0 for the end mark."""
        return np.array([len(token) for token in self._bytes], dtype=np.int64)

    def _token(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(
                f"token_id={token_id} must be at least 0 and below vocab_size={self.vocab_size}: "
                "decode with the tokenizer that the model was trained with"
            )
        return self._bytes[token_id]


@final
class TextStream:
    """Text from tokens that come one by one, in whole characters.

    A character of several bytes may be spread over tokens; its bytes wait here until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = b""  # three bytes hold all that a character can have before its last one
        for token_id in reversed(after):
            if len(last) >= 3:
                break
            last = tokenizer.decode_bytes([token_id]) + last
        self._decoder.decode(last)

    def push(self, token_id: int) -> str:
        """Take a token and return the text that it makes whole, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """Return what is left: U+FFFD for an unfinished character, otherwise nothing."""
        return self._decoder.decode(b"", final=True)


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before line breaks that follow a visible character.

    No token reaches over such a place and none looks past it, so the pieces have the tokens of the
    whole. A text without such a place is one piece.
    """
    start = 0
    while len(text) - start > _PIECE:
        cut = text.find("\n", start + _PIECE)
        while cut != -1 and text[cut - 1].isspace():
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _require_unicode(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text[{error.start}]={text[error.start]!r} must be a character, not half of a "
                "surrogate pair: replace it first"
            ) from None


def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(rest)
    }


_BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of_tokens(inner: tokenizers.Tokenizer) -> list[bytes]:
    """Return the bytes of every token; ids that nothing uses, and special tokens, have none."""
    added = inner.get_added_tokens_decoder()
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else token.encode()
            continue
        try:
            table[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:
            raise TokenizerError(
                f"token={token!r} must be written in byte-level characters: "
                "use a byte-level BPE tokenizer, as GPT-2's, or train one"
            ) from None
    missing = 256 - len({token for token in table if len(token) == 1})
    if missing:
        raise TokenizerError(
            f"single_bytes={256 - missing} must be 256, or some text has no tokens: "
            "use a byte-level BPE tokenizer, as GPT-2's, or train one"
        )
    return table


def _end_id(inner: tokenizers.Tokenizer) -> int:
    for mark in _END_MARKS:
        token_id = inner.token_to_id(mark)
        if token_id is not None:
            return token_id
    raise TokenizerError(
        f"special tokens must include one of {', '.join(_END_MARKS)}, which ends a document: "
        "add it, or train a tokenizer"
    )


def _fingerprint(inner: tokenizers.Tokenizer) -> str:
    """Hash what decides the ids of a text, whatever the file's layout."""
    content: dict[str, Any] = json.loads(inner.to_str())
    decisive = {
        key: content.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
