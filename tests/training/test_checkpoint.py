import errno
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openmythos import files
from openmythos.errors import CheckpointError
from openmythos.files import write_atomically
from openmythos.training import checkpoint
from openmythos.training.checkpoint import best, latest, load, remove_leftovers, save

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES += [torch.int64, torch.int32, torch.uint8, torch.bool]


def some_tensors(step=0):
    random = torch.Generator().manual_seed(step)
    return {
        "model": {"embed.weight": torch.randn(6, 4, generator=random), "a/b": torch.zeros(2)},
        "optimizer": {"embed.weight.step": torch.tensor(float(step))},
        "ema": {},
    }


def assert_same(parts, expected):
    assert parts.keys() == expected.keys()
    for part, named in expected.items():
        assert parts[part].keys() == named.keys()
        for name, tensor in named.items():
            loaded = parts[part][name]
            assert loaded.dtype == tensor.dtype
            assert loaded.shape == tensor.shape
            same = loaded.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            assert torch.equal(*same)


def names(run):
    return sorted(path.name for path in Path(run).iterdir())


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    state = {"tokens": 12345678901, "settings": {"lr": 0.1, "names": ["a", "b"]}, "loss": math.pi}
    path = save(tmp_path / "new" / "run", 120, some_tensors(3), state)
    assert path == tmp_path / "new" / "run" / "step-00000120"
    assert names(path) == ["state.json", "tensors.safetensors"]
    loaded = load(path)
    assert loaded.step == 120
    assert loaded.state == state
    assert_same(loaded.tensors, some_tensors(3))


def test_whoever_may_read_new_files_may_read_a_checkpoint(tmp_path):
    (tmp_path / "usual").touch()
    path = save(tmp_path / "run", 1, some_tensors(), {})
    wanted = (tmp_path / "usual").stat().st_mode
    assert {file.stat().st_mode for file in path.iterdir()} == {wanted}


def test_keys_that_json_turns_into_text_do_not_look_like_damage(tmp_path):
    path = save(tmp_path, 1, some_tensors(), {"seen": {10: (1, 2), 9: math.inf}})
    assert load(path).state == {"seen": {"10": [1, 2], "9": math.inf}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_tensors_of_every_type_come_back_bit_for_bit(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    path = save(tmp_path, 1, {"model": {"x": tensor}}, {})
    assert_same(load(path).tensors, {"model": {"x": tensor}})


def test_nan_infinity_and_negative_zero_keep_their_bits(tmp_path):
    tensor = torch.tensor([math.nan, -math.nan, math.inf, -0.0, 1e-42])
    path = save(tmp_path, 1, {"model": {"x": tensor}}, {})
    assert_same(load(path).tensors, {"model": {"x": tensor}})


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(50, 40)
    path = save(tmp_path, 1, {"model": {"embed": weight, "head": weight}, "ema": {"e": weight}}, {})
    assert (path / "tensors.safetensors").stat().st_size < 1.5 * weight.nbytes
    loaded = load(path).tensors
    assert_same(loaded, {"model": {"embed": weight, "head": weight}, "ema": {"e": weight}})
    assert loaded["model"]["embed"].data_ptr() == loaded["model"]["head"].data_ptr()


def test_views_and_transposes_are_stored_as_they_read(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"model": {"all": base, "row": base[2], "t": base.T, "p": torch.nn.Parameter(base)}}
    path = save(tmp_path, 1, tensors, {})
    assert_same(load(path).tensors, {"model": {k: v.detach() for k, v in tensors["model"].items()}})


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    scores = [1.9, 1.5, 1.7, None, 1.6, math.nan, 1.8]
    for step, score in enumerate(scores):
        save(tmp_path, step, some_tensors(step), {}, keep=2, bits_per_byte=score)
    assert names(tmp_path) == ["step-00000001", "step-00000005", "step-00000006"]
    assert best(tmp_path) == tmp_path / "step-00000001"
    save(tmp_path, 7, some_tensors(7), {}, keep=2, bits_per_byte=1.4)
    assert names(tmp_path) == ["step-00000006", "step-00000007"]
    assert best(tmp_path) == tmp_path / "step-00000007"


def test_without_a_score_none_is_best(tmp_path):
    assert best(tmp_path) is None
    save(tmp_path, 1, some_tensors(), {})
    assert best(tmp_path) is None


def test_the_checkpoint_just_written_stays_even_if_later_steps_exist(tmp_path):
    for step in (10, 20, 30, 15):
        save(tmp_path, step, some_tensors(step), {}, keep=1)
    assert names(tmp_path) == ["step-00000015", "step-00000030"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 5, some_tensors(1), {"try": 1})
    path = save(tmp_path, 5, some_tensors(2), {"try": 2})
    assert names(tmp_path) == ["step-00000005"]
    assert load(path).state == {"try": 2}
    assert_same(load(path).tensors, some_tensors(2))


def test_latest_is_the_highest_step(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    for step in (9, 100, 11):
        save(tmp_path, step, some_tensors(step), {})
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-00000200").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-00000100"


def truncate_tensors(path):
    os.truncate(path / "tensors.safetensors", 100)


def flip_a_bit_of_tensors(path):
    content = bytearray((path / "tensors.safetensors").read_bytes())
    content[-3] ^= 4
    (path / "tensors.safetensors").write_bytes(content)


def truncate_state(path):
    os.truncate(path / "state.json", 50)


def change_state(path):
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"step": 2', '"step": 3'))


def remove_tensors(path):
    (path / "tensors.safetensors").unlink()


def remove_state(path):
    (path / "state.json").unlink()


def make_state_another_programs(path):
    (path / "state.json").write_text('{"epoch": 3}')


def make_state_a_list(path):
    (path / "state.json").write_text("[]")


def make_state_binary(path):
    (path / "state.json").write_bytes(b"\xff\xfe\x00")


def make_version_newer(path):
    header = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(header | {"version": 2}))


DAMAGE = {
    truncate_tensors: "but tensors.safetensors has 100 bytes and not",
    flip_a_bit_of_tensors: "but the checksum of tensors.safetensors does not match",
    remove_tensors: "but tensors.safetensors is missing",
    truncate_state: "but state.json is not JSON",
    change_state: "but the checksum of state.json does not match",
    remove_state: "but state.json is missing",
    make_state_another_programs: "must be in the format openmythos-checkpoint",
    make_state_a_list: "must be in the format openmythos-checkpoint",
    make_state_binary: "but state.json is not JSON",
    make_version_newer: "must be of version 1 and is of 2: use the openmythos that wrote it",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_with_a_sentence_and_passed_over_by_latest(
    tmp_path, damage
):
    save(tmp_path, 1, some_tensors(1), {})
    path = save(tmp_path, 2, some_tensors(2), {})
    damage(path)
    with pytest.raises(CheckpointError, match=f"checkpoint=.*step-00000002 .*{DAMAGE[damage]}"):
        load(path)
    told = []
    assert latest(tmp_path, warn=told.append) == tmp_path / "step-00000001"
    assert len(told) == 1
    assert DAMAGE[damage] in told[0]


def test_latest_warns_if_nobody_listens(tmp_path):
    remove_state(save(tmp_path, 1, some_tensors(1), {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest(tmp_path) is None
    assert "state.json is missing" in str(caught[0].message)


def test_a_damaged_checkpoint_is_replaced_by_training_on(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, some_tensors(step), {})
    remove_state(tmp_path / "step-00000002")
    assert_same(load(save(tmp_path, 2, some_tensors(2), {})).tensors, some_tensors(2))


class Sharded(torch.Tensor):
    """A tensor that is told from a whole one as a DTensor is."""

    def full_tensor(self):
        return self


def test_a_sharded_tensor_is_refused_before_anything_is_written(tmp_path):
    tensors = {"model": {"a": torch.ones(2), "b": torch.ones(2).as_subclass(Sharded)}}
    with pytest.raises(CheckpointError, match="tensor=model/b must be whole, and is sharded: save"):
        save(tmp_path / "run", 1, tensors, {})
    assert not (tmp_path / "run").exists()


def test_the_newest_up_to_a_step_is_found(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, step, some_tensors(step), {}, keep=9)
    found = {until: latest(tmp_path, until=until) for until in (2, 3, 8, 99, None)}
    steps = {until: path and int(path.name[5:]) for until, path in found.items()}
    assert steps == {2: None, 3: 3, 8: 6, 99: 9, None: 9}


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be a folder such as run/step-00000120"):
        load(tmp_path / "nothing")


def test_loading_never_unpickles(tmp_path):
    path = save(tmp_path, 1, some_tensors(), {})
    torch.save({"x": print}, path / "tensors.safetensors")
    with pytest.raises(CheckpointError, match="tensors.safetensors has"):
        load(path)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_file(tensors, path):
    Path(path).write_bytes(b"half")
    no_space()


@pytest.mark.parametrize(
    ("module", "name", "failing"),
    [
        (checkpoint, "save_file", half_a_file),
        (checkpoint, "flush_to_disk", no_space),
        (Path, "write_text", no_space),
        (Path, "mkdir", no_space),
    ],
)
def test_a_full_disk_leaves_earlier_checkpoints_and_no_leftovers(
    tmp_path, monkeypatch, module, name, failing
):
    save(tmp_path, 1, some_tensors(1), {})
    with monkeypatch.context() as broken:
        broken.setattr(module, name, failing)
        with pytest.raises(CheckpointError, match=r"run=.*No space left on device.*are intact"):
            save(tmp_path, 2, some_tensors(2), {})
    assert names(tmp_path) == ["step-00000001"]
    assert_same(load(latest(tmp_path)).tensors, some_tensors(1))
    assert save(tmp_path, 2, some_tensors(2), {}) == latest(tmp_path)


LIMITED = """
import resource, sys, torch
from openmythos.errors import CheckpointError
from openmythos.training.checkpoint import save
big = {"model": {"x": torch.ones(100_000)}}
save(sys.argv[1], 1, {"model": {"x": torch.ones(100)}}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save(sys.argv[1], 2, big, {})
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short_is_a_checkpoint_error(tmp_path):
    run = tmp_path / "run"
    said = subprocess.run(
        [sys.executable, "-c", LIMITED, run], capture_output=True, text=True, check=True
    ).stdout
    assert "must take a checkpoint" in said
    assert "File too large" in said
    assert names(run) == ["step-00000001"]


# Two ways to be killed. At moments: a child saves in a loop until it is shot from outside. At
# calls: a child shoots itself just before its n-th change of the file system, for every n.
KILLED = """
import os, pathlib, shutil, signal, sys, time
import torch
from openmythos.training import checkpoint
from openmythos.training.checkpoint import latest, load, remove_leftovers, save

torch.set_num_threads(1)
run, way = pathlib.Path(sys.argv[1]), sys.argv[2]

def tensors(step):
    return {"model": {"x": torch.full((300, 1000), float(step))}}

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def check(at_least, at_most):
    latest(run, warn=print)
    remove_leftovers(run)
    path = latest(run, warn=print)
    loaded = load(path)
    assert at_least <= loaded.step <= at_most, (at_least, loaded.step, at_most)
    assert bool((loaded.tensors["model"]["x"] == loaded.step).all())
    assert loaded.state == {"step": loaded.step}
    for entry in run.iterdir():
        assert entry.name.startswith("step-"), entry
        load(entry)
    return loaded.step

def save_forever(step):
    while True:
        step += 1
        save(run, step, tensors(step), {"step": step}, keep=2, bits_per_byte=1 / step)

def die_before_call(number):
    calls = 0
    def counted(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)
        return call
    for name in ("rename", "mkdir", "rmdir", "unlink", "fsync", "open"):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save_file = counted(checkpoint.save_file)

save(run, 1, tensors(1), {"step": 1})
if way == "moments":
    step = 1
    for number in range(12):
        pid = child(lambda: save_forever(step))
        time.sleep(0.02 + 0.0137 * number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = check(step, 10**9)
    assert step > 12
else:
    for number in range(1, 1000):
        shutil.rmtree(run)
        for step in (1, 2, 3):
            save(run, step, tensors(step), {"step": step}, bits_per_byte=float(step))
        def work():
            die_before_call(number)
            save(run, 3, tensors(3), {"step": 3}, keep=2)  # replaces, then deletes nothing
            save(run, 4, tensors(4), {"step": 4}, keep=1)  # deletes 2 and 3 and keeps the best, 1
        _, status = os.waitpid(child(work), 0)
        check(3, 4)
        if not os.WIFSIGNALED(status):
            break
    assert number > 20
    assert sorted(entry.name for entry in run.iterdir()) == ["step-00000001", "step-00000004"]
print("intact")
"""


@pytest.mark.parametrize("way", ["moments", "calls"])
def test_a_killed_process_leaves_only_whole_checkpoints(tmp_path, way):
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "run", way], capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1:] == ["intact"], ran.stdout + ran.stderr
    assert ran.stdout == "intact\n"  # and nothing was passed over


def test_leftovers_of_a_crash_are_removed_and_a_half_replacement_undone(tmp_path):
    path = save(tmp_path, 3, some_tensors(3), {})
    path.rename(tmp_path / ".openmythos-replaced-step-00000003")
    (tmp_path / ".openmythos-unfinished-step-00000004").mkdir()
    (tmp_path / ".openmythos-unfinished-step-00000004" / "tensors.safetensors").touch()
    (tmp_path / ".openmythos-99-config.json").touch()
    (tmp_path / "model" / ".openmythos-99").mkdir(parents=True)
    (tmp_path / "model" / ".openmythos-99" / "config.json").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert latest(tmp_path) is None  # and changes nothing, since a trainer may be writing
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["metrics.jsonl", "model", "step-00000003"]
    assert not names(tmp_path / "model")
    assert latest(tmp_path) == path


def test_a_file_is_written_whole_from_bytes_or_by_a_function(tmp_path):
    write_atomically(tmp_path / "config.json", b"{}")
    write_atomically(str(tmp_path / "config.json"), b"[1]")
    assert (tmp_path / "config.json").read_bytes() == b"[1]"
    weights = {"x": torch.randn(3, 4)}
    write_atomically(tmp_path / "model.safetensors", lambda path: save_file(weights, path))
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], weights["x"])
    assert names(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, error):
    write_atomically(tmp_path / "config.json", b"old")

    def half(path):
        path.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(tmp_path / "config.json", half)
    assert names(tmp_path) == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == b"old"


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "flush_to_disk", lambda path: seen.append(path))
    write_atomically(tmp_path / "a.json", b"x")
    assert seen == [tmp_path / f".openmythos-{os.getpid()}-a.json", tmp_path]
