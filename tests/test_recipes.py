"""The recipes of the shipped models: what is missing is told before anything is written."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openmythos.errors import DataError

RECIPES = Path(__file__).parent.parent / "recipes"
MIX = RECIPES / "public_domain_mix.py"


def test_missing_packages_are_told_all_at_once_and_nothing_is_written(tmp_path):
    bin_folder, packages = tmp_path / "bin", tmp_path / "packages"
    for folder in (bin_folder, packages):
        folder.mkdir()
    (bin_folder / "dpkg-deb").touch(mode=0o755)
    (packages / "sword-comm-mhcc_1.0_all.deb").touch()
    done = subprocess.run(
        [sys.executable, MIX, packages, tmp_path / "out"],
        env={"PATH": str(bin_folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    missing = "sword-comm-tdavid sword-text-web r-cran-janeaustenr"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"public_domain_mix: packages={str(packages)!r} must hold {missing}: in that folder, "
        f"apt-get download {missing}\n"
    )
    assert not (tmp_path / "out").exists()


def test_of_each_package_the_newest_file_is_taken(tmp_path, monkeypatch):
    mix = runpy.run_path(str(MIX))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "which", lambda _: None)
        with pytest.raises(DataError, match="dpkg-deb must be installed"):
            mix["find"](tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for name in (*mix["SWORD"], mix["AUSTEN"]):
        for version in ("1.0", "1.1"):
            (tmp_path / f"{name}_{version}_all.deb").touch()
    names = {name: file.name for name, file in mix["find"](tmp_path).items()}
    assert names == {name: f"{name}_1.1_all.deb" for name in (*mix["SWORD"], mix["AUSTEN"])}


@pytest.mark.parametrize("arguments", [(), ("one", "two")])
def test_the_recipe_without_its_folder_shows_its_usage(arguments, tmp_path):
    script = ["bash", RECIPES / "openmythos-lm.sh", *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: bash recipes/openmythos-lm.sh FOLDER")
    assert not list(tmp_path.iterdir())
