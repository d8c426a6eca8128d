"""Cells run once, resume as a grid, and refuse results of other settings."""

import json
from dataclasses import replace

import pytest

from openmythos.errors import CheckpointError
from openmythos.evidence import cells
from openmythos.evidence.cells import Cell, by_number, read_result, run_cells, take_results


def counting(name, value, calls):
    def run(folder, say):
        calls.append(name)
        say("working")
        return {"value": value, "seconds": 0.0}

    return Cell(name, {"size": value, "pair": (1, 2)}, run)


def test_a_grid_goes_on_where_it_was_stopped(tmp_path):
    calls, said = [], []
    first, second = counting("a/seed-0", 1, calls), counting("b/seed-0", 2, calls)
    run_cells([first], tmp_path, said.append)
    results = run_cells([first, second], tmp_path, said.append)
    assert calls == ["a/seed-0", "b/seed-0"]
    assert [results[name]["value"] for name in ("a/seed-0", "b/seed-0")] == [1, 2]
    assert said == ["a/seed-0: working", "b/seed-0: working"]


def test_only_what_trains_is_said_to_run_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "device_name", lambda: "Some GPU")
    made = [Cell("trained", {}, lambda *_: {}), Cell("measured", {}, lambda *_: {}, trains=False)]
    results = run_cells(made, tmp_path, print)
    assert [result["device"] for result in results.values()] == ["Some GPU", "cpu"]


def test_a_cell_that_fails_leaves_no_result(tmp_path):
    def run(folder, say):
        raise ValueError("no")

    cell = Cell("a", {}, run)
    with pytest.raises(ValueError, match="no"):
        run_cells([cell], tmp_path, print)
    assert read_result(tmp_path / "a", cell) is None


def test_results_of_other_settings_are_refused(tmp_path):
    run_cells([counting("a", 1, [])], tmp_path, lambda _: None)
    with pytest.raises(CheckpointError, match="must be of the settings asked for"):
        run_cells([counting("a", 2, [])], tmp_path, lambda _: None)


def test_an_interrupted_run_of_other_settings_is_not_gone_on_with(tmp_path):
    def stopped(folder, say):
        raise KeyboardInterrupt

    interrupted = Cell("a", {"size": 1, "pair": (1, 2)}, stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cells([interrupted], tmp_path, print)
    calls = []
    with pytest.raises(CheckpointError, match="as its folder's checkpoints are"):
        run_cells([counting("a", 2, calls)], tmp_path, print)
    run_cells([counting("a", 1, calls)], tmp_path, print)
    assert calls == ["a"]


def test_a_damaged_result_is_named(tmp_path):
    cell = counting("a", 1, [])
    run_cells([cell], tmp_path, lambda _: None)
    (tmp_path / "a" / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="must be JSON"):
        read_result(tmp_path / "a", cell)


def test_a_result_is_json_with_its_settings(tmp_path):
    measured = {"by_loops": {1: 0.5, 16: 0.75}, "pair": (1, 2)}
    cell = Cell("a", {"size": 1, "pair": (1, 2)}, lambda *_: measured)
    result = run_cells([cell], tmp_path, lambda _: None)["a"]
    assert result == json.loads((tmp_path / "a" / "result.json").read_text())
    assert result == run_cells([cell], tmp_path, lambda _: None)["a"]
    assert result["settings"] == {"size": 1, "pair": [1, 2]}
    assert result["torch"]
    assert result["pair"] == [1, 2]
    assert by_number(result["by_loops"]) == measured["by_loops"]


def test_known_results_are_taken_where_the_settings_are_theirs(tmp_path):
    calls = []
    cells = [counting(name, value, calls) for name, value in (("a", 1), ("b/x", 2), ("c", 3))]
    known = run_cells([cells[0], counting("b/x", 9, []), cells[2]], tmp_path / "one", print)
    calls.clear()
    run_cells([cells[2]], tmp_path / "two", print)  # has its own result already
    assert take_results(known, cells, tmp_path / "two") == ["a"]
    results = run_cells(cells, tmp_path / "two", print)
    assert calls == ["c", "b/x"]
    assert results["a"] == known["a"]
    assert results["b/x"]["settings"] == {"size": 2, "pair": [1, 2]}


def test_what_needs_a_package_that_is_not_installed_waits_and_keeps_what_was_published(tmp_path):
    calls, said = [], []
    cell = replace(counting("a", 1, calls), needs="no_such_package")
    known = {"a": {"settings": {"size": 1, "pair": [1, 2]}, "value": 5}}
    assert run_cells([cell], tmp_path / "none", said.append) == {}
    assert said == ["a: does not run, since no_such_package is not installed"]
    assert not (tmp_path / "none").exists()
    assert take_results(known, [cell], tmp_path) == ["a"]
    assert run_cells([cell], tmp_path, print)["a"]["value"] == 5
    assert calls == []
