"""A run of three steps and a text, made once for all commands."""

import jaxtyping
import pytest
from command_line import RHYME, SHAPE, TRAINING, printed

from openmythos.cli.process import program


@pytest.fixture(autouse=True)
def _do_not_check_shapes():
    # The checks take more than half of the time, and the library's own tests have them.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rhyme.txt"
    path.write_text(RHYME)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, text):
    """A finished run, made by the command itself."""
    folder = tmp_path_factory.mktemp("runs") / "rhyme"
    flags = [f"--model.{name.replace('_', '-')}={value}" for name, value in SHAPE.items()]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    page = printed("train", "--text", text, "--run", folder, *flags)
    assert f"finished: {program()} generate" in page
    return folder
