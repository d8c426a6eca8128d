import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_package_with_its_text_and_types_and_no_tests(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("openmythos-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("py.typed", "data/training.txt", "data/validation.txt", "training/corpus.py"):
        assert f"openmythos/{name}" in names
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"openmythos"}
