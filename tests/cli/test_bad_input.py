"""What does not fit: one sentence on stderr, exit code 2, nothing written."""

import pytest
from command_line import openmythos

from openmythos.errors import InputError

SENTENCES = [
    ("fly", "command='fly' must be one of demo, train, generate"),
    ("trian", "evidence, bench: did you mean train?\n"),
    ("--verison", "evidence, bench: did you mean --version?\n"),
    ("generate nowhere", "model='nowhere' must be the folder of a model or of a run"),
    ("generate nowhere", "(openmythos-lm); a text to continue is given with --prompt\n"),
    ("generate nowhere --prompt hi", "comes with the package (openmythos-lm)\n"),
    ("generate FOLDER --prompt hi", "model='folder' must hold settings.json, as a training run"),
    ("generate FOLDER", "as a model does: choose another folder\n"),
    ("reason --model RUN", "must be a reasoner, which was trained on walks, and is one that reads"),
    ("reason --model RUN/model", "must be a reasoner, which was trained on walks, and is one that"),
    ("reason --model openmythos-lm", "model='openmythos-lm' must be a reasoner, which was trained"),
    ("reason --model nowhere", "model='nowhere' must be a model's folder or 'openmythos-reasoner'"),
    ("generate RUN --loops 0", "loops=0 must be 1 or more"),
    ("generate RUN --loops -2", "loops=-2 must be 1 or more"),
    ("generate RUN --loops 1.5", "loops='1.5' must be an integer"),
    ("generate RUN --halting sleep", "halting='sleep' must be one of none, gate"),
    ("generate RUN --halting gate --threshold 2", "threshold=2.0 must be above 0 and at most 1"),
    ("generate RUN --threshold 0.5", "threshold=0.5 must be left out with halting='none'"),
    ("generate RUN --temperature -1", "temperature=-1.0 must be 0 or more"),
    ("generate RUN --top-p 0", "top_p=0.0 must be above 0 and at most 1"),
    ("generate RUN --max-new-tokens 0", "max_new_tokens=0 must be an integer of 1 or more"),
    ("chat nowhere", "model='nowhere' must be the folder of a model or of a run"),
    ("eval RUN/model", "one of --corpus, --text and --task must be given, and not more"),
    ("eval RUN --text TEXT --corpus embedded", "one of --corpus, --text and --task must be given"),
    ("eval RUN --text none.txt", "text='none.txt' must exist"),
    ("eval RUN --text TEXT --loops 0 1", "loops=0 must be 1 or more"),
    ("eval RUN --text TEXT --loops", "loops must hold a depth of 1 or more"),
    ("eval RUN --text TEXT --length 65", "length=65 must be from 1 to the model's max_length=64"),
    ("eval RUN --text TEXT --length 0", "length=0 must be from 1 to the model's max_length=64"),
    ("eval RUN --text TEXT --stride 17", "stride=17 must be from 1 to length=16"),
    ("eval RUN --text TEXT --max-tokens 0", "max_tokens=0 must be 1 or more"),
    ("eval RUN --text TEXT --png a.gif", "picture='a.gif' must end in one of .png, .svg, .pdf"),
    ("eval RUN --text TEXT --png TEXT/a.png", "choose another --png, or draw none with --png None"),
    ("eval RUN --text TEXT --threshold 1", "threshold=1.0 must go with a rule"),
    ("eval RUN --corpus embedded --text-field body", "text_field must be left out without --text"),
    ("eval RUN --task sciq --png a.png", "png must be left out with --task: it is of a text"),
    ("eval RUN --task sciq --png eval.png", "png must be left out with --task: it is of a text"),
    ("eval RUN --task sciq --no-ppmd", "no_ppmd must be left out with --task: it is of a text"),
    ("eval RUN --task sciq --text-field=a", "text_field must be left out with --task: it is of a"),
    (
        "eval --task sciq --halting gate",
        "halting must be left out without a MODEL: floors are of",
    ),
    ("eval --task sciq --loops 1 2", "loops must be left out without a MODEL: floors are of the"),
    ("eval --task sciq --device cpu", "device must be left out without a MODEL: floors are of"),
    *(
        (f"{command} --device cuda:99", "device='cuda:99' must be one that torch finds here")
        for command in (
            "generate RUN",
            "chat RUN",
            "eval RUN --text TEXT",
            "serve RUN --port 0",
            "bench",
        )
    ),
    ("eval RUN --text TEXT --given TEXT --no-ppmd", "must be left out with --no-ppmd: only"),
    ("info 2t", "model='2t' must be one of nano, tiny, small"),
    ("info nano --loops 0", "loops=0 must be 1 or more"),
    ("info nano --loops", "loops must hold a depth of 1 or more"),
    ("reason --hops -3", "hops=-3 must be 0 or more"),
    ("reason --seed -1", "seed=-1 must be 0 or more"),
    ("reason library red --seed 0", "seed must be left out with a walk: it draws one"),
    ("generate RUN --show-loops --json", "show_loops must be left out with --json, which has"),
    ("evidence --json", "json must be left out without a CLAIM: the list is all there is"),
    ("evidence routing --threads 1000000", "threads=1000000 must be from 1 to"),
    ("evidence routing --threads 0", "threads=0 must be from 1 to"),
    ("bench nano --threads 1 9999", "threads=9999 must be from 1 to"),
    ("info nano --keys 0", "keys=0 must be 1 or more"),
    ("info --loops 4", "loops must be left out of the comparison"),
    ("plot nowhere", "run=nowhere must hold metrics.jsonl"),
    ("bench nowhere", "model='nowhere' must be one of nano, tiny, small"),
    ("bench nano --weights int4", "weights='int4' must be one of fp32, bf16, int8, auto, file"),
    ("bench nano --repeats 0", "repeats=0 must be 1 or more"),
    ("bench nano --length 99999", "length=99999 must be at most 256, half of the model's"),
    ("bench 1t", "GB in fp32, must fit into this machine's memory of"),
    ("bench nano --threads 0", "threads=(0,) must hold integers of 1 or more"),
    ("train --preset huge", "preset='huge' must be one of nano, tiny, small"),
    ("train", "one of corpus and text must be given, and not both"),
    ("train --text none.txt", "text='none.txt' must exist"),
    ("train --corpus embedded --held-out 0.9", "held_out=0.9 must go with text"),
    ("train --corpus embedded --held-out nan", "held_out=nan must go with text"),
    ("train --corpus embedded --text-field body", "field='body' must go with text: a corpus"),
    ("train --text TEXT --held-out nan", "held_out=nan must be above 0 and at most 0.5"),
    ("train --text TEXT --preset 1t", "GB in fp32, must fit into this machine's memory of"),
    ("train --text TEXT --run TEXT", "must be a folder, and is a file"),
    ("train --text TEXT --run TEXT/a.png", "rhyme.txt is a file: choose another path"),
    ("train --text TEXT --threads 1000000", "threads=1000000 must be from 1 to"),
    ("train --text TEXT --no-checkpoint-activations", "must go with --resume: a new run"),
    (
        "train --resume RUN --checkpoint-activations --no-checkpoint-activations",
        "checkpoint_activations must be left out with its opposite: choose one",
    ),
    ("train --resume RUN --until 100", "start another run with --start-from"),
    ("train --resume RUN --until 100", "until=100 must be left out at step 3: the learning rate"),
    ("train --resume RUN --steps 1000", "steps must be left out with --resume: to train to that"),
    ("train --resume RUN --steps=9", "to train to that step, give --until 9"),
    ("train --resume RUN --preset nano", "preset must be left out with --resume: a run goes on"),
    ("train --resume RUN --held-out 0.05", "held_out must be left out with --resume: a run goes"),
    ("train --resume RUN --batch_size 16", "batch_size must be left out with --resume: a run"),
    ("train --text TEXT --run RUN", "holds a run already"),
    ("train --text TEXT --steps 0", "steps=0 must be 1 or more"),
    ("train --text TEXT --model.kv-heads 3", "kv_heads=3 must divide num_heads=4"),
    ("demo --fresh --run FOLDER", "must be a training run to be deleted"),
    ("demo --train yes --run TEXT", "must be a folder, and is a file"),
    ("demo --train yes --steps 0", "steps=0 must be 1 or more"),
    ("demo --train no --max-new-tokens 0", "max_new_tokens=0 must be 1 or more"),
    ("train --text TEXT --train adapters", "train='adapters' must go with lora_rank of 1 or more"),
    ("train --text TEXT --start-from RUN --preset tiny", "preset=tiny must be left out with"),
    ("train --text TEXT --start-from RUN --preset nano", "preset=nano must be left out with"),
    (
        "train --text TEXT --start-from openmythos-lm --model.mean-loops 4",
        "mean_loops=4 must be left out with --start-from: the shape is that model's own, with",
    ),
    (
        "train --text TEXT --start-from openmythos-lm --model.experts 4",
        "experts=4 must be left out with --start-from: the shape is that model's own",
    ),
    ("train --text TEXT --start-from nowhere", "start_from=nowhere must be the folder of a model"),
    ("train --text TEXT --optimizer.adam-lr inf", "adam_lr=inf must be a finite number"),
    ("eval RUN --text TEXT --png TEXT/a.png", "must lie in a folder that can be written to"),
]


@pytest.mark.parametrize(("command", "sentence"), SENTENCES, ids=[c for c, _ in SENTENCES])
def test_what_does_not_fit_is_refused(command, sentence, run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    names = {"RUN": str(run), "TEXT": str(text), "FOLDER": "folder"}
    words = (word.partition("/") for word in command.split())
    result = openmythos(*("".join([names.get(first, first), *rest]) for first, *rest in words))
    assert result.code == 2
    assert sentence in result.err
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]  # nothing was written


def test_a_prompt_that_is_not_utf8_is_refused(run, monkeypatch):
    import io

    from openmythos.cli import generate_command

    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(ValueError, match="must be UTF-8, but is not at byte 3"):
        generate_command.run(generate_command.Settings(model=run, prompt="-"))


@pytest.mark.parametrize(
    "command", ["train --text TEXT --run new/run", "train --resume RUN --until 9"]
)
def test_a_folder_that_cannot_be_written_to_is_named(command, run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    named = {"RUN": str(run), "TEXT": str(text)}
    result = openmythos(*(named.get(word, word) for word in command.split()))
    folder = run if "RUN" in command else tmp_path
    assert result.code == 2
    assert f"must be a folder that can be written to, and {folder} cannot: choose" in result.err
    assert not list(tmp_path.iterdir())


def test_a_line_of_chat_that_is_not_utf8_is_refused(run, monkeypatch):
    import io

    from openmythos.cli import chat_command

    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    with pytest.raises(InputError, match="standard input must be UTF-8, and is not: convert it"):
        chat_command.run(chat_command.Settings(model=run))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff"])
@pytest.mark.parametrize("name", ["config.json", "settings.json"])
def test_a_settings_file_that_is_no_json_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    result = openmythos("generate", tmp_path)
    must = "must be JSON" if name == "config.json" else "must be a whole settings file, but"
    assert result.code == 2
    assert f"{tmp_path / name} {must}" in result.err
    assert result.err.count("\n") == 1


def test_an_unfinished_run_is_not_started_from(run, text, tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "settings.json").write_bytes((run / "settings.json").read_bytes())
    result = openmythos("train", "--text", text, "--start-from", tmp_path / "cut")
    assert result.code == 2
    assert (
        "must be a model or a finished run: finish it with openmythos train --resume" in result.err
    )
