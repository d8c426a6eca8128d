"""From a claim's results to what is read: JSON, a picture, a section, and the page of all.

    OUT/evidence/CLAIM.json, CLAIM.png     figures and picture of one claim
    OUT/evidence.md                        what was met, and a section for each claim with figures
    OUT/gallery.md                         all pictures on one page

Sentences are made from the numbers: where a number is missing, so is its sentence.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

from openmythos.errors import CheckpointError, InputError
from openmythos.files import write_atomically

INTRODUCTION = """\
Every figure below was measured by the command above it, and every sentence is made from the
figures; `openmythos evidence` writes this page. Trainings are small, for a laptop's processor: they
show how the mechanism behaves, not how large models score.

What was wanted of each claim was written down before it was measured, except where † marks it:
there the wish, or what it is asked of, was set after something had missed, as a note says. What was
missed is listed here, and below beside the figure that it has; a wish is open where what it asks
for has not all run. Bounds, and ranges in brackets, are rounded to the side on which they hold."""


@dataclass(frozen=True)
class Expectation:
    """What was hoped for, and what was measured."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None: open, since what has run cannot settle it."""
    later: str = ""
    """What was set or changed after a measurement had missed; empty where nothing was."""

    @classmethod
    def no_less(
        cls,
        what: str,
        least: float,
        value: float,
        digits: int = 3,
        *,
        unit: str = "",
        later: str = "",
    ) -> Expectation:
        """Wanted: `value` is `least` or more; it is printed rounded down."""
        shown = f"{rounded_down(value, digits)}{unit}"
        return cls(what, f"≥ {least:g}{unit}", shown, value >= least, later)

    @classmethod
    def no_more(
        cls,
        what: str,
        most: float,
        value: float,
        digits: int = 3,
        *,
        unit: str = "",
        signed: bool = False,
        later: str = "",
    ) -> Expectation:
        """Wanted: `value` is `most` or less; it is printed rounded up."""
        shown = f"{rounded_up(value, digits, signed=signed)}{unit}"
        return cls(what, f"≤ {most:g}{unit}", shown, value <= most, later)


IN_WORDS = {True: "yes", False: "**no**", None: "open"}


@dataclass(frozen=True)
class Section:
    """A claim's part of `evidence.md`."""

    title: str
    sentences: Sequence[str]
    """What the numbers say, the main one first."""
    tables: Sequence[str]
    """Markdown tables, as `table` makes them."""
    expectations: Sequence[Expectation]
    notes: Sequence[str] = field(default_factory=tuple)
    """What a reader must know to believe or doubt the numbers."""
    missing: Sequence[str] = field(default_factory=tuple)
    """The claim's cells that have no result."""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def counted(count: int, what: str) -> str:
    """Return `1 seed`, `2 seeds`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean, and where there are several the range, which holds all of them."""
    if not values:
        return "not run"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({rounded_down(min(values), digits)} to {rounded_up(max(values), digits)})"


def rounded_down(value: float, digits: int) -> str:
    """Return a number that `value` is not below, for "so much or more"."""
    return _rounded(value, digits, ROUND_FLOOR)


def rounded_up(value: float, digits: int, *, signed: bool = False) -> str:
    """Return a number that `value` is not above, for "so much or less"."""
    return _rounded(value, digits, ROUND_CEILING, "+f" if signed else "f")


def _rounded(value: float, digits: int, way: str, form: str = "f") -> str:
    if not math.isfinite(value):
        return "not finite"
    exact = Decimal(repr(round(value, 9)))  # 0.997 - 0.996 is 0.001, but for the last bits
    return format(exact.quantize(Decimal(1).scaleb(-digits), way) + 0, form)


def with_machines(section: Section, results: dict[str, dict[str, Any]]) -> Section:
    """Return the section with a note on the devices and versions of torch; none if none ran."""
    if not results:
        return section
    cells: dict[str, list[str]] = {}
    for cell, result in results.items():
        cells.setdefault(_machine(result), []).append(cell)
    *named, last = sorted(cells, reverse=True)  # "one GPU" before "a CPU"
    ran = [f"{grouped(cells[machine], results)} on {machine}" for machine in named]
    notes = [f"Run: {', '.join(ran)}, the others on {last}." if ran else f"All run on {last}."]
    wide = [cell for cell, result in results.items() if "products" in result]
    if wide:  # results of before products were taken in TF32 say so themselves
        notes.append(
            "Of the trainings on a GPU these took products in fp32, the others in TF32: "
            f"{grouped(wide, results)}."
        )
    return replace(section, notes=(*section.notes, *notes))


def _machine(result: dict[str, Any]) -> str:
    device = result.get("device", "cpu")
    return f"{'a CPU' if device == 'cpu' else f'one {device}'} (torch {result['torch']})"


def grouped(names: Sequence[str], everything: Collection[str]) -> str:
    """Return names in words, those that are all that begin so as one: `looped-*`.

    Args:
        names: of cells, in any order.
        everything: what these are some of.
    """
    others = set(everything) - set(names)
    return ", ".join(
        f"`{group}`" for group in dict.fromkeys(_group(n, others) for n in sorted(names))
    )


def _group(name: str, others: Collection[str]) -> str:
    """Return the shortest beginning of a name, to a - or /, that no other has; else the name."""
    beginnings = (name[: mark.end()] for mark in re.finditer("[-/]", name))
    own = (start for start in beginnings if not any(other.startswith(start) for other in others))
    return next((f"{start}*" for start in own), name)


def with_missing(section: Section, cells: Sequence[str], missing: Sequence[str]) -> Section:
    """Return the section with a note on what has not run; where all has, as it is.

    Args:
        section: of the claim.
        cells: names of all of the claim's cells, a row's by seed: `looped/seed-0`.
        missing: names of those without a result.
    """
    if not missing:
        return section
    asked, lacking = Counter(map(_row, cells)), Counter(map(_row, missing))
    rows = [f"{row} ({asked[row] - count} of {asked[row]})" for row, count in lacking.items()]
    note = f"Not run, or not all of it: {', '.join(rows)}."
    return replace(section, notes=(*section.notes, note), missing=tuple(missing))


def _row(cell: str) -> str:
    return cell.rsplit("/", 1)[0]


def write_claim(out: Path, name: str, content: dict[str, Any], section: Section) -> Path:
    """Write a claim's JSON, which holds its section too; return its path."""
    path = figures(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        **content,
        "expectations": [asdict(expectation) for expectation in section.expectations],
        "missing": list(section.missing),
        "section": as_markdown(section, f"![{section.title}](evidence/{name}.png)"),
        "title": section.title,
    }
    write_atomically(path, (json.dumps(whole, indent=1) + "\n").encode())
    return path


def write_pages(out: Path, order: Sequence[str]) -> list[Path]:
    """Write `evidence.md` and `gallery.md` from the claims that `out` has; return their paths.

    Raises:
        CheckpointError: a claim's JSON is damaged.
    """
    claims = {}
    for name in order:
        path = figures(out, name)
        if path.is_file():
            claims[name] = _read(path)
    pages = {"evidence.md": _evidence(claims), "gallery.md": _gallery(out, claims)}
    for name, text in pages.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in pages]


def as_markdown(section: Section, picture: str = "") -> str:
    """Return the section's text, without its title: what it says, then what that rests on."""
    first, *others = section.sentences or ("Nothing has run.",)
    parts = [first, "\n".join(f"- {sentence}" for sentence in others), picture]
    if section.expectations:
        rows = [
            (e.what + (" †" if e.later else ""), e.wanted, e.measured, IN_WORDS[e.met])
            for e in section.expectations
        ]
        parts.append(table(("wanted", "bound", "measured", "met"), rows))
    parts += section.tables
    later = dict.fromkeys(e.later for e in section.expectations if e.later)
    notes = [*(f"† {text}" for text in later), *section.notes]
    if notes:
        parts += ["To be read with the figures:", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_claim(out: Path, name: str) -> dict[str, Any]:
    """Return what `write_claim` wrote.

    Raises:
        InputError: it is not there.
        CheckpointError: it is damaged.
    """
    path = figures(out, name)
    if not path.is_file():
        raise InputError(f"published={str(out)!r} must hold {path.relative_to(out)}")
    return _read(path)


def figures(out: Path, name: str) -> Path:
    """Return the path of a claim's JSON."""
    return out / "evidence" / f"{name}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["section"], content["title"], content["command"], content["results"].items()
        content["expectations"], content["missing"]
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} must be a claim's figures, but: {error!r}") from error
    return content


def _evidence(claims: dict[str, dict[str, Any]]) -> str:
    lines = ["# Evidence", "", INTRODUCTION, "", _overview(claims), ""]
    for content in claims.values():
        lines += [f"## {content['title']}", "", f"    {content['command']}", ""]
        if cost := content.get("cost"):  # figures of an earlier version have none
            lines += [cost, ""]
        lines += [content["section"]]
    return "\n".join(lines)


def _overview(claims: dict[str, dict[str, Any]]) -> str:
    """Return the table of what each claim met, missed and left open, and what has run."""
    rows = []
    for content in claims.values():
        wanted = content["expectations"]
        missed = [e["what"] for e in wanted if e["met"] is False]
        unsettled = [f"{e['what']} (open)" for e in wanted if e["met"] is None]
        met = f"{len(wanted) - len(missed) - len(unsettled)} of {len(wanted)}"
        if later := sum(bool(e.get("later")) for e in wanted):
            met += f" ({later} †)"
        link = f"[{content['title']}](#{_anchor(content['title'])})"
        has, lacks = len(content["results"]), len(content["missing"])
        rows.append(
            (link, met, "; ".join(missed + unsettled) or "nothing", f"{has} of {has + lacks}")
        )
    return table(
        ("claim", "met", "missed, or open", "trainings and measurements that have run"), rows
    )


def _anchor(title: str) -> str:
    """Return what a heading is linked by, as Git hosts make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _gallery(out: Path, claims: dict[str, dict[str, Any]]) -> str:
    lines = ["# Gallery", "", "All figures on one page, written by `openmythos evidence`.", ""]
    for name, content in claims.items():
        if (out / "evidence" / f"{name}.png").is_file():
            lines += [f"## {content['title']}", "", f"![{content['title']}](evidence/{name}.png)"]
            figures_at = f"evidence.md#{_anchor(content['title'])}"
            lines += ["", f"[The figures]({figures_at}), [as JSON](evidence/{name}.json)", ""]
    return "\n".join(lines)
