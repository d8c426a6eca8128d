"""What the models inside the package do, in seconds: write, walk 40 hops, get better with depth."""

from __future__ import annotations

import sys
from pathlib import Path

RULE = "-" * 72
HOPS = {10: "#9dbbdc", 20: "#2f6db5", 30: "#e3a06f", 40: "#d9722e"}  # and the curve's colour
DEPTHS = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)


def show(folder: Path, prompt: str, max_new_tokens: int) -> None:
    """Show every model that is there; pictures go to `folder`."""
    from openmythos.inference.shipped import LANGUAGE_MODEL, REASONER, shipped

    names = shipped()
    if LANGUAGE_MODEL in names:
        _write(prompt, max_new_tokens)
    if REASONER in names:
        _walk()
        _depth_curve(folder)


def _write(prompt: str, max_new_tokens: int) -> None:
    from openmythos.inference.language_model import load
    from openmythos.inference.shipped import LANGUAGE_MODEL

    lm = load(LANGUAGE_MODEL, "file")
    loops = lm.model.config.mean_loops
    millions = sum(p.numel() for p in lm.model.parameters()) / 1e6
    print(f"{RULE}\n{LANGUAGE_MODEL} ({millions:.1f} M parameters, {loops} loops) goes on:\n")
    sys.stdout.write(prompt)
    for piece in lm.stream(prompt, max_new_tokens=max_new_tokens, temperature=0.7, seed=1):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    print()


def _walk() -> None:
    import numpy as np

    from openmythos.cli.loop_colours import colours_wanted
    from openmythos.cli.reason_command import lines
    from openmythos.inference.reasoner import load_reasoner
    from openmythos.inference.shipped import REASONER
    from openmythos.tasks.rooms import HOUSE

    chain = HOUSE.chains(np.random.default_rng(0), 1, 40)
    trace = load_reasoner().solve(chain.token_ids)
    shown = lines(trace, colours=colours_wanted())
    walk, loops, verdict = shown[:2], shown[2:-2], shown[-1]
    print(f"\n{RULE}\n{REASONER} walks through 40 doors; training never had more than 20:\n")
    every = max(1, len(loops) // 12)
    print("\n".join([*walk, *loops[every - 1 :: every], "", verdict]))


def _depth_curve(folder: Path) -> None:
    from openmythos.evidence.hop_training import FRESH, measure
    from openmythos.inference.reasoner import load_reasoner
    from openmythos.training.figures import blank, loop_ticks, save

    model = load_reasoner().model
    figure, (axes,) = blank(
        "More loops, deeper chains (trained to 20 hops)",
        "loops of the core",
        "share of 64 walks that end in the right room",
    )
    print(f"\n{RULE}\nShare of 64 walks that end in the right room, by loops of the core:\n")
    columns = (8, 16, 24, 32, 40, 48, 64)
    print("  hops  " + "".join(f"{loops:>6}" for loops in columns))
    for hops, colour in HOPS.items():
        right = measure(model, FRESH, hops, DEPTHS, seed=0, count=64)
        print(f"  {hops:>4}  " + "".join(f"{right[loops]:>6.2f}" for loops in columns))
        axes.plot(list(right), list(right.values()), color=colour, label=f"{hops} hops")
    axes.legend(frameon=False)
    loop_ticks(axes, (1, 2, 4, 8, 16, 32, 64))
    print(f"\nDrawn in {save(figure, folder / 'depth_of_walks.png')}")
