"""`openmythos export`: smaller files, and what they cost."""

import re
import shutil

import pytest
from command_line import TRAINING, answer, openmythos, printed

import openmythos as library
from openmythos.model.int8 import Int8Weight
from openmythos.training.corpus import read_documents
from openmythos.training.evaluate import Reading, evaluate, tokenised
from openmythos.training.run import trained_length


def bits(folder, text, loops):
    lm, documents = library.load(folder), read_documents(text)
    with tokenised(documents, lm.tokenizer) as file:
        reading = Reading.of(TRAINING["length"])
        return evaluate(lm.model, file, lm.tokenizer.token_bytes, loops, reading=reading)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_export_writes_a_model_and_the_figures_of_the_library(run, text, tmp_path, weights):
    folder = tmp_path / "small"
    flags = ["--weights", weights, "--text", text, "--loops", 3, 1]
    result = answer("export", run, folder, *flags)
    for when, where in (("before", run), ("after", folder)):
        expected = bits(where, text, [1, 3])
        measured = result["bits_per_byte"][when]
        assert measured == dict(zip("13", expected.bits_per_byte, strict=True))
    assert (result["length"], result["stride"], result["max_tokens"]) == (16, 8, None)
    assert result["bytes"]["after"] == (folder / "model.safetensors").stat().st_size
    model = library.load(run).model
    assert result["bytes"]["before"] == sum(p.nbytes for p in model.parameters()) + sum(
        buffer.nbytes for buffer in model.buffers()
    )
    # int8 of an output: at most half of a 127th of its largest weight, which is at most 6 times
    # the root mean square of these small random ones.
    most = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 6 / 127 / 2}[weights]
    assert result["largest_error"]["relative"] <= most
    assert (result["largest_error"]["relative"] > 0) == (weights != "fp32")


def test_export_prints_sizes_and_bits_per_byte(run, text, tmp_path):
    page = printed("export", run, tmp_path / "a", "--text", text, "--max-tokens", 60, "--loops", 2)
    assert "with int8 weights" in page
    assert re.search(
        r"^weights in file +\d+\.\d\d MB, \d\.\d\d times smaller than that$", page, re.M
    )
    assert "2 loops" in page
    assert "windows of 16 tokens, 8 apart, for the first 60 tokens" in page
    page = printed("export", run, tmp_path / "b", "--weights", "bf16")
    assert "with bf16 weights" in page
    assert "bits per byte" not in page


def test_what_is_known_of_the_training_goes_with_the_model_from_export_to_export(
    run, text, tmp_path
):
    printed("export", run, tmp_path / "half", "--weights", "bf16")
    flags = ["--text", text, "--length", 9, "--loops", 1, "--max-tokens", 20]
    printed("export", tmp_path / "half", tmp_path / "small", *flags)
    assert trained_length(tmp_path / "small") == TRAINING["length"]
    (tmp_path / "half" / "training.json").unlink()
    printed("export", tmp_path / "half", tmp_path / "other")
    assert trained_length(tmp_path / "other") is None


def test_an_exported_model_generates(run, tmp_path):
    printed("export", run, tmp_path / "small")
    text = printed("generate", tmp_path / "small", "--max-new-tokens", 5, "--seed", 1)
    assert text == library.load(tmp_path / "small").generate(max_new_tokens=5, seed=1) + "\n"


def test_a_run_without_a_finished_model_is_taken_from_its_last_checkpoint(run, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("model"))
    printed("export", unfinished, tmp_path / "small")
    assert library.load(tmp_path / "small").generate(max_new_tokens=3, seed=1)
    lm = library.load(unfinished, weights="int8")
    assert isinstance(lm.model.embed.weight, Int8Weight)


@pytest.mark.parametrize("place", ["TEXT", "TEXT/small", "closed/small"])
def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_measured(
    place, run, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if place.startswith("closed"):
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    monkeypatch.setattr("openmythos.training.evaluate.evaluate", None)
    folder = place.replace("TEXT", str(text))
    result = openmythos("export", run, folder, "--text", text)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"openmythos: folder={folder} must be a folder")
    assert "Errno" not in result.err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("nowhere small", "model='nowhere' must be the folder of a model or of a run"),
        ("RUN RUN/model", "holds a model or a run already (config.json), and must be new:"),
        ("RUN RUN", "holds a model or a run already (tokenizer.json), and must be new:"),
        ("RUN TEXT", "must be a folder, and is a file: choose another path"),
        ("RUN TEXT/small", "rhyme.txt is a file: choose another path"),
        ("RUN small --loops 3", "loops=(3,) must go with --text or --corpus: nothing is measured"),
        ("RUN small --length 9", "length=9 must go with --text or --corpus: nothing is measured"),
        ("RUN small --text-field body", "text_field=body must go with --text: a corpus has none"),
        (
            "RUN small --corpus embedded --text-field body",
            "text_field=body must go with --text: a corpus has none",
        ),
        ("RUN small --weights int4", "must be one of"),
        ("RUN small --text TEXT --corpus embedded", "one of --corpus and --text may be given"),
        ("RUN small --text none.txt", "text='none.txt' must exist"),
        ("RUN small --text TEXT --loops 0", "loops=0 must be 1 or more"),
        ("RUN small --text TEXT --length 65", "length=65 must be from 1 to the model's max_length"),
        ("RUN small --text TEXT --max-tokens 0", "max_tokens=0 must be 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(flags, sentence, run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = flags.replace("RUN", str(run)).replace("TEXT", str(text)).split()
    result = openmythos("export", *words)
    assert result.code == 2
    assert sentence in " ".join(result.err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())  # nothing was written
