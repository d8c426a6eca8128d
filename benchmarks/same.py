"""Shows that a refactor is one: the same losses, bit for bit, before and after.

    make same ARGS=--record     before the change
    make same                   after it

Trains small models of several shapes for a few steps on the embedded text and compares every
loss and gradient norm with those recorded. Bits are equal on one kind of machine, one torch
build and one number of threads only, so the record stays in `runs/` and is never shared.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from openmythos import MythosConfig
from openmythos.training.settings import Source, TrainConfig
from openmythos.training.start import start_run

RECORD = Path("runs/same.json")
SHAPES = {
    "experts": {},
    "mla": {"attention": "mla"},
    "dense": {"experts": 0, "lora_rank": 2},
    "plain": {"experts": 0, "injection": "none", "h0": "e", "mean_loops": 1},
}


def losses(name: str) -> list[list[float]]:
    """Loss and gradient norm of every step of one shape."""
    shape = {"vocab_size": 512, "hidden_size": 64, **SHAPES[name]}
    model = MythosConfig.preset("nano").replace(head_dim=16, **shape)
    train = TrainConfig(
        steps=6,
        batch_size=4,
        length=64,
        threads=1,
        precision="fp32",
        gate_steps=0,
        evaluate_tokens=64,
        evaluate_every=100,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = start_run(Path(folder) / "run", model, train, source=Source(corpus="embedded"))
        trainer.prepare()
        steps = [trainer.one_step() for _ in range(train.steps)]
    return [[line["loss"], line["gradient_norm"]] for line in steps]


def main() -> None:
    """Record, or compare and exit with 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write what is compared with later")
    record = parser.parse_args().record
    now = {name: losses(name) for name in SHAPES}
    if record or not RECORD.is_file():
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(now, indent=1))
        print(f"recorded {len(now)} shapes in {RECORD}")
        return
    before = json.loads(RECORD.read_text())
    differ = [name for name in SHAPES if before.get(name) != now[name]]
    for name in SHAPES:
        print(f"{name}: {'differs' if name in differ else 'the same, bit for bit'}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
