"""Accuracy, perplexity, bits per byte and their errors against plain loops over plain scores."""

import math
import statistics

import pytest
import torch
from question_sets import CHOICES, WORDS
from tiny import tiny
from typecheck import unchecked

from openmythos.inference.grading import LENGTH, grade
from openmythos.inference.language_model import LanguageModel
from openmythos.inference.thinking import Thinking
from openmythos.tasks.question_sets import Question
from openmythos.training.tokenizer import Tokenizer

TEXT = "the cat sat on the mat; a rat ate: yes, no, nobody. Question: was it? naïve 😀\nAnswer: "
CHOICE = [Question((c,) * len(answers), answers, right) for c, answers, right in CHOICES]
WORD = [Question((context,), (word,)) for context, word in WORDS]


@pytest.fixture(autouse=True)
def _do_not_check_shapes():
    # The checks take most of the time, and the tests of scoring have them.
    with unchecked():
        yield


@pytest.fixture(scope="module")
def lm():
    tokenizer = Tokenizer.train([TEXT * 9], vocab_size=300)
    return LanguageModel(tiny(vocab_size=tokenizer.vocab_size, dtype=torch.float64), tokenizer)


@torch.no_grad()
def nats(lm, context, answer, loops, **rule):
    """Nats of an answer, whether greedy decoding gives it, and loops, token after token."""
    kept = context.rstrip()
    seen = [lm.tokenizer.end_id, *lm.tokenizer.encode(kept)]
    total, greedy, taken = 0.0, True, []
    for token in lm.tokenizer.encode(context[len(kept) :] + answer):
        out = lm.model(torch.tensor([seen]), loops, **rule)
        chances = out.logits[0, -1].log_softmax(-1)
        taken.append(int(out.loops[0, -1]))
        total, greedy = total - float(chances[token]), greedy and int(chances.argmax()) == token
        seen.append(token)
    return total, greedy, taken


def error(values):
    return statistics.stdev(values) / len(values) ** 0.5


def size(answer, comparison):
    text = answer.removeprefix(" ")
    return {"raw": 1, "per_char": len(text), "per_byte": len(text.encode())}[comparison]


@pytest.mark.parametrize(
    "how", [{"loops": 1}, {"loops": 4}, {"loops": 4, "halting": "gate", "threshold": 0.5}], ids=str
)
def test_the_accuracies_of_a_choice_are_those_of_plain_loops(lm, how):
    result = grade(lm, CHOICE, "choice", Thinking(**how))
    scored = [[nats(lm, c, a, **how) for a in answers] for c, answers, _ in CHOICES]
    losses = [[loss for loss, *_ in row] for row in scored]
    picked = {}
    for comparison, figure in result.accuracy.items():
        points, picked[comparison] = [], []
        for row, (_, answers, right) in zip(losses, CHOICES, strict=True):
            rates = [loss / size(a, comparison) for loss, a in zip(row, answers, strict=True)]
            picked[comparison].append(rates.index(min(rates)))
            points.append(float(picked[comparison][-1] == right))
        assert figure.value == pytest.approx(statistics.mean(points))
        assert figure.error == pytest.approx(error(points))
    assert picked["raw"] != picked["per_char"]  # there is something to compare
    gold = [(row[q.right], q.gold) for row, q in zip(losses, CHOICE, strict=True)]
    check_bits(result, gold)
    assert result.perplexity is None
    taken = [loops for row in scored for *_, some in row for loops in some]
    assert result.mean_loops == pytest.approx(statistics.mean(taken))
    assert ("halting" in how) == (len(set(taken)) > 1)


def test_lengths_are_counted_without_the_space_before_an_answer():
    lengths = {name: length(" naïve 😀") for name, length in LENGTH.items()}
    assert lengths == {"raw": 1, "per_char": 7, "per_byte": 11}
    assert {length(" ") for length in LENGTH.values()} == {1}  # nothing is divided by 0


def check_bits(result, gold, coded=None):
    """Bits per byte from each right answer's nats; `coded` are its bytes with all spaces."""
    bits = [loss / math.log(2) for loss, _ in gold]
    sizes = coded or [len(answer.encode()) for _, answer in gold]
    rate = sum(bits) / sum(sizes)
    assert result.bits_per_byte.value == pytest.approx(rate)
    rests = [b - rate * n for b, n in zip(bits, sizes, strict=True)]
    assert result.bits_per_byte.error == pytest.approx(error(rests) / statistics.mean(sizes))
    each = [b / size(answer, "per_byte") for b, (_, answer) in zip(bits, gold, strict=True)]
    assert result.mean_bits_per_byte.value == pytest.approx(statistics.mean(each))
    assert result.mean_bits_per_byte.error == pytest.approx(error(each))


def test_the_error_of_bits_per_byte_is_near_that_of_leaving_each_question_out(lm):
    questions = [Question(("the cat",), (TEXT[n : n + 3 + n % 5],)) for n in range(30)]
    whole = grade(lm, questions, "text", Thinking(loops=2)).bits_per_byte
    bits = [nats(lm, "the cat", q.gold, 2)[0] / math.log(2) for q in questions]
    sizes = [len(q.gold.encode()) for q in questions]
    left = [(sum(bits) - b) / (sum(sizes) - n) for b, n in zip(bits, sizes, strict=True)]
    jackknife = (len(left) - 1) / len(left) ** 0.5 * statistics.pstdev(left)
    assert whole.error == pytest.approx(jackknife, rel=0.05)  # they differ by order 1 / questions


def test_a_word_counts_where_every_token_of_it_is_the_likeliest(lm):
    likeliest = int(lm.model(torch.tensor([[0]]), 3).logits[0, -1].argmax())
    token = lm.tokenizer.decode([likeliest])
    questions = [*WORD, Question(("",), (token,))]
    result = grade(lm, questions, "word", Thinking(loops=3))
    scored = [nats(lm, q.contexts[0], q.gold, 3) for q in questions]
    points = [float(greedy) for _, greedy, _ in scored]
    assert points[-1] == 1
    assert result.accuracy["raw"].value == pytest.approx(statistics.mean(points))
    assert list(result.accuracy) == ["raw"]
    losses = [loss for loss, *_ in scored]
    assert result.perplexity.value == pytest.approx(math.exp(statistics.mean(losses)))
    assert result.perplexity.error == pytest.approx(result.perplexity.value * error(losses))
    gold = [(loss, q.gold) for loss, q in zip(losses, questions, strict=True)]
    check_bits(result, gold, coded=[len(b" mat"), len(b" mat"), len(b" rat"), len(token)])


def test_questions_whose_context_was_cut_are_counted(lm):
    long = "the cat sat on the mat; " * 30
    questions = [CHOICE[0], Question((long,) * 2, (" yes", " no"), 0), CHOICE[3]]
    assert grade(lm, questions, "choice", Thinking(loops=1)).cut == 1
    assert grade(lm, CHOICE, "choice", Thinking(loops=1)).cut == 0


def test_answers_that_are_equally_likely_share_the_point(lm):
    questions = [Question(("it",) * 2, (" sat", " sat"), right) for right in (0, 1, 1)]
    accuracy = grade(lm, questions, "choice", Thinking(loops=2)).accuracy
    assert {figure.value for figure in accuracy.values()} == {0.5}
