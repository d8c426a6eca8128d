"""Pictures of a run: there is one for everything that was measured, and none for what was not."""

import math

import pytest
from matplotlib.image import imread

from openmythos.errors import CheckpointError, InputError
from openmythos.training import plots
from openmythos.training.figures import check_picture, save
from openmythos.training.plots import PICTURES, depth_curve, plot_run


def a_step(step, **more):
    return {"step": step, "bits_per_byte": 4 - 0.1 * step, "loss": 9.0, "skipped": 0, **more}


def a_measurement(step, loops=4, layers=2, experts=3):
    share = [[[1 / experts] * experts for _ in range(layers)] for _ in range(loops)]
    validation = {"1": 3.0, "2": 2.9, "16": 2.85}
    rms = [1 + 0.1 * t for t in range(loops)]
    return {"step": step, "validation": validation, "state_rms": rms, "expert_share": share}


def the_end(step):
    """Of all held-out text, which is harder than its start."""
    return {**a_measurement(step), "validation": {"1": 4.0, "2": 3.9, "16": 3.85}, "final": True}


def a_run():
    lines = [a_step(step, spectral_radius=0.4 + 0.01 * step) for step in range(10)]
    return [*lines[:5], a_measurement(4), *lines[5:], a_measurement(9), the_end(9)]


def test_every_picture_is_drawn_of_a_whole_run(tmp_path):
    files = plot_run(a_run(), tmp_path / "plots", "rhyme")
    assert [file.stem for file in files] == list(PICTURES)
    for file in files:
        picture = imread(file)[..., :3]
        assert min(picture.shape[:2]) > 400
        assert picture.std() > 0.02  # not a blank page


def test_a_plain_transformer_without_experts_has_fewer_pictures(tmp_path):
    lines = [a_step(0, spectral_radius=math.inf), a_step(1, spectral_radius=math.inf)]
    lines.append({"step": 1, "validation": {"1": 3.0}, "state_rms": [1.0]})
    assert [file.stem for file in plot_run(lines, tmp_path, "plain")] == ["loss"]


def test_a_run_that_has_just_begun_can_be_drawn(tmp_path):
    names = [file.stem for file in plot_run([a_step(0, spectral_radius=0.4)], tmp_path, "new")]
    assert names == ["loss", "spectral_radius"]


def drawn(axes, label):
    (line,) = [line for line in axes.lines if label in line.get_label()]
    return line


def test_the_end_is_no_point_of_the_curve_which_is_of_less_text():
    (axes,) = PICTURES["loss"](a_run(), "rhyme").axes
    assert drawn(axes, "start of the held-out text").get_xydata().tolist() == [
        [5, 2.85],
        [10, 2.85],
    ]
    end = drawn(axes, "all held-out text, 16 loops")
    assert end.get_xydata().tolist() == [[10, 3.85]]
    assert end.get_linestyle() == "None"


def test_depth_shows_the_end_apart_from_what_was_measured_on_the_way():
    way, end = PICTURES["depth"](a_run(), "rhyme").axes
    assert [line.get_ydata()[-1] for line in way.lines] == [2.85, 2.85]
    assert [line.get_ydata()[-1] for line in end.lines] == [3.85]
    (only,) = PICTURES["depth"]([a_step(9), the_end(9)], "rhyme").axes
    assert [line.get_ydata()[-1] for line in only.lines] == [3.85]


def test_a_run_that_goes_on_has_no_end_yet():
    lines = [*a_run()[:6], a_measurement(9)]
    (axes,) = PICTURES["loss"](lines, "rhyme").axes
    assert not [line for line in axes.lines if "all held-out" in line.get_label()]
    way, last = PICTURES["depth"](lines, "rhyme").axes
    assert (len(way.lines), len(last.lines)) == (2, 1)


def test_the_size_of_the_state_is_drawn_once_a_step():
    labels = [line.get_label() for line in PICTURES["state_rms"](a_run(), "rhyme").axes[0].lines]
    assert labels == ["step 5", "step 10"]


def test_a_finished_model_of_an_earlier_step_stands_at_its_step():
    lines = [a_step(step) for step in range(9)]
    lines += [a_measurement(3), a_measurement(6), the_end(3)]
    (axes,) = PICTURES["loss"](lines, "best").axes
    assert list(drawn(axes, "start of the held-out").get_xdata()) == [4, 7]
    assert list(drawn(axes, "all held-out").get_xdata()) == [4]


def test_losses_that_are_not_finite_leave_a_gap(tmp_path):
    lines = [a_step(step) for step in range(60)]
    lines[30] |= {"bits_per_byte": math.nan, "skipped": 1}
    lines[-1] |= {"bits_per_byte": math.inf, "skipped": 2}
    assert plot_run(lines, tmp_path, "rough")


def test_the_load_of_a_thousand_experts_has_readable_ticks():
    lines = [a_measurement(3, loops=40, layers=3, experts=300)]
    figure = PICTURES["expert_load"](lines, "wide")
    axes = figure.axes[0]
    assert len(axes.get_yticks()) <= 10
    assert axes.get_yticklabels()[0].get_text() == "1"
    assert max(figure.get_size_inches()) < 20


def test_the_load_is_shown_by_loop_and_expert():
    line = a_measurement(0, loops=2, layers=1, experts=3)
    line["expert_share"] = [[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]]
    (image,) = PICTURES["expert_load"]([line], "run").axes[0].get_images()
    expected = [[1.5, 0.3], [0.9, 0.6], [0.6, 2.1]]  # expert by expert, loop by loop
    assert image.get_array().tolist() == [pytest.approx(row) for row in expected]


def test_a_depth_curve_has_its_references_and_points():
    figure = depth_curve(
        {4: 1.6, 1: 1.8, 2: 1.7},
        "curve",
        references={"PPMd": 1.68},
        points={"gate": (2.5, 1.65)},
    )
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["every token", "PPMd", "gate"]
    curve = figure.axes[0].get_lines()[0]
    assert curve.get_xydata().tolist() == [[1, 1.8], [2, 1.7], [4, 1.6]]


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
    assert plots._smooth([2.0, math.nan, 2.0, math.inf, 2.0]) == pytest.approx([2.0] * 5)


def test_a_run_without_steps_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="run=empty must have finished a step"):
        plot_run([], tmp_path, "empty")


def test_a_picture_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    figure = depth_curve({1: 1.0}, "curve")
    with pytest.raises(InputError, match=r"must end in one of \.png"):
        save(figure, tmp_path / "a.bmp")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can be written to"):
        save(figure, tmp_path / "file" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"folder\.png' must be a file, and a folder of that name"):
        check_picture(tmp_path / "folder.png")
    (tmp_path / "old.png").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, _: path.suffix != ".png")
        with pytest.raises(InputError, match=r"old\.png' must be a file that can be written to"):
            check_picture(tmp_path / "old.png")


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure, path = depth_curve({1: 1.0}, "curve"), tmp_path / "old.png"
    path.write_bytes(b"old")

    def half(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    with pytest.raises(InputError, match="must be writable: the disk is full"):
        save(figure, path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.png", b"old")]
