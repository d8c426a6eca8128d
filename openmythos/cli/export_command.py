"""Write a model with smaller weights, and measure what that costs.

Examples:
    openmythos export runs/nano small --weights int8
    openmythos export runs/nano small --weights int8 --corpus embedded --loops 1 8
    openmythos export runs/nano half --weights bf16 --text letters.txt --json

MODEL is the folder of a model or of a training run, FOLDER a new one that `generate`, `chat`,
`eval` and `openmythos.load` take. bf16 is half as large as fp32, int8 a quarter. With a text, bits
per byte are measured before, and again on what was written, in the same windows. The text of --text
is measured whole; of a --corpus, the side that is held out. What MODEL knows of the windows of its
training goes with it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from openmythos.cli.known_text import warn_of_known
from openmythos.config import CONFIG_FILE, WeightsKind
from openmythos.errors import InputError
from openmythos.inference.shipped import existing
from openmythos.training.run import SETTINGS, TOKENIZER, check_folder
from openmythos.training.settings import CorpusName

if TYPE_CHECKING:
    from openmythos.inference.language_model import LanguageModel
    from openmythos.model.transformer import OpenMythos
    from openmythos.training.evaluate import Evaluation, Reading


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Flags of `openmythos export`."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of a model, or of a training run."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where to write: a folder that holds no model."""

    weights: WeightsKind = "int8"
    """What matrices are stored as; norms and routers are fp32 in all of them."""

    corpus: CorpusName | None = None
    """Measure on a corpus with a name, on its held-out side."""

    text: Path | None = None
    """Measure on a .txt, .jsonl or .parquet file, or a folder of them."""

    text_field: str = "text"
    """Name of the text's field in JSONL and Parquet."""

    loops: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Depths to measure at."""

    length: int | None = None
    """Tokens in a window. Default: as in training where model or run say it, else max_length."""

    max_tokens: int | None = None
    """Measure only so many tokens from the start, and the rest of the window that they begin.
    Default: all."""

    json: bool = False
    """Print one JSON object instead of the table."""


def run(settings: Settings) -> None:
    """Measure, write, measure again, print."""
    _check(settings)
    from openmythos.inference.language_model import load
    from openmythos.training.evaluate import Reading

    documents = _documents(settings)
    lm = load(settings.model)
    reading = Reading.usual(
        lm.trained_length,
        lm.model.config.max_length,
        length=settings.length,
        max_tokens=settings.max_tokens,
    )
    bits_before = None if documents is None else _bits(lm, documents, settings.loops, reading)
    warn_of_known(settings.model, settings.corpus, settings.text)
    lm.save(settings.folder, settings.weights)
    written = load(settings.folder)
    report: dict[str, Any] = {
        "model": str(settings.model),
        "folder": str(settings.folder),
        "weights": settings.weights,
        "bytes": {"before": _bytes_in_memory(lm.model), "after": _bytes_of_file(settings.folder)},
        "largest_error": _largest_error(lm.model, written.model),
    }
    if documents is not None and bits_before is not None:
        bits_after = _bits(written, documents, settings.loops, reading)
        report |= asdict(reading)
        report["bits_per_byte"] = {
            "before": _by_depth(bits_before),
            "after": _by_depth(bits_after),
        }
    print(json.dumps(report) if settings.json else _table(report, reading))


def _check(settings: Settings) -> None:
    if settings.corpus is not None and settings.text is not None:
        raise InputError("one of --corpus and --text may be given, and not both")
    _check_used(settings)
    existing(settings.model)
    _check_new(settings.folder)


def _check_used(settings: Settings) -> None:
    """Refuse what says how a text is measured where none is."""
    where = {"text_field": "--text: a corpus has none"}
    if settings.corpus is None:
        measured = "--text or --corpus: nothing is measured without"
        where |= {"loops": measured, "length": measured, "max_tokens": measured}
    for name, wanted in where.items() if settings.text is None else ():
        if (value := getattr(settings, name)) != getattr(Settings, name):
            raise InputError(f"{name}={value} must go with {wanted}")


def _check_new(folder: Path) -> None:
    """Refuse a place where no model can be written, or where one is, before anything is measured.

    Raises:
        ConfigError: it is a file, or cannot be written to.
        InputError: it holds a model or a run.
    """
    from openmythos.model.files import WEIGHTS_FILE

    check_folder(folder, "folder")
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER, SETTINGS):
        if (folder / name).exists():
            raise InputError(
                f"folder={folder} holds a model or a run already ({name}), and must be new: choose "
                "another, or delete it"
            )


def _documents(settings: Settings) -> list[str] | None:
    from openmythos.training.corpus import left_out, open_corpus, read_documents

    if settings.text is not None:
        documents = read_documents(settings.text, field=settings.text_field)
        if (others := left_out(settings.text)) is not None:
            print(f"openmythos: {others}", file=sys.stderr)
        return documents
    if settings.corpus is not None:
        return list(open_corpus(settings.corpus).validation_documents())
    return None


def _bits(
    lm: LanguageModel, documents: list[str], loops: tuple[int, ...], reading: Reading
) -> Evaluation:
    from openmythos.training.evaluate import evaluate, tokenised

    token_bytes, depths = lm.tokenizer.token_bytes, sorted(set(loops))
    with tokenised(documents, lm.tokenizer, reading.enough) as file:
        return evaluate(lm.model, file, token_bytes, depths, reading=reading)


def _by_depth(result: Evaluation) -> dict[int, float]:
    return dict(zip(result.loops, result.bits_per_byte, strict=True))


def _bytes_in_memory(model: OpenMythos) -> int:
    from openmythos.model.files import storable

    return sum(tensor.nbytes for tensor in storable(model).values())


def _bytes_of_file(folder: Path) -> int:
    from openmythos.model.files import WEIGHTS_FILE

    return (folder / WEIGHTS_FILE).stat().st_size


def _largest_error(before: OpenMythos, after: OpenMythos) -> dict[str, Any]:
    """The tensor that changed most: the length of the change, relative to its own."""
    kept = dict(after.named_parameters())
    errors = {
        name: float((kept[name] - tensor).detach().norm() / tensor.detach().norm().clamp(min=1e-30))
        for name, tensor in before.named_parameters()
    }
    name = max(errors, key=errors.__getitem__)
    return {"tensor": name, "relative": errors[name]}


def _table(report: dict[str, Any], reading: Reading) -> str:
    before, after = report["bytes"]["before"], report["bytes"]["after"]
    error = report["largest_error"]
    lines = [
        f"{report['model']} written to {report['folder']} with {report['weights']} weights",
        "",
        f"weights in memory  {before / 1e6:>9.2f} MB, before",
        f"weights in file    {after / 1e6:>9.2f} MB, {before / after:.2f} times smaller than that",
        f"largest error      {error['relative']:>9.4f} of the tensor's length, {error['tensor']}",
    ]
    if "bits_per_byte" in report:
        earlier, later = report["bits_per_byte"]["before"], report["bits_per_byte"]["after"]
        lines += ["", str(reading)]
        lines += ["", f"bits per byte at  {'before':>10}{'after':>10}{'change':>10}"]
        lines += [
            f"{loops:>10} loops  {bits:>10.4f}{later[loops]:>10.4f}{later[loops] - bits:>+10.4f}"
            for loops, bits in earlier.items()
        ]
    return "\n".join(lines)
