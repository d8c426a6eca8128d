"""Each command on a small run: what it prints is what the library says."""

import io
import itertools
import json
import re
import shutil

import pytest
import torch
from command_line import RHYME, SHAPE, TRAINING, answer, openmythos, printed

import openmythos as library
from openmythos import MythosConfig, OpenMythos, speed
from openmythos.cli import (
    chat_command,
    demo_command,
    generate_command,
    loop_colours,
    main,
    parse,
    serve_command,
    shipped_demo,
    train_command,
)
from openmythos.cli.chat_command import Chat
from openmythos.cli.demo_command import OPENING, RULE
from openmythos.cli.loop_colours import LoopColours
from openmythos.cli.process import program
from openmythos.cli.progress import Progress
from openmythos.errors import TokenizerError
from openmythos.inference import language_model
from openmythos.inference.language_model import Piece
from openmythos.inference.precision import weights_of
from openmythos.inference.shipped import find_model
from openmythos.model.native import build
from openmythos.scales import SCALES
from openmythos.training import corpus
from openmythos.training.corpus import read_documents
from openmythos.training.evaluate import Reading, evaluate, evaluate_halting, tokenised
from openmythos.training.machine import Machine
from openmythos.training.metrics import metrics
from openmythos.training.run import OfMachine
from openmythos.training.settings import TrainConfig
from openmythos.training.tokenizer import Tokenizer


def test_generate_prints_what_the_library_writes(run):
    expected = library.load(run).generate("The mice", max_new_tokens=9, seed=4, loops=3)
    flags = ["--max-new-tokens", 9, "--seed", 4, "--loops", 3]
    assert printed("generate", run, "--prompt", "The mice", *flags) == f"{expected}\n"
    result = answer("generate", run, "--prompt", "The mice", *flags)
    assert result["text"] == expected
    assert result["loops"] == [3] * len(result["token_ids"])
    assert result["mean_loops"] == 3
    assert result["tokens_per_second"] > 0
    lm = library.load(run)
    assert result["prompt_tokens"] == 1 + len(lm.tokenizer.encode("The mice"))
    stop = expected[4:6]
    stopped = answer("generate", run, "--prompt", "The mice", *flags, "--stop", stop)
    assert (stopped["finish"], result["finish"]) == ("stop", "length")


@pytest.mark.parametrize("flags", [(), ("--weights", "bf16")])
@pytest.mark.parametrize("command", [generate_command, chat_command, serve_command])
def test_who_writes_takes_int8_as_the_file_has_it_unless_told(run, command, flags, monkeypatch):
    taken = []

    class LoadedError(Exception):
        pass

    def load(*given):
        taken.append(given)
        raise LoadedError

    monkeypatch.setattr(language_model, "load", load)
    settings = parse(command, "some", [str(run), *flags])
    with pytest.raises(LoadedError):
        (serve_command._load if command is serve_command else command.run)(settings)
    assert taken == [(run, flags[-1] if flags else "file", None)]


def test_generate_takes_its_prompt_from_standard_input(run):
    flags = ["--max-new-tokens", 9, "--seed", 4]
    given = printed("generate", run, "--prompt", "-", *flags, stdin="The mice\n")
    assert given == printed("generate", run, "--prompt", "The mice", *flags)


def test_generate_stops_at_each_stop_string(run):
    text = printed("generate", run, "--prompt", "The", "--seed", 1, "--max-new-tokens", 30)
    flags = ["--seed", 1, "--max-new-tokens", 30, "--stop", text[4:6], "--stop", "never"]
    stopped = printed("generate", run, "--prompt", "The", *flags)
    assert stopped == text[: text.find(text[4:6])] + "\n"


@pytest.fixture
def ending(run, monkeypatch):
    """A model that ends every text at once."""
    lm = library.load(run)
    monkeypatch.setattr(lm, "write", lambda *_, **__: iter(()))
    monkeypatch.setattr("openmythos.inference.language_model.load", lambda *_: lm)


@pytest.mark.usefixtures("ending")
def test_a_text_that_ends_at_once_is_told(run):
    said = "openmythos: the model ended the text at once: try a longer prompt"
    result = openmythos("generate", run, "--prompt", "Hi")
    assert (result.code, result.out) == (0, "\n")
    assert result.err == f"{said} or another --seed\n"
    assert openmythos("generate", run, "--temperature", 0).err == f"{said}\n"
    assert openmythos("generate", run, "--json").err == ""  # which has no token_ids


@pytest.mark.usefixtures("ending")
def test_a_reply_that_ends_at_once_is_told(run):
    result = openmythos("chat", run, stdin="a\nb\n")
    assert (result.code, result.out) == (0, "\n\n")
    assert result.err == f"{chat_command.ENDED_AT_ONCE}\n" * 2


def test_a_text_with_tokens_says_nothing_more(run):
    assert openmythos("generate", run, "--prompt", "The mice", "--seed", 4).err == ""
    assert openmythos("chat", run, "--seed", 4, stdin="The mice\n").err == ""


def test_loops_are_counted_at_the_end_without_colours_where_there_is_no_terminal(run):
    flags = ["--max-new-tokens", 12, "--seed", 2, "--loops", 5, "--halting", "delta"]
    shown = printed("generate", run, "--show-loops", *flags)
    plain = printed("generate", run, *flags)
    result = answer("generate", run, *flags)
    assert shown.startswith(plain)
    assert "\x1b" not in shown
    counted = dict(map(int, row.split()[:2]) for row in re.findall(r"^ +\d+ +\d+ .*$", shown, re.M))
    assert counted == {n: result["loops"].count(n) for n in set(result["loops"])}
    assert f"mean {result['mean_loops']:.2f} of at most 5 loops" in shown


def test_what_the_terminal_cannot_show_becomes_a_question_mark(run, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    main(["generate", str(run), "--prompt", "hé", "--show-loops", "--max-new-tokens", "3"])
    shown.flush()
    page = shown.buffer.getvalue()
    assert page.startswith(b"hi") or b"\xc3" not in page
    assert re.search(rb"^ +2 +3 +#{30} 100%$", page, re.M)


def test_commands_that_are_printed_can_be_pasted(text, tmp_path):
    folder = tmp_path / "my run"
    flags = [f"--model.{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    page = printed("train", "--text", text, "--run", folder, *flags)
    assert f"openmythos generate '{folder}' --prompt" in page
    assert f"openmythos plot '{folder}'" in page
    again = openmythos("train", "--text", text, "--run", folder)
    assert f"--resume '{folder}', or" in again.err
    assert f"openmythos chat '{folder}'\n" in demo_command._what_next(folder)


def test_colours_go_from_few_to_many_loops_and_are_reset():
    colours = LoopColours(budget=16, colours=True)
    painted = [colours.paint(Piece("x", 7, loops)) for loops in range(1, 17)]
    used = [int(re.fullmatch(r"\x1b\[38;5;(\d+)mx\x1b\[0m", text)[1]) for text in painted]
    assert used == list(loop_colours.PALETTE)
    assert colours.paint(Piece("", 7, 3)) == ""
    assert sum(colours.counts.values()) == 17
    colours.paint(Piece("rest", None, 3))  # text, but no token
    assert sum(colours.counts.values()) == 17


@pytest.mark.parametrize(("terminal", "said", "wanted"), [(True, "", True), (True, "1", False)])
def test_no_color_is_respected(terminal, said, wanted, monkeypatch):
    monkeypatch.setenv("NO_COLOR", said)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert loop_colours.colours_wanted() == wanted


def test_chat_goes_on_with_all_the_text_so_far(run):
    lm = library.load(run)
    flags = ["--max-new-tokens", 8, "--seed", 1]
    replies = printed("chat", run, *flags, stdin="The mice\nran up\n\n/quit\nmore\n")
    first = lm.generate("The mice", max_new_tokens=8, seed=1)
    text = f"The mice{first}"
    text += "ran up" if text[-1].isspace() else "\nran up"
    second = lm.generate(text, max_new_tokens=8, seed=2)
    third = lm.generate(text + second, max_new_tokens=8, seed=3)
    assert replies == f"{first}\n{second}\n{third}\n"


def test_chat_commands_change_the_next_reply(run):
    lm = library.load(run)
    typed = "/seed 5\n/temperature 0.3\n/loops 3\n/halting delta 0.5\nThe\n/reset\n/seed 5\nThe\n"
    expected = lm.generate(
        "The", max_new_tokens=8, seed=5, temperature=0.3, loops=3, halting="delta", threshold=0.5
    )
    replies = printed("chat", run, "--max-new-tokens", 8, stdin=typed)
    assert replies == f"{expected}\n{expected}\n"


def test_chat_forgets_the_beginning_where_the_text_outgrows_the_model(run):
    typed = "The mice ran up the clock, and the clock struck twelve.\n" * 12
    replies = printed("chat", run, "--max-new-tokens", 20, "--seed", 0, stdin=typed)
    assert len(replies) > 12


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/fly", "command=/fly must be one of /loops, /halting"),
        ("/loops", "command=/loops has 0 values"),
        ("/loops 0", "loops=0 must be an integer of 1 or more"),
        ("/loops many", "loops=many must be an integer of 1 or more"),
        ("/temperature hot", "temperature=hot must be a number"),
        ("/temperature -1", "temperature=-1.0 must be 0 or more"),
        ("/halting sleep", "halting='sleep' must be one of none, gate"),
        ("/halting gate 3", "threshold=3.0 must be above 0 and at most 1"),
        ("/seed x", "seed=x must be an integer of 0 or more"),
    ],
)
def test_a_chat_command_that_does_not_fit_is_refused(run, line, sentence):
    result = openmythos("chat", run, stdin=line + "\n")
    assert (result.code, result.out) == (2, "")
    assert sentence in result.err


@pytest.fixture
def interrupted(run, monkeypatch):
    """A model that writes two pieces, and then the user has read enough."""

    class Interrupted:
        def __init__(self, lm):
            self.model, self.tokenizer = lm.model, lm.tokenizer

        def write(self, *_, **__):
            yield Piece("one", 5, 1)
            yield Piece(" two", 6, 1)
            raise KeyboardInterrupt

    lm = library.load(run)
    monkeypatch.setattr("openmythos.inference.language_model.load", lambda *_: Interrupted(lm))


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_ends_a_reply_and_not_the_chat(run):
    assert printed("chat", run, stdin="a\nb\n") == "one two\none two\n"


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_ends_a_text_with_its_line_and_its_legend(run):
    result = openmythos("generate", run, "--show-loops")
    assert result.code == 130
    assert result.out.startswith("one two\n\n")
    assert result.out.count("\n") > 2


def test_a_line_that_chat_cannot_read_is_not_kept(run):
    lm = library.load(run)
    chat = Chat(lm, chat_command.Settings(model=run, max_new_tokens=2))
    chat.take("the mice")
    before = chat.text
    with pytest.raises(TokenizerError, match="must be a character"):
        chat.take("caf\udce9")
    assert chat.text == before
    chat.take("ran up")


def test_eval_gives_the_librarys_figures_of_the_whole_text(run, text, tmp_path):
    picture = tmp_path / "curve.png"
    flags = ["--loops", 1, 3, "--halting", "delta", "--threshold", 0.5, "--png", picture]
    result = answer("eval", run, "--text", text, "--given", text, *flags)
    lm, documents = library.load(run), read_documents(text)
    with tokenised(documents, lm.tokenizer) as file:
        sizes = lm.tokenizer.token_bytes
        expected = evaluate(lm.model, file, sizes, [1, 3], reading=Reading.of(16))
        rule = {"halting": "delta", "threshold": 0.5, "budget": 3}
        ruled = evaluate_halting(lm.model, file, sizes, reading=Reading.of(16), **rule)
    assert result["bytes"] == len(documents[0].encode())
    assert list(result["bits_per_byte"].values()) == pytest.approx(expected.bits_per_byte)
    assert result["halting"]["bits_per_byte"] == pytest.approx(ruled.bits_per_byte)
    assert 1 <= result["halting"]["mean_loops"] <= 3
    assert result["ppmd"]["given"] < result["ppmd"]["alone"]  # it has read this very text
    assert result["ppmd"]["given_text"] == str(text)
    assert (result["length"], result["stride"], result["max_tokens"]) == (16, 8, None)
    assert result["halting"]["threshold"] == 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_measures_a_corpus_on_its_held_out_side(run, tmp_path):
    flags = ["--loops", 1, "--max-tokens", 60, "--png", tmp_path / "eval.svg"]
    page = printed("eval", run, "--corpus", "embedded", *flags)
    assert "embedded, held out" in page
    assert "windows of 16 tokens, 8 apart, for the first 60 tokens" in page
    assert re.search(r"1 loops +\d\.\d{4}", page)
    assert re.search(r"PPMd after embedded, training side +\d\.\d{4}", page)
    assert (tmp_path / "eval.svg").read_text().startswith("<?xml")


def test_eval_measures_a_run_on_what_it_held_out(run):
    result = answer("eval", run, "--loops", 1, 4, "--png", "None")
    (final,) = (line["validation"] for line in metrics(run) if "final" in line)
    assert result["text"] == f"text of {run}, held out"
    for loops, bits in result["bits_per_byte"].items():
        assert bits == pytest.approx(final[loops], abs=1e-4)
    assert result["ppmd"]["given_text"] == f"text of {run}, training side"


def quick(model, text, *flags, max_tokens=20):
    flags = ["--loops", 1, "--max-tokens", max_tokens, "--png", "None", "--no-ppmd", *flags]
    return answer("eval", model, "--text", text, *flags)


def test_eval_reads_every_copy_of_a_model_in_the_windows_of_its_training(run, text, tmp_path):
    printed("export", run, tmp_path / "small", "--weights", "fp32")
    shutil.copytree(run / "model", tmp_path / "copy")
    checkpoint = next(run.glob("step-*"))
    whole = [quick(folder, text) for folder in (run, run / "model", tmp_path / "small")]
    assert len({(result["length"], result["bits_per_byte"]["1"]) for result in whole}) == 1
    for folder in (run, run / "model", checkpoint, tmp_path / "small", tmp_path / "copy"):
        assert quick(folder, text)["length"] == TRAINING["length"]
    (tmp_path / "copy" / "training.json").unlink()
    assert quick(tmp_path / "copy", text)["length"] == SHAPE["max_length"]
    assert quick(run, text, "--length", 9, "--stride", 2)["length"] == 9


def test_eval_does_not_take_the_windows_of_a_run_that_a_model_merely_lies_in(run, text, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(run / "settings.json", tmp_path / "other")
    shutil.copytree(run / "model", tmp_path / "other" / "mine")
    (tmp_path / "other" / "mine" / "training.json").unlink()
    assert quick(tmp_path / "other" / "mine", text)["length"] == SHAPE["max_length"]


def test_eval_knows_the_windows_of_the_model_in_the_package(run, text, monkeypatch):
    monkeypatch.chdir(run)  # whose settings are not its
    result = quick("openmythos-lm", text)
    assert (result["length"], result["stride"]) == (512, 256)


def test_eval_tells_the_default_threshold_of_a_rule(run, text):
    gate = library.load(run).model.core.learned_exits()["gate"]
    for rule, threshold in (("gate", float(gate.threshold)), ("kl", 5e-4)):
        assert quick(run, text, "--halting", rule)["halting"]["threshold"] == threshold


def test_eval_tells_its_figures_before_it_draws(run, text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    flags = ["--loops", 1, "--max-tokens", 20, "--no-ppmd", "--png", tmp_path / "a.png"]
    result = openmythos("eval", run, "--text", text, *flags)
    assert re.search(r"1 loops +\d\.\d{4}", result.out)
    assert (result.code, "drawn in" in result.out) == (2, False)
    assert "must be writable: the disk is full" in result.err
    as_json = openmythos("eval", run, "--text", text, *flags, "--json")
    assert (as_json.code, list(json.loads(as_json.out)["bits_per_byte"])) == (2, ["1"])


def test_eval_refuses_a_place_that_cannot_take_a_picture_before_it_reads(run, tmp_path):
    result = openmythos("eval", run, "--text", "none.txt", "--png", tmp_path / "new" / "a.png")
    assert "text='none.txt' must exist" in result.err
    (tmp_path / "eval.png").mkdir()
    result = openmythos("eval", run, "--text", "none.txt", "--png", tmp_path / "eval.png")
    assert (result.code, result.out) == (2, "")
    assert "eval.png' must be a file, and a folder of that name exists" in result.err


def test_eval_can_leave_ppmd_out(run, text, monkeypatch):
    monkeypatch.setattr("openmythos.training.ppmd.bits_per_byte", None)
    flags = ["--corpus", "embedded", "--loops", 1, "--max-tokens", 20, "--png", "None"]
    assert "PPMd" not in printed("eval", run, *flags, "--no-ppmd")
    assert quick(run, text)["ppmd"] is None


@pytest.mark.parametrize("flag", ["--ppmd", "--no-no-ppmd"])
def test_leaving_ppmd_out_is_a_flag_that_says_so(flag):
    page = " ".join(printed("eval", "--help").replace("\u2502", " ").split())
    assert "--no-ppmd Do not measure PPMd, for a quick look:" in page
    assert f"{flag} is no flag of eval" in openmythos("eval", "x", flag).err


def test_a_corpus_that_the_model_in_the_package_knows_is_told(run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--loops", 1, "--max-tokens", 20]
    shown = ["--no-ppmd", "--png", "None", *flags]
    said = "holds out is not new to openmythos-lm, which was trained on a third of it"
    measured = openmythos("eval", "openmythos-lm", "--corpus", "embedded", *shown)
    assert measured.code == 0
    assert measured.err.count(said) == measured.err.count("\n") == 1
    copied = openmythos("export", "openmythos-lm", "copy", "--corpus", "embedded", *flags)
    assert copied.err.count(said) == copied.err.count("\n") == 1
    assert openmythos("eval", run, "--corpus", "embedded", *shown).err == ""
    assert openmythos("eval", "openmythos-lm", "--text", text, *shown).err == ""


def test_files_that_are_not_read_are_told(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "rhyme.txt").write_text(RHYME)
    flags = [f"--model.{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    said = "text='texts': read 1 file; left out 1 of other kinds (.md)\n"
    assert quick(run, "texts")["text"] == "texts"
    assert "left out" not in openmythos("train", "--text", "texts", "--run", "one", *flags).err
    (tmp_path / "texts" / "notes.md").write_text("notes")
    trained = openmythos("train", "--text", "texts", "--run", "two", *flags)
    assert (trained.err, "left out" in trained.out) == (f"openmythos: {said}", False)
    shown = ["--loops", 1, "--max-tokens", 20]
    measured = openmythos("eval", run, "--text", "texts", "--no-ppmd", "--png", "None", *shown)
    copied = openmythos("export", run, "copy", "--text", "texts", *shown)
    assert measured.err == copied.err == f"openmythos: {said}"


def test_eval_tokenises_no_more_documents_than_it_measures(run, tmp_path, monkeypatch):
    path = tmp_path / "many.jsonl"
    lines = (f"The {n} mice ran up the clock." for n in range(300))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    everything = quick(run, path, "--stride", 16, max_tokens=10**6)
    read, encode = [], Tokenizer.encode_batch

    def counting(self, texts):
        read.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    some = [quick(run, path, "--stride", 16, max_tokens=count) for count in (1, 16, 33)]
    assert 3 <= len(read) < 150
    assert [result["tokens"] for result in some] == [16, 16, 48]
    lm, documents = library.load(run), read_documents(path)
    with tokenised(documents, lm.tokenizer) as file:  # all of it
        reading = Reading(length=16, stride=16, max_tokens=33)
        whole = evaluate(lm.model, file, lm.tokenizer.token_bytes, [1], reading=reading)
    assert some[2]["bits_per_byte"]["1"] == whole.bits_per_byte[0]
    assert everything["tokens"] > 10 * whole.tokens


def test_eval_of_less_than_a_character_has_no_figure_of_ppmd(run, tmp_path):
    path = tmp_path / "jp.txt"
    path.write_text("雪", encoding="utf-8")
    flags = ["--loops", 1, "--length", 1, "--max-tokens", 1, "--png", "None"]
    result = answer("eval", run, "--text", path, *flags)
    assert (result["tokens"], result["ppmd"]) == (1, None)


def test_info_compares_all_presets(run):
    page = printed("info")
    assert [line.split()[0] for line in page.splitlines()[1:11]] == list(SCALES)
    assert [report["name"] for report in answer("info")] == list(SCALES)


def test_info_of_a_run_is_that_of_its_model(run):
    of_run, of_model = answer("info", run), answer("info", run / "model")
    assert of_run["parameters"] == of_model["parameters"]
    model = library.load(run).model
    assert of_run["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert "parameters" in printed("info", run)


def test_info_of_a_checkpoint_is_that_of_its_run(run, tmp_path):
    checkpoint = next(run.glob("step-*"))
    assert answer("info", checkpoint)["config"] == answer("info", run)["config"]
    assert "parameters" in printed("info", checkpoint)
    shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    alone = openmythos("info", tmp_path / checkpoint.name)
    assert alone.code == 2
    assert "config.json must exist" in alone.err


def test_info_knows_the_models_in_the_package():
    report = json.loads(openmythos("info", "openmythos-reasoner", "--json").out)
    model = OpenMythos.from_pretrained(find_model("openmythos-reasoner"))
    assert report["parameters"]["total"] == sum(p.numel() for p in model.parameters())


def test_resuming_a_finished_run_says_so_and_does_nothing(run):
    before = (run / "metrics.jsonl").read_bytes()
    result = openmythos("train", "--resume", str(run))
    assert (result.code, result.out) == (
        0,
        f"{run} is finished already, with all of its 3 steps\n",
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_is_given_anew_what_was_typed_beside_resume_and_no_more(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "openmythos.training.start.open_run", lambda *run, **how: given.append(how) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["train", "--resume", str(tmp_path), "--save-every", "100", "--until=9"])
    assert given == [{"steps": 9, "of_machine": OfMachine(save_every=100)}]


def test_a_shape_that_is_the_models_own_may_be_named_with_start_from(run):
    flags = ["--start-from", str(run), f"--model.mean-loops={SHAPE['mean_loops']}"]
    assert train_command._start(parse(train_command, "train", flags)) == run / "model"


def test_info_counts_operations_at_the_depths_asked_for():
    depths = answer("info", "1t", "--loops", 1, 2, 3)["flops_per_token"]["forward_by_loops"]
    assert list(depths) == ["1", "2", "3"]
    assert depths["3"] - depths["2"] == depths["2"] - depths["1"] > 0


def test_plot_draws_the_run(run):
    files = printed("plot", run).split()
    names = {"loss", "depth", "spectral_radius", "state_rms", "expert_load"}
    assert {file.rsplit("/", 1)[-1].removesuffix(".png") for file in files} == names
    assert answer("plot", run)["files"] == files


def test_bench_names_every_task(run):
    flags = ["--repeats", 1, "--loops", 1, 2, "--batches", 1, 3, "--length", 8, "--threads", 1]
    threads = torch.get_num_threads()
    result = answer("bench", run, *flags)
    assert torch.get_num_threads() == threads
    tasks = [(speed["task"], speed["batch"], speed["loops"]) for speed in result["speeds"]]
    kinds = itertools.product(("prefill", "decode"), (1, 3), (1, 2))
    assert tasks == [("training", 32, 2), *kinds]
    assert all(speed["tokens_per_second"] > 0 for speed in result["speeds"])
    page = printed("bench", run, *flags)
    assert "decode, 3 after 8" in page


@pytest.mark.parametrize("model", ["run", "nano", "openmythos-lm"])
@pytest.mark.parametrize("weights", ["file", "bf16", "int8"])
def test_bench_measures_the_weights_that_were_asked_for(model, weights, run, monkeypatch):
    found = []

    def measured(model, **_):
        found.append(weights_of(model))
        return speed.Bench(Machine("fp32", "asked for", 1e9), {}, found[-1], [])

    monkeypatch.setattr(speed, "bench", measured)
    result = answer("bench", run if model == "run" else model, "--weights", weights)
    kept = "int8" if model == "openmythos-lm" and build.library() is not None else "fp32"
    assert [result["weights"]] == found == [kept if weights == "file" else weights]


@pytest.fixture
def quick_demo(monkeypatch):
    """The demo's command with a model and a text that take a second."""
    monkeypatch.setattr(demo_command, "MODEL", MythosConfig(**SHAPE))
    monkeypatch.setattr(demo_command, "RECIPE", TrainConfig(**TRAINING))
    texts = [(RHYME, False), (RHYME.replace("mice", "rats"), True)]
    monkeypatch.setitem(corpus._CORPORA, "embedded", (lambda: iter(texts), "by hand"))
    monkeypatch.setattr(shipped_demo, "show", lambda *_: None)


def test_the_demo_begins_with_the_shipped_models(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_demo, "DEPTHS", (8, 16, 24, 32, 40, 48, 64))  # those printed
    monkeypatch.setattr(shipped_demo, "HOPS", {10: "blue", 40: "red"})
    run = tmp_path / "demo"
    flags = ["--train", "no", "--run", run, "--max-new-tokens", 5, "--prompt", "The mice"]
    text = printed("demo", *flags)
    assert f"\n{OPENING}" in text
    assert "right" in text.split("walks through 40 doors")[1].split(RULE)[0]
    rows = re.findall(r"^ +\d+(?: +\d\.\d\d){7}$", text, re.M)
    share = {row.split()[0]: row.split()[1:] for row in rows}
    assert float(share["10"][2]) > 0.95
    assert float(share["40"][0]) < 0.3
    assert float(share["40"][-1]) > 0.95
    assert [file.name for file in run.rglob("*") if file.is_file()] == ["depth_of_walks.png"]


def test_the_demo_trains_measures_writes_and_draws(quick_demo, tmp_path):
    run = tmp_path / "demo"
    flags = ["--run", run, "--steps", 3, "--max-new-tokens", 5, "--prompt", "The mice"]
    first = printed("demo", *flags)
    bits = next(line["validation"] for line in metrics(run) if line.get("final"))
    for loops in (1, 2, 4, 8, 16):
        assert re.search(rf"{loops} loops? +{bits[str(loops)]:.4f}", first)
    assert re.search(r"PPMd +\d\.\d{4}", first)
    assert first.count("\nThe mice") == 3
    assert (run / "plots" / "against_ppmd.png").is_file()
    assert "Try next" in first
    written = (run / "metrics.jsonl").read_bytes()

    second = printed("demo", *flags)  # shows the same at once
    shown = "Bits per byte of held-out text"
    assert second[second.index(shown) :] == first[first.index(shown) :]
    assert (run / "metrics.jsonl").read_bytes() == written


def test_a_demo_goes_on_where_it_was_interrupted_or_begins_anew(quick_demo, tmp_path, monkeypatch):
    run = tmp_path / "demo"
    flags = ["--run", run, "--max-new-tokens", 5]
    monkeypatch.setattr("openmythos.training.plots.save", lambda _, path: path)
    report = Progress.report

    def interrupted(self, line):
        report(self, line)
        self.trainer._stop = True  # as Ctrl-C does

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "report", interrupted)
        result = openmythos("demo", *flags, "--steps", 3)
    assert result.code == 130
    assert f"stopped after step 1: {program()} demo goes on from there" in result.out
    assert f"Going on with the demo in {run}, at step 1." in printed("demo", *flags)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [0, 1, 2]
    printed("demo", *flags, "--fresh", "--steps", 2)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [0, 1]
