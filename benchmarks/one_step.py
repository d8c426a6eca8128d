"""One real training step of a scale on this machine: time and peak memory.

    python benchmarks/one_step.py 1b

Random tokens, the default recipe's optimizers, fp32, activation checkpointing, depth as given.
The peak is the process's, with weights, gradients, optimizer state and activations.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from openmythos import MythosConfig, OpenMythos
from openmythos.model.transformer import cross_entropy
from openmythos.training.optimizer import build_optimizers
from openmythos.training.settings import OptimizerConfig


def main() -> None:
    """Build, step, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", default="1b", nargs="?")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--loops", type=int)
    parser.add_argument("--threads", type=int, default=2)
    settings = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)

    config = MythosConfig.preset(settings.preset)
    loops = settings.loops or config.mean_loops
    start = time.perf_counter()
    model = OpenMythos(config)
    model.core.checkpointing = True
    optimizers = build_optimizers(
        model.named_parameters(), OptimizerConfig(), fused_splits=model.fused_splits()
    )
    built = time.perf_counter()
    shape = (settings.batch_size, settings.length + 1)
    ids = torch.randint(0, config.vocab_size, shape)
    loss = cross_entropy(model(ids[:, :-1], loops).logits, ids[:, 1:]).mean()
    forward = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    backward = time.perf_counter()
    norm = optimizers.step()
    done = time.perf_counter()
    print(
        json.dumps(
            {
                "preset": settings.preset,
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": settings.batch_size * settings.length,
                "loops": loops,
                "loss": loss.item(),
                "gradient_norm": norm,
                "build_s": round(built - start, 1),
                "forward_s": round(forward - built, 1),
                "backward_s": round(backward - forward, 1),
                "optimizer_s": round(done - backward, 1),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
