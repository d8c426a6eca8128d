"""Resumable checkpoints: whole or not there, free of pickle, and checked before use.

    run/step-00000120/tensors.safetensors    model, optimizer, and whatever else has tensors
    run/step-00000120/state.json             step, counters, settings, and what verifies the rest

A checkpoint is written into a hidden sibling folder, flushed to disk, and renamed. A crash at
any moment leaves earlier checkpoints as they were.
"""

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from openmythos.errors import CheckpointError
from openmythos.files import NO_ROOM, TEMPORARY, flush_to_disk, write_readably
from openmythos.training.optimizer import is_sharded

FORMAT = "openmythos-checkpoint"
VERSION = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
UNFINISHED = f"{TEMPORARY}unfinished-"
REPLACED = f"{TEMPORARY}replaced-"

Parts = Mapping[str, Mapping[str, Tensor]]
"""{"model": {name: tensor}, "optimizer": {...}, ...}; part names hold no slash."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `save` was given. Tensors are on the CPU; tied ones are one tensor again."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    run: str | Path,
    step: int,
    tensors: Parts,
    state: Mapping[str, Any],
    *,
    keep: int = 3,
    bits_per_byte: float | None = None,
) -> Path:
    """Write a checkpoint, then delete old ones; return its folder, `run/step-00000120`.

    A checkpoint of the same step is replaced.

    Args:
        run: the folder of the run.
        step: of the checkpoint.
        tensors: by part and name.
        state: what JSON can hold.
        keep: so many last checkpoints stay, and the best: the one with the lowest validation
            `bits_per_byte`, of those that have one.
        bits_per_byte: of the validation; None: not measured.

    Raises:
        CheckpointError: a tensor is sharded, or the disk is full or refuses; earlier checkpoints
            stay.
    """
    _check_whole(tensors)
    run = Path(run)
    folder = run / f"step-{step:08d}"
    unfinished = run / f"{UNFINISHED}{folder.name}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(run)
        unfinished.mkdir()
        _write(unfinished, step, tensors, state, bits_per_byte)
        _put_in_place(unfinished, folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            _remove_unfinished(run)
        advice = "Free some space or choose another folder"
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            advice = "Mend that and resume"
        raise CheckpointError(
            f"run={run} must take a checkpoint, but: {error}. {advice}; earlier checkpoints are "
            "intact"
        ) from error
    _prune(run, keep=keep, newest=folder)
    return folder


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint's folder after verifying every byte of it.

    Raises:
        CheckpointError: it is missing, incomplete, damaged or of another format.
    """
    path = Path(path)
    header = _verify(path)
    flat = load_file(path / TENSORS)
    for name, same_as in header["tied"].items():
        flat[name] = flat[same_as]
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in header["parts"]}
    for full_name, tensor in flat.items():
        part, name = full_name.split("/", 1)
        parts[part][name] = tensor
    return Checkpoint(step=header["step"], tensors=parts, state=header["state"])


def state_of(path: str | Path) -> dict[str, Any]:
    """Read what `save` was given as `state`, without the tensors.

    Raises:
        CheckpointError: as for `load`.
    """
    state: dict[str, Any] = _read_header(Path(path))["state"]
    return state


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return path.name.startswith("step-") and path.name[5:].isdecimal() and path.is_dir()


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def score(path: Path) -> float | None:
    """Return the validation bits per byte recorded with a checkpoint, or None."""
    header = _header_or_none(path)
    bits = header["bits_per_byte"] if header else None
    return bits if bits is not None and math.isfinite(bits) else None


def exists(run: str | Path) -> bool:
    """Whether a run has a checkpoint, whole or damaged."""
    return bool(_folders(Path(run)))


def best_score(run: str | Path) -> float:
    """Return the lowest recorded validation bits per byte, infinite where there is none."""
    found = best(run)
    bits = None if found is None else score(found)
    return math.inf if bits is None else bits


def latest(
    run: str | Path,
    *,
    warn: Callable[[str], object] = warnings.warn,
    until: int | None = None,
) -> Path | None:
    """Return the newest checkpoint of a run that is whole, or None.

    Change nothing, so that a run may be read while it trains; the trainer calls
    `remove_leftovers` before.

    Args:
        run: the folder of the run.
        warn: is told of each damaged one passed over.
        until: the last step that counts; None: all do.
    """
    for folder in reversed(_folders(Path(run))):
        if until is not None and step_of(folder) > until:
            continue
        try:
            _verify(folder)
        except CheckpointError as error:
            warn(f"{error} (passed over)")
        else:
            return folder
    return None


def best(run: str | Path) -> Path | None:
    """Return the checkpoint with the lowest recorded validation bits per byte, or None."""
    return next(iter(by_score(run)), None)


def by_score(run: str | Path) -> list[Path]:
    """Return the checkpoints that were measured, the best first; they need not be whole."""
    scored = [
        (bits, folder) for folder in _folders(Path(run)) if (bits := score(folder)) is not None
    ]
    return [folder for _, folder in sorted(scored)]


def remove_leftovers(run: str | Path) -> None:
    """Delete what a killed process left half-written in a run, and undo half a replacement.

    For the start of training: no other process may be writing into the run.
    """
    run = Path(run)
    _remove_unfinished(run)
    for leftover in [*run.glob(f"{TEMPORARY}*"), *run.glob(f"*/{TEMPORARY}*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _remove_unfinished(run: Path) -> None:
    for replaced in run.glob(f"{REPLACED}*"):
        folder = run / replaced.name.removeprefix(REPLACED)
        if folder.exists():
            replaced.rename(run / f"{UNFINISHED}{folder.name}-replaced")
        else:  # killed between the two renames
            replaced.rename(folder)
    for unfinished in run.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished)


def _write(
    folder: Path,
    step: int,
    tensors: Parts,
    state: Mapping[str, Any],
    bits_per_byte: float | None,
) -> None:
    storable, tied = _storable(tensors)
    write_readably(folder / TENSORS, lambda path: save_file(storable, path))
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "bits_per_byte": bits_per_byte,
        "parts": list(tensors),
        "tied": tied,
        "tensors": {
            "bytes": (folder / TENSORS).stat().st_size,
            "sha256": _sha256_of_file(folder / TENSORS),
        },
        "state": dict(state),
    }
    header = json.loads(json.dumps(header))  # tuples and number keys, as they will be read
    header["sha256"] = _sha256_of_header(header)
    (folder / STATE).write_text(json.dumps(header, indent=1), encoding="utf-8")
    for path in (folder / TENSORS, folder / STATE, folder):
        flush_to_disk(path)


def _check_whole(tensors: Parts) -> None:
    for name, tensor in _flat(tensors):
        if is_sharded(tensor):
            raise CheckpointError(
                f"tensor={name} must be whole, and is sharded: save a sharded model with "
                "torch.distributed.checkpoint, which docs/architecture.md shows"
            )


def _put_in_place(unfinished: Path, folder: Path) -> None:
    if folder.exists():  # a folder cannot be renamed over another
        folder.rename(folder.with_name(f"{REPLACED}{folder.name}"))
    unfinished.rename(folder)
    flush_to_disk(folder.parent)
    _remove_unfinished(folder.parent)


def _prune(run: Path, *, keep: int, newest: Path) -> None:
    """Delete all but the last `keep`, the best, the one just written, and unreadable ones."""
    readable = [folder for folder in _folders(run) if _header_or_none(folder) is not None]
    staying = {newest, best(run), *readable[max(0, len(readable) - keep) :]}
    for folder in readable:
        if folder not in staying:
            # Renamed first, so that a kill halfway leaves a leftover and not a damaged checkpoint.
            doomed = folder.with_name(f"{UNFINISHED}{folder.name}")
            with suppress(OSError):  # what cannot be deleted does no harm
                folder.rename(doomed)
                shutil.rmtree(doomed)


def _storable(tensors: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous tensors on the CPU by full name, and which names are another's tensor.

    The file format refuses tensors that share memory, so tied ones are stored once and named
    here, and ones that merely overlap are copied.
    """
    storable: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for full_name, tensor in _flat(tensors):
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in first_name:
            tied[full_name] = first_name[view]
            continue
        first_name[view] = full_name
        stored = tensor.detach().cpu().contiguous()
        if stored.untyped_storage().data_ptr() in storages:
            stored = stored.clone()
        storages.add(stored.untyped_storage().data_ptr())
        storable[full_name] = stored
    return storable, tied


def _flat(tensors: Parts) -> Iterator[tuple[str, Tensor]]:
    for part, named in tensors.items():
        assert "/" not in part
        for name, tensor in named.items():
            yield f"{part}/{name}", tensor


def _verify(folder: Path) -> dict[str, Any]:
    """Return the header of a checkpoint in which every byte is as it was written."""
    header = _read_header(folder)
    path, expected = folder / TENSORS, header["tensors"]
    if not path.is_file():
        raise _damaged(folder, f"{TENSORS} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _damaged(folder, f"{TENSORS} has {size} bytes and not {expected['bytes']}")
    if _sha256_of_file(path) != expected["sha256"]:
        raise _damaged(folder, f"the checksum of {TENSORS} does not match")
    return header


def _read_header(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint={folder} must be a folder such as run/step-00000120: correct the path"
        )
    try:
        header = json.loads((folder / STATE).read_bytes())
    except FileNotFoundError:
        raise _damaged(folder, f"{STATE} is missing") from None
    except (ValueError, RecursionError):
        raise _damaged(folder, f"{STATE} is not JSON") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint={folder} must be in the format {FORMAT}: it was not written by training; "
            "give a folder such as run/step-00000120"
        )
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint={folder} must be of version {VERSION} and is of {header.get('version')}: "
            "use the openmythos that wrote it"
        )
    if header.pop("sha256", None) != _sha256_of_header(header):
        raise _damaged(folder, f"the checksum of {STATE} does not match")
    return header


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint={folder} must be whole, but {what}: resume from another checkpoint of the run"
    )


def _folders(run: Path) -> list[Path]:
    """Return the checkpoints' folders in the order of their steps."""
    return sorted(filter(is_checkpoint, run.glob("step-*")), key=step_of)


def _header_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return _read_header(folder)
    except (CheckpointError, OSError):
        return None


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_header(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
