"""How fast the engine is with this code and with that of other commits, in turn.

    python benchmarks/versions.py COMMIT [COMMIT ...] [--weights fp32 int8] [--requests 1 8 32]

The shipped language model writes 32 tokens at 6 loops for requests that come at once. Each version
has a process of its own; they take turns, one load each, so that all meet the same noise. Printed
are each version's median and, over turns, the median of its ratio to the first commit. What serves
the load is this commit's, so that only the package differs; it must run on the old one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = "--worker"


def work(weights: str) -> None:
    """Print tokens per second of as many requests at once as each line of the input says."""
    import torch
    from engine import wanted_text
    from engine_load import Arrival, serve, texts, ticker

    import openmythos

    torch.set_num_threads(1)
    lm = openmythos.load("openmythos-lm", weights=weights)
    arrivals = [Arrival(0.0, wanted_text(prompt, 32, 6)) for prompt in texts(lm, 64, 0)]
    for line in sys.stdin:
        figures = serve(ticker(lm), arrivals[: int(line)]).figures()
        print(figures["tokens_per_second"], flush=True)


def unpack(commit: str, folder: Path) -> Path:
    """Put a commit's files into a folder of its own."""
    made = subprocess.run(
        ["git", "archive", commit, "openmythos"], cwd=HERE.parent, capture_output=True, check=False
    )
    if made.returncode:
        sys.exit(f"commit={commit!r}: {made.stderr.decode().strip()}")
    root = folder / commit.replace("/", "_")
    with tarfile.open(fileobj=BytesIO(made.stdout)) as archive:
        archive.extractall(root, filter="data")
    return root


class Version:
    """A process that runs one version's code."""

    def __init__(self, root: Path, weights: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, WORK, weights],
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def serve(self, requests: int) -> float:
        """Tokens per second of so many requests at once."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{requests}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a version did not run the load; what it said stands above")
        return float(line)


def compare(roots: dict[str, Path], weights: str, counts: Sequence[int], repeats: int) -> None:
    """Print a line for each number of requests."""
    versions = {name: Version(root, weights) for name, root in roots.items()}
    try:
        for count in counts:
            turns = [{n: v.serve(count) for n, v in versions.items()} for _ in range(repeats + 1)]
            first = next(iter(roots))
            print(f"{weights}, {count} requests, tokens/s:", end="")
            for name in versions:
                median = statistics.median(turn[name] for turn in turns[1:])
                ratio = statistics.median(turn[name] / turn[first] for turn in turns[1:])
                print(f"  {name} {median:,.0f} ({ratio:.2f})", end="")
            print(flush=True)
    finally:
        for version in versions.values():
            version.process.kill()
            version.process.wait()


def main() -> None:
    """Unpack the commits and let them take turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="+", help="what git calls it; this code comes last")
    kinds = ("fp32", "bf16", "int8")
    parser.add_argument("--weights", choices=kinds, nargs="+", default=list(kinds))
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.repeats < 1:
        sys.exit(f"repeats={options.repeats} must be 1 or more")
    if wrong := [n for n in options.requests if not 1 <= n <= 64]:
        sys.exit(f"requests={wrong[0]} must be from 1 to 64")
    with tempfile.TemporaryDirectory() as folder:
        roots = {commit: unpack(commit, Path(folder)) for commit in options.commit}
        for weights in options.weights:
            compare({**roots, "now": HERE.parent}, weights, options.requests, options.repeats)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORK]:
        work(sys.argv[2])
    else:
        main()
