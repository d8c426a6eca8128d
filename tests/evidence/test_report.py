"""What is read of a claim comes from its numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from openmythos.errors import CheckpointError, InputError
from openmythos.evidence.claims import CLAIMS, Reproduction, claim, command, cost, reproduce
from openmythos.evidence.report import (
    Expectation,
    Section,
    as_markdown,
    grouped,
    rounded_down,
    rounded_up,
    spread,
    table,
    with_machines,
    with_missing,
    write_claim,
    write_pages,
)

SECTION = Section(
    "A title",
    ["One sentence."],
    [table(["a", "b"], [[1, "x"]])],
    [
        Expectation("accuracy", "≥ 0.9", "0.95", met=True),
        Expectation("speed", "≥ 2", "1", met=False),
        Expectation("every seed", "> 0", "1, one seed", met=None),
    ],
    ["A note."],
)


def test_a_spread_shows_the_range_where_there_is_one():
    assert spread([]) == "not run"
    assert spread([0.5]) == "0.500"
    assert spread([0.25, 0.75], 2) == "0.50 (0.25 to 0.75)"
    assert spread([0.2519, 0.7511], 2) == "0.50 (0.25 to 0.76)"  # it holds what it is of


def test_a_missed_expectation_is_shown_as_missed():
    text = as_markdown(SECTION)
    assert "| accuracy | ≥ 0.9 | 0.95 | yes |" in text
    assert "| speed | ≥ 2 | 1 | **no** |" in text
    assert "| 1 | x |" in text
    assert "| every seed | > 0 | 1, one seed | open |" in text
    assert "- A note." in text


def test_where_and_with_which_torch_it_ran_is_said():
    cpu, gpu = {"torch": "2.13", "device": "cpu"}, {"torch": "2.11", "device": "Some GPU"}
    both = {"a/seed-0": gpu, "b/seed-0": cpu, "c/seed-0": {"torch": "2.13"}}
    said = "Run: `a/*` on one Some GPU (torch 2.11), the others on a CPU (torch 2.13)."
    assert with_machines(SECTION, both).notes == ("A note.", said)
    only = dict.fromkeys(both, gpu)
    assert with_machines(SECTION, only).notes[-1] == "All run on one Some GPU (torch 2.11)."
    wide = {**only, "c/seed-0": {**gpu, "products": "fp32"}}
    assert with_machines(SECTION, wide).notes[-1].endswith("the others in TF32: `c/*`.")
    assert with_machines(SECTION, {}) == SECTION


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["looped-1/seed-1", "looped-2/seed-0", "looped-1/seed-0"], "`looped-*`"),
        (["looped-1/seed-0", "looped-1/seed-1"], "`looped-1/*`"),
        (["looped-1/seed-0", "plain/seed-0"], "`looped-1/seed-0`, `plain/*`"),
        (["one"], "`one`"),
    ],
)
def test_names_are_folded_where_all_that_begin_so_are_meant(names, said):
    cells = ["looped-1/seed-0", "looped-1/seed-1", "looped-2/seed-0", "plain/seed-0", "one"]
    assert grouped(names, cells) == said


def test_what_has_not_run_is_said_by_row():
    cells = ["a/seed-0", "a/seed-1", "b/c/seed-0", "d"]
    assert with_missing(SECTION, cells, []) == SECTION
    noted = with_missing(SECTION, cells, ["a/seed-1", "b/c/seed-0", "d"])
    said = "Not run, or not all of it: a (1 of 2), b/c (0 of 1), d (0 of 1)."
    assert noted.notes == ("A note.", said)
    assert noted.missing == ("a/seed-1", "b/c/seed-0", "d")


def test_the_main_sentence_stands_alone_and_the_picture_before_the_tables():
    section = replace(SECTION, sentences=["Main.", "Second.", "Third."])
    text = as_markdown(section, "![x](x.png)")
    assert text.startswith("Main.\n\n- Second.\n- Third.\n\n![x](x.png)\n\n| wanted |")
    assert text.index("| speed |") < text.index("| 1 | x |") < text.index("- A note.")
    assert as_markdown(Section("A title", [], [], [])) == "Nothing has run.\n"


def test_pages_hold_the_claims_there_are_in_their_order(tmp_path):
    for name in ("second", "first"):
        content = {"command": f"openmythos evidence {name}", "results": {"a/seed-0": {}}}
        if name == "first":
            content["cost"] = "About 2 hours."
        section = with_missing(SECTION, ["a/seed-0", "a/seed-1"], ["a/seed-1"])
        write_claim(tmp_path, name, content, replace(section, title=f"The {name}: 1, 2"))
    (tmp_path / "evidence" / "first.png").write_bytes(b"")
    write_pages(tmp_path, ["first", "absent", "second"])
    page = (tmp_path / "evidence.md").read_text()
    assert page.index("evidence first") < page.index("evidence second")
    assert "absent" not in page
    assert (
        "| [The first: 1, 2](#the-first-1-2) | 1 of 3 | speed; every seed (open) | 1 of 2 |" in page
    )
    assert "## The first: 1, 2\n\n    openmythos evidence first\n\nAbout 2 hours.\n\nOne" in page
    assert "    openmythos evidence second\n\nOne sentence." in page
    gallery = (tmp_path / "gallery.md").read_text()
    assert "evidence/first.png" in gallery
    assert "[The figures](evidence.md#the-first-1-2)" in gallery
    assert "evidence/second.png" not in gallery  # it has no picture


def test_damaged_figures_are_named(tmp_path):
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "first.json").write_text(json.dumps({"title": "x"}))
    with pytest.raises(CheckpointError, match="must be a claim's figures"):
        write_pages(tmp_path, ["first"])


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_says_what_it_is_and_concludes_from_nothing(name):
    module = claim(name)
    assert len(module.__doc__) > 200
    assert CLAIMS[name].hours > 0
    assert module.SEEDS > 0
    section = module.conclude({})
    assert section.title == module.TITLE
    assert not section.expectations
    module.draw_figure({})
    full = module.cells(quick=False, seeds=2)
    names = [cell.name for cell in (*full, *module.cells(quick=True, seeds=1))]
    assert len({cell.name for cell in full}) == len(full)
    assert all(name for name in names)
    json.dumps([cell.settings for cell in full])


def test_what_was_wanted_later_is_marked_and_said_why():
    later = replace(SECTION.expectations[0], later="Added afterwards.")
    text = as_markdown(replace(SECTION, expectations=[later, SECTION.expectations[1]]))
    assert "| accuracy † | ≥ 0.9 | 0.95 | yes |" in text
    assert "| speed | ≥ 2 | 1 | **no** |" in text
    assert text.index("- † Added afterwards.") < text.index("- A note.")


def test_figures_of_cells_that_are_not_asked_for_are_not_lost(tmp_path):
    content = {"command": "x", "results": {"core-1/seed-0": {}, "core-1/seed-7": {}}}
    path = write_claim(tmp_path, "depth-extrapolation", content, SECTION)
    before = path.read_bytes()
    how = Reproduction(work=tmp_path / "work", out=tmp_path)
    with pytest.raises(InputError, match=r"would be lost, but has core-1/seed-7: ask for"):
        reproduce("depth-extrapolation", how, print)
    assert path.read_bytes() == before
    assert not (tmp_path / "work").exists()


def test_a_quick_form_has_pages_of_its_own():
    assert Reproduction(work=Path("w")).pages == Path("w")
    assert Reproduction(work=Path("w"), quick=True).pages == Path("w/quick")
    assert Reproduction(work=Path("w"), quick=True, out=Path("o")).pages == Path("o")


def test_the_command_is_what_gives_the_figures():
    assert command("x", Reproduction(seeds=2)) == "openmythos evidence x --seeds 2"
    assert command("x", Reproduction()) == "openmythos evidence x"
    assert command("x", Reproduction(quick=True)) == "openmythos evidence x --quick"


@pytest.mark.parametrize(
    ("name", "how", "sentence"),
    [
        ("flight", {}, "claim='flight' must be one of depth-extrapolation"),
        ("depth-extrapolation", {"seeds": 0}, "seeds=0 must be 1 or more"),
        ("depth-extrapolation", {"seeds": 2, "quick": True}, "seeds=2 must be left out of a quick"),
        ("depth-extrapolation", {"only": "x"}, "only='x' must begin one of core-1/seed-0"),
        (
            "routing",
            {"published": Path("none")},
            "published='none' must hold evidence/routing.json",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, name, how, sentence):
    with pytest.raises(InputError) as error:
        reproduce(name, Reproduction(work=tmp_path / "w", out=tmp_path / "o", **how), print)
    assert sentence in str(error.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("value", "digits", "low", "high"),
    [
        (0.988, 3, "0.988", "0.988"),
        (0.0142, 2, "0.01", "0.02"),
        (0.00221, 4, "0.0022", "0.0023"),
        (1.0, 2, "1.00", "1.00"),
        (3e-5, 3, "0.000", "0.001"),
        (100 * (0.3 - 0.2) / 0.4, 1, "25.0", "25.0"),  # 24.999999999999993
        (0.997 - 0.996, 4, "0.0010", "0.0010"),  # but for the last bits of a float
        (-1e-6, 4, "-0.0001", "0.0000"),
        (33.91, 0, "33", "34"),
        (math.inf, 2, "not finite", "not finite"),
    ],
)
def test_a_bound_that_is_printed_holds(value, digits, low, high):
    assert (rounded_down(value, digits), rounded_up(value, digits)) == (low, high)


def test_what_is_measured_is_never_printed_as_better_than_it_is():
    missed = Expectation.no_less("right", 0.99, 0.98999)
    assert (missed.wanted, missed.measured, missed.met) == ("≥ 0.99", "0.989", False)
    late = Expectation.no_more("worse by", 1, 1.0001, 2, unit=" %", signed=True, later="Why.")
    assert (late.wanted, late.measured, late.met) == ("≤ 1 %", "+1.01 %", False)
    assert late.later == "Why."
    assert Expectation.no_more("even", 0, 0.0, signed=True).met


def test_what_a_claim_costs_is_said():
    hours = CLAIMS["routing"].hours
    assert cost("routing", Reproduction()).startswith(f"About {hours:g} hours of one core")
    assert cost("routing", Reproduction(quick=True)) == "A few minutes."


def test_published_figures_give_their_own_page_again_without_any_training(tmp_path):
    docs, said = Path(__file__).parents[2] / "docs", []
    how = Reproduction(only="lm/", published=docs, work=tmp_path / "work", out=tmp_path / "out")
    reproduce("shipped-models", how, said.append)
    page = "evidence/shipped-models.json"
    assert (tmp_path / "out" / page).read_bytes() == (docs / page).read_bytes()
    assert len(said) == 2
    assert "results are taken from" in said[1]
