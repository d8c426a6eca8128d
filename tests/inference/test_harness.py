"""Our models as lm-evaluation-harness calls them: the harness itself where it is installed.

Elsewhere a stand-in takes its place: as much of the harness as our file imports.
"""

import importlib
import importlib.util
import json
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from command_line import openmythos
from tiny import tiny

import openmythos as library
from openmythos.errors import InputError
from openmythos.inference.scoring import Continuation, encode_pairs, score
from openmythos.inference.thinking import Thinking
from openmythos.training.tokenizer import Tokenizer

INSTALLED = importlib.util.find_spec("lm_eval") is not None
STAND_IN = {
    "__init__.py": "",
    "__main__.py": "import sys\ndef cli_evaluate():\n    print(sys.argv[1:])\n",
    "models/__init__.py": "",
    "api/__init__.py": "",
    "api/model.py": "class LM:\n    def __init__(self):\n        self._device = None\n",
    "api/registry.py": (
        "MODELS = {}\n"
        "def register_model(name):\n"
        "    return lambda kind: MODELS.setdefault(name, kind)\n"
        "get_model = MODELS.get\n"
    ),
}
TEXT = "the cat sat on the mat; the rat ate. naïve 😀 "


@pytest.fixture(autouse=True)
def _unchecked():
    # Checks of types would refuse before we do, and take most of the time.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _harness(tmp_path_factory, monkeypatch):
    if INSTALLED:
        yield
        return
    folder = tmp_path_factory.mktemp("stand_in")
    for name, text in STAND_IN.items():
        (folder / "lm_eval" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "lm_eval" / name).write_text(text)
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(folder)
    yield
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] == "lm_eval" or name == "openmythos.inference.harness":
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT * 9], vocab_size=290)
    model = tiny(vocab_size=tokenizer.vocab_size, max_length=24, dtype=torch.float64)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path, tokenizer)
    return path


@pytest.fixture
def make(folder):
    importlib.import_module("openmythos.inference.harness")
    from lm_eval.api.registry import get_model

    return lambda **options: get_model("openmythos")(str(folder), **options)


def asked(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


@pytest.mark.parametrize(
    "how", [{}, {"loops": 5}, {"loops": 5, "halting": "gate", "threshold": 0.5}], ids=str
)
def test_likelihoods_are_those_of_scoring(make, folder, how):
    lm, pairs = library.load(folder), [("the cat", " sat"), ("", "the"), ("the cat ", "ate")]
    expected = score(lm.model, encode_pairs(lm.tokenizer, pairs), Thinking(**how))
    answers = make(**how, batch_size=1).loglikelihood(asked(*pairs))
    assert answers == [(one.log_likelihood, one.greedy) for one in expected]
    text = TEXT * 3
    ids = lm.tokenizer.encode(text)
    assert len(ids) > lm.model.config.max_length
    (one,) = score(lm.model, [Continuation((lm.tokenizer.end_id,), tuple(ids))], Thinking(**how))
    rolled = make(**how).loglikelihood_rolling(asked((text,), ("",)))
    assert rolled == [pytest.approx(one.log_likelihood), 0.0]


def test_it_writes_what_the_model_writes(make, folder):
    lm, model = library.load(folder), make(loops=2)
    free = lm.generate("the", loops=2, temperature=0, max_new_tokens=9)
    greedy = {"do_sample": False, "temperature": 1.0, "max_gen_toks": 9, "until": []}
    assert model.generate_until(asked(("the", greedy))) == [free]
    stop = free[2:4]
    given = [{"until": stop}, {"until": ["", stop, "never"], "temperature": None}]
    for wish in given:
        assert model.generate_until(asked(("the", wish))) == [free[: free.find(stop)]]
    short = {"max_new_tokens": 2, "max_tokens": 5}
    expected = lm.generate("the", loops=2, temperature=0, max_new_tokens=2)
    assert model.generate_until(asked(("the", short))) == [expected]


def test_no_document_that_it_writes_is_empty(make):
    model = make(loops=2)
    end = model.lm.tokenizer.end_id

    def likes_to_end(_, __, logits):
        logits[..., end] += 1e6
        return logits

    model.lm.model.head.register_forward_hook(likes_to_end)
    nothing, word = model.generate_until(asked(("", {}), ("the", {})))
    assert nothing
    assert word == ""  # which ends one that is not


def test_it_draws_as_it_is_asked_to(make, folder):
    lm, model = library.load(folder), make(loops=2)
    for wish, sampling in (
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_k": 5}),
        ({"do_sample": True, "temperature": 2.0, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.5}),
    ):
        torch.manual_seed(3)  # as the harness does
        text = model.generate_until(asked(("the", {**wish, "max_gen_toks": 9})))
        torch.manual_seed(3)
        assert text == [lm.generate("the", loops=2, max_new_tokens=9, **sampling)]


def test_a_context_leaves_room_to_write_and_the_cut_is_told(make, folder, caplog):
    lm, model = library.load(folder), make(loops=1)
    ids = [lm.tokenizer.end_id, *lm.tokenizer.encode(TEXT * 3)]
    written = []
    model.lm.model.embed.register_forward_hook(
        lambda _, inputs, __: written.append(inputs[0][0].tolist())
    )
    with caplog.at_level(logging.WARNING):
        model.generate_until(asked((TEXT * 3, {"max_gen_toks": 4}), (TEXT * 3, {}), ("a", {})))
    prompts = [call for call in written if len(call) > 1]
    assert prompts[0] == ids[-20:]
    assert prompts[1] == ids[-12:]  # half of max_length, where more new tokens are asked for
    assert prompts[2] == ids[:1] + lm.tokenizer.encode("a")
    assert "cut 2 contexts on the left, to fit into max_length=24" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.loglikelihood(asked((TEXT * 3, " a"), ("a", " b")))
    assert "cut 1 contexts" in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loops": 0}, "loops=0 must be 1 or more"),
        ({"loops": "many"}, "loops='many' must be an integer"),
        ({"halting": "sleep"}, "halting='sleep' must be one of none, gate"),
        ({"halting": "gate", "threshold": 2.0}, "threshold=2.0 must be above 0"),
        ({"threshold": 0.5}, "threshold=0.5 must be left out"),
        ({"device": "abacus"}, "device='abacus' must be one that torch finds here"),
        ({"dtype": "float32"}, "model_args has dtype=float32, must have only pretrained, loops"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make, options, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**options)


def test_a_model_must_be_named():
    harness = importlib.import_module("openmythos.inference.harness")
    with pytest.raises(InputError, match="model_args must have pretrained=FOLDER"):
        harness.HarnessModel()


def test_cuda_that_is_not_there_is_the_cpu(make):
    if not torch.cuda.is_available():
        assert make(device="cuda:0").lm.model.embed.weight.device.type == "cpu"


def test_one_beam_is_what_it_follows_anyway(make):
    one, other = make().generate_until(asked(("the", {"num_beams": 1}), ("the", {})))
    assert one == other


def test_a_chat_template_is_refused_with_a_reason(make, folder):
    model = make()
    for ask in (lambda: model.tokenizer_name, lambda: model.apply_chat_template([], True)):
        with pytest.raises(InputError) as caught:
            ask()
        assert f"apply_chat_template must be left out: {folder} has no" in str(caught.value)


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"num_beams": 4}, "generation_kwargs has num_beams=4, must have only until"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(make, wish, sentence):
    with pytest.raises(InputError, match=sentence):
        make().generate_until(asked(("the", wish)))


@pytest.mark.skipif(INSTALLED, reason="the stand-in prints what it is given")
def test_the_command_hands_its_arguments_on_and_has_registered_our_models():
    typed = ["--model", "openmythos", "--model_args", "pretrained=x,loops=2", "--help"]
    before = sys.argv
    result = openmythos("lm-eval", *typed)
    assert (result.code, result.out) == (0, f"{typed}\n")
    assert sys.argv is before
    from lm_eval.api.registry import MODELS

    assert list(MODELS) == ["openmythos"]
    assert openmythos("lm-eval").out == "[]\n"


def test_without_the_harness_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    result = openmythos("lm-eval", "--tasks", "sciq")
    assert result.code == 2
    assert "lm-eval must be installed" in result.err
    assert "pip install lm-eval==0.4.13" in result.err


TASKS = {  # one of each kind of request
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" sat", " ate"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{expected}}"
generation_kwargs: {until: ["~"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is installed in an environment of its own")
def test_the_harness_runs_all_kinds_of_tasks(folder, tmp_path):
    lm = library.load(folder)
    texts = ["the cat", "the rat", TEXT * 3]
    rows = [
        {"text": text, "expected": lm.generate(text, loops=3, temperature=0, max_new_tokens=4)}
        for text in texts[:2]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rows.jsonl}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntest_split: train\n{source}{text}")
    command = [sys.executable, "-m", "openmythos", "lm-eval", "--model", "openmythos"]
    command += ["--model_args", f"pretrained={folder},loops=3", "--include_path", str(tmp_path)]
    command += ["--tasks", ",".join(TASKS), "--output_path", str(tmp_path / "out")]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]
    assert results["written"]["exact_match,none"] == 1
    pairs = [(row["text"], answer) for row in rows for answer in (" sat", " ate")]
    thinking = Thinking(loops=3)
    scores = score(lm.model, encode_pairs(lm.tokenizer, pairs), thinking)
    nats = [one.log_likelihood for one in scores]
    right = [nats[0] > nats[1], nats[2] > nats[3]]
    assert results["choices"]["acc,none"] == sum(right) / 2
    whole = encode_pairs(lm.tokenizer, [("", row["text"]) for row in rows])
    bits = -sum(one.log_likelihood for one in score(lm.model, whole, thinking)) / math.log(2)
    size = sum(len(row["text"].encode()) for row in rows)
    assert results["whole"]["bits_per_byte,none"] == pytest.approx(bits / size)
