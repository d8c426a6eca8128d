"""One training run: sampled depth, two optimizers, checkpoints that resume to the bit.

Everything drawn at a step (text, depth, noise) is a pure function of the seed, the step and the
sample's number, so a checkpoint needs no generator's state, and accumulation or a resume change
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openmythos.errors import CheckpointError
from openmythos.model.accounting import training_flops
from openmythos.model.files import fill, storable
from openmythos.model.transformer import MythosOutput, OpenMythos, cross_entropy
from openmythos.training import checkpoint
from openmythos.training.compiled import compiled_layers, compiling_pays
from openmythos.training.depth import backprop_loops, sample_loops
from openmythos.training.evaluate import Reading
from openmythos.training.gate import GateReport, Labelled, train_gate
from openmythos.training.machine import Machine, default_device, matmul_peak, measure
from openmythos.training.measured import Measured, inside
from openmythos.training.metrics import Report, cut_metrics, metrics, writing
from openmythos.training.optimizer import build_optimizers, learning
from openmythos.training.resuming import check_settings, check_unchanged, tell_machine
from openmythos.training.run import (
    MODEL,
    TOKENIZER,
    Settings,
    gate_trained,
    keep_trained_length,
)
from openmythos.training.run_lock import RunLock
from openmythos.training.settings import Compile, schedule
from openmythos.training.stopping import HANGUP, MOST_SKIPPED, diverged, on_signals
from openmythos.training.threads import training_threads
from openmythos.training.token_file import TokenFile
from openmythos.training.tokenizer import Tokenizer

GATE_BATCH = 4  # sequences that a step of the gate's training learns from
MEASURED_BATCH = 8  # windows of held-out text at a time, where a step takes as many
NOISE = math.sqrt(2 / 5)  # deviation of a noisy first state (Geiping et al. 2025)


class Stopped(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop; its checkpoint is written."""


class Trainer:
    """Trains a model in a run's folder.

    Args:
        run: the folder, which holds `settings.json` and `tokenizer.json`.
        settings: as saved there.
        tokenizer: as saved there.
        training: tokens to learn from.
        validation: held-out tokens.
        device: where to train; default: CUDA, else MPS, else the CPU.
        lock: of the run, released when the training ends; default: taken while it lasts.
        split: how the text was divided, for people to read; None: it was not looked at.
    """

    def __init__(
        self,
        run: Path,
        settings: Settings,
        tokenizer: Tokenizer,
        training: TokenFile,
        validation: TokenFile,
        device: torch.device | None = None,
        *,
        lock: RunLock | None = None,
        split: str | None = None,
    ) -> None:
        self._lock, self.split = lock or RunLock(run), split
        self.run, self.settings, self.tokenizer = run, settings, tokenizer
        self.training, self.validation = training, validation
        self.config, self.model_config = settings.train, settings.model
        self.device = device or default_device()
        self.threads = self.config.threads or torch.get_num_threads()
        self.machine: Machine | None = None
        self.compiled: bool | None = None
        self._layers: Callable[[], contextlib.AbstractContextManager[None]] | None = None
        with training_threads(self.threads):
            self.model = OpenMythos(self.model_config, seed=self.config.seed).to(self.device)
        self.model.core.checkpointing = self.config.checkpoint_activations
        self._choose_parameters()
        self.optimizers = build_optimizers(
            self.model.named_parameters(),
            self.config.optimizer,
            fused_splits=self.model.fused_splits(),
        )
        self.step = 0
        self._skipped = 0  # the last steps in a row
        self._stop = self._finishing = False

    def _choose_parameters(self) -> None:
        learns = learning(self.model, self.config.train)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in learns)

    def fit(self, report: Report = lambda _: None) -> OpenMythos:
        """Train to the last step, measure, train the gate, write the finished model.

        Ctrl-C, SIGTERM and a terminal that goes end it after the step in hand, with a checkpoint;
        after the last step, at once. The process's number of threads is the run's for as long as
        this takes.

        Raises:
            Stopped: the run was interrupted; `resume` goes on from the checkpoint.
            CheckpointError: the run's folder cannot be written to, or another process trains it.
            ConfigError: gradients stay not finite.
        """
        self._lock.take()
        try:
            with training_threads(self.threads):
                return self._fit(report)
        finally:
            self._lock.release()

    def _fit(self, report: Report) -> OpenMythos:
        self.prepare()
        if self.step < self.config.steps:  # the model of fewer steps is not the finished one
            (self.run / MODEL / TOKENIZER).unlink(missing_ok=True)
        with (
            on_signals(self._ask_to_stop),
            writing(self.run, self.config.log, self.step, report, self._rescue) as write,
        ):
            while self.step < self.config.steps:
                line = self._one_step()
                write(line)
                self._check_learning(line["gradient_norm"])
                self._between_steps(write)
            self._finish(write)
        return self.model

    def prepare(self) -> None:
        """Decide precision and kernels once; a resumed run takes over what was decided.

        Raises:
            ConfigError: layers are to be compiled, as those of the steps before were, and torch
                cannot compile here.
        """
        if self._layers is not None:
            return
        if self.machine is None:
            self.machine = measure(self.config.precision, self.device)
        wanted = self.config.compile
        if self.compiled is not None:
            wanted = "always" if self.compiled else "never"
        self.compiled = self.compiling_pays(wanted)
        self._layers = contextlib.nullcontext
        if self.compiled:
            self._layers = compiled_layers(self.model, sizes_vary=self.config.depth != "fixed")

    def compiling_pays(self, wanted: Compile) -> bool:
        """Whether a run of these settings that began now would be compiled."""
        depths = np.full(self.config.batch_size, self.model_config.mean_loops)
        return compiling_pays(wanted, self.config.steps * self._flops(depths), self.device)

    def _between_steps(self, write: Report) -> None:
        done = self.step == self.config.steps
        score = None
        if self.step % self.config.evaluate_every == 0 and not done:
            result = self._evaluate(self.config.evaluate_tokens)
            score = result.as_trained(self.model_config.mean_loops)
            write(self._measurement(result))
        best = score is not None and score < checkpoint.best_score(self.run)
        stop = self._stop  # once: a signal may come while the checkpoint is written
        if best or self.step % self.config.save_every == 0 or done or stop:
            self.save(score)
        if stop:
            raise Stopped

    def _check_learning(self, norm: float) -> None:
        """Warn of the first step that was skipped, and end where all are."""
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        if self._skipped >= min(MOST_SKIPPED, self.config.steps):
            raise diverged(self.run, self.step - 1, self._skipped, self.config)
        if self.optimizers.skipped == 1:
            warnings.warn(
                f"step {self.step - 1} was skipped: its gradient is no finite number. Where more "
                "are, train with lower rates",
                stacklevel=4,
            )

    def _rescue(self) -> None:
        """Try to keep what is learned, before an error ends the run."""
        with contextlib.suppress(CheckpointError):
            newest = checkpoint.latest(self.run)
            if newest is None or checkpoint.step_of(newest) != self.step:
                self.save()

    def _finish(self, write: Report) -> None:
        self._finishing = True
        if self._stop:  # asked for while the last checkpoint was written
            raise Stopped
        # On the text of the measurements before, or the best could not be told, nor a curve drawn.
        result = self._evaluate(self.config.evaluate_tokens)
        if not self._is_measured():
            write(self._measurement(result))
        self.save(result.as_trained(self.model_config.mean_loops))
        taken = self._take_best() if self.config.finish == "best" else self.step
        same = self.measures_all and taken == self.step
        whole = result if same else self._evaluate(None)
        write(self._measurement(whole) | {"step": taken - 1, "final": True})
        with_gate = self.config.gate_steps > 0 and self.model_config.mean_loops > 1
        if with_gate:
            gate = self._train_gate()
            write({"step": self.step, "gate": dataclasses.asdict(gate)})
        keep_trained_length(
            self.run / MODEL, self.config.length, gate=with_gate or self._gate_before()
        )
        self.model.save_pretrained(self.run / MODEL, self.tokenizer)

    def _gate_before(self) -> bool | None:
        """Whether the gate was trained in the model that the run started from; None: unknown."""
        start_from = self.settings.start_from
        return False if start_from is None else gate_trained(Path(start_from))

    @property
    def measures_all(self) -> bool:
        """Whether a measurement on the way takes all of the held-out text, and not its start."""
        reading = Reading.of(self.config.length)
        windows = self.validation.windows(reading.length, reading.stride)
        last = windows.length - int(windows.first[-1])  # tokens that the last window adds
        return self.config.evaluate_tokens > self.validation.tokens - last

    def _is_measured(self) -> bool:
        """Whether this step's point of the curve is written, by a run that was resumed after it."""
        return any(
            line["step"] == self.step - 1 and "validation" in line and not line.get("final")
            for line in metrics(self.run)
        )

    def _take_best(self) -> int:
        """Take the weights of the whole checkpoint that measured best; return its step."""
        for folder in checkpoint.by_score(self.run):
            try:
                found = checkpoint.load(folder)
            except CheckpointError as error:
                warnings.warn(f"{error} (passed over)", stacklevel=2)
                continue
            fill(self.model, found.tensors["model"], str(folder))
            return found.step
        return self.step

    def _ask_to_stop(self, signal: str) -> None:
        """Let the step in hand end before stopping; a second Ctrl-C or SIGTERM stops at once."""
        if self._stop and signal == HANGUP:
            return
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        if self._finishing:  # all steps are saved, the rest can be done anew
            raise Stopped

    def one_step(self) -> dict[str, Any]:
        """Take one optimizer step; return its line of metrics."""
        with training_threads(self.threads):
            self.prepare()
            return self._one_step()

    def _one_step(self) -> dict[str, Any]:
        assert self._layers is not None
        started = time.perf_counter()
        config, step = self.config, self.step
        self.optimizers.set_lr(schedule(step, config.steps, config.optimizer))
        self.optimizers.zero_grad()
        self.model.train()
        samples = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        depth = self._depth(samples)
        total, flops = 0.0, 0.0
        loads: Tensor | None = None
        for part in np.split(np.arange(config.batch_size), config.accumulation):
            with self._layers():
                out, loss = self._forward(samples[part], depth[part])
                wanted = loss
                if out.ponder is not None:
                    wanted = loss + config.ponder_cost * out.ponder.sum()
                (wanted / config.tokens_per_step).backward()
            total += float(loss.detach())
            flops += self._flops(depth[part])
            if (counted := out.loads) is not None:
                of_all_loops = counted.sum(0, keepdim=True)  # parts may differ in depth
                loads = of_all_loops if loads is None else loads + of_all_loops
        norm = self.optimizers.step()
        if loads is not None and math.isfinite(norm) and config.train == "all":
            self.model.core.rebalance(loads)
        self.step += 1
        seconds = time.perf_counter() - started
        return self._line(total, depth, norm, loads, flops, seconds)

    def _depth(self, samples: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        return sample_loops(
            self.config.depth,
            self.model_config.mean_loops,
            seed=self.config.seed,
            step=self.step,
            indices=samples,
        )

    def _forward(self, samples: Any, depth: Any) -> tuple[MythosOutput, Tensor]:
        """Return the output and the summed loss in nats of one part of the batch."""
        ids = self.training.batch(samples, self.config.length, seed=self.config.seed)
        token_ids = torch.from_numpy(ids).to(self.device)
        loops = torch.from_numpy(depth).to(self.device)
        same = int(depth[0]) if (depth == depth[0]).all() else None
        learned_act = self.model_config.learned_act
        with self._autocast():
            out = self.model(
                token_ids[:, :-1],
                loops if same is None else same,
                h0=self._noise(samples),
                backprop_loops=None if learned_act else self._window(),
                halting="act" if learned_act else "none",
            )
            losses = cross_entropy(out.logits, token_ids[:, 1:])
        return out, losses.sum()

    def _window(self) -> int:
        given = self.config.backprop_loops
        return backprop_loops(self.model_config.mean_loops) if given is None else given

    def _autocast(self) -> torch.autocast:
        bf16 = self.machine is not None and self.machine.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _noise(self, samples: Any) -> Tensor | None:
        """A noisy first state, a pure function of the seed and each sample's number."""
        if self.model_config.h0 != "noise":
            return None
        shape = (self.config.length, self.model_config.hidden_size)
        states = []
        for sample in samples:
            seed = np.random.SeedSequence([self.config.seed, int(sample)]).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed[0]))
            states.append(torch.randn(shape, generator=generator) * NOISE)
        return torch.stack(states).to(self.device)

    def _flops(self, depth: Any) -> float:
        """Floating-point operations of a step on sequences of these depths."""
        length = self.config.length
        return training_flops(
            self.model,
            length * len(depth),
            length // 2,
            float(depth.mean()),
            learning=float(np.minimum(depth, self._window()).mean()),
            recomputed=self.config.checkpoint_activations,
        )

    def _line(
        self,
        total: float,
        depth: Any,
        norm: float,
        loads: Tensor | None,
        flops: float,
        seconds: float,
    ) -> dict[str, Any]:
        loss = total / self.config.tokens_per_step
        bytes_per_token = self.training.bytes / self.training.tokens
        scale = schedule(self.step - 1, self.config.steps, self.config.optimizer)
        line = {
            "step": self.step - 1,
            "loss": loss,
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "gradient_norm": norm,
            "loops": float(depth.mean()),
            "muon_lr": scale * self.config.optimizer.muon_lr,
            "adam_lr": scale * self.config.optimizer.adam_lr,
            "skipped": self.optimizers.skipped,
            "tokens_per_second": self.config.tokens_per_step / seconds,
            "peak_share": flops / seconds / (self.machine.peak if self.machine else math.inf),
            "spectral_radius": float(self.model.core.injection.spectral_radius()),
        }
        if loads is not None:
            by_expert = loads.sum(0).float()
            line["load_max_over_mean"] = float((by_expert.amax(-1) / by_expert.mean(-1)).max())
        return line

    def _evaluate(self, max_tokens: int | None) -> Measured:
        reading = Reading.of(self.config.length, max_tokens)
        with self._autocast():
            return Measured.of(
                self.model,
                self.validation,
                self.tokenizer.token_bytes,
                reading,
                batch_size=self._at_once(MEASURED_BATCH),
            )

    def _at_once(self, most: int) -> int:
        """So many sequences, or as many as a part of a step has, which are known to fit."""
        return min(most, self.config.batch_size // self.config.accumulation)

    def _measurement(self, result: Measured) -> dict[str, Any]:
        at_once = self._at_once(MEASURED_BATCH)
        within = inside(self.model, self.validation, self.config.length, batch_size=at_once)
        return {"step": self.step - 1} | result.line() | within

    def _train_gate(self) -> GateReport:
        windows, at_once = self.validation.windows(self.config.length), self._at_once(GATE_BATCH)
        starts = windows.starts[: 4 * GATE_BATCH]
        held_out = [
            self._labelled(self.validation.read(starts[at : at + at_once], windows.length))
            for at in range(0, len(starts), at_once)
        ]
        steps = self.config.gate_steps
        with self._autocast():
            return train_gate(self.model, self._gate_batch, held_out, steps=steps, at_once=at_once)

    def _gate_batch(self, step: int) -> Labelled:
        samples = range(step * GATE_BATCH, (step + 1) * GATE_BATCH)
        seed = self.config.seed + 1  # other text than the model's last steps had
        return self._labelled(self.training.batch(samples, self.config.length, seed=seed))

    def _labelled(self, ids: Any) -> Labelled:
        token_ids = torch.from_numpy(ids).to(self.device)
        return Labelled(token_ids[:, :-1], token_ids[:, 1:])

    def save(self, bits_per_byte: float | None = None) -> Path:
        """Write a checkpoint of this step.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints stay.
        """
        tensors = {"model": storable(self.model), "optimizer": self.optimizers.state_tensors()}
        state = {
            "model": json.loads(self.model_config.to_json()),
            "train": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.fingerprint,
            "text": self.training.source_fingerprint,
            "threads": self.threads,
            "precision": None if self.machine is None else self.machine.precision,
            "compiled": self.compiled,
            "device": self.device.type,
            "orthogonal": _name(self.optimizers.orthogonal_dtype),
            "torch": torch.__version__,
        }
        return checkpoint.save(
            self.run, self.step, tensors, state, keep=self.config.keep, bits_per_byte=bits_per_byte
        )

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none.

        Raises:
            CheckpointError: it was made with another model, text or tokenizer.
        """
        checkpoint.remove_leftovers(self.run)
        newest = checkpoint.latest(self.run)
        if newest is None:
            if checkpoint.exists(self.run):
                raise CheckpointError(
                    f"run={self.run} must have a whole checkpoint, and all of its are damaged: "
                    "delete its step-* folders to begin anew"
                )
            cut_metrics(self.run, 0)
            return False
        found = checkpoint.load(newest)
        check_settings(self.settings, found.state, found.step, newest)
        prints = {"tokenizer": self.tokenizer.fingerprint, "text": self.training.source_fingerprint}
        check_unchanged(found.state, newest, **prints)
        tell_machine(found.state, newest, torch=torch.__version__, device=self.device.type)
        self.threads = self.config.threads or found.state["threads"]
        with training_threads(self.threads):
            self._take(found, newest)
        cut_metrics(self.run, self.step)
        return True

    def _take(self, found: checkpoint.Checkpoint, where: Path) -> None:
        """Take over weights, optimizers and what was decided at the start."""
        fill(self.model, found.tensors["model"], str(where))
        self.optimizers.load_state_tensors(found.tensors["optimizer"])
        self.step = found.step
        orthogonal = found.state.get("orthogonal")  # checkpoints from before it was kept have none
        if orthogonal is not None:
            self.optimizers.orthogonalise_in(getattr(torch, orthogonal))
        precision = found.state["precision"]  # None before the first step: still to be decided
        if precision is None:
            return
        self.compiled = found.state.get("compiled", False)
        if self.config.precision == found.state["train"]["precision"]:  # else it is given anew
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.machine = Machine(precision, "as before", matmul_peak(dtype, self.device))


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
