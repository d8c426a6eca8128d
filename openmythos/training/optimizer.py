"""Muon for the matrices, AdamW for everything else, and which parameter goes to which.

Muon replaces a matrix's momentum by the nearest orthogonal matrix (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). torch's takes one 2-D matrix at a time; this one also
takes stacked experts and fused matrices, and orthogonalises everything of one shape at once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from openmythos.errors import CheckpointError, ConfigError
from openmythos.training.settings import OptimizerConfig, TrainedPart

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos

Split = tuple[int, tuple[int, ...]]
"""How a fused matrix falls apart: the parameter's axis, and the sizes along it."""

AdjustLr = Literal["original", "match_rms_adamw"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7

CPU_BATCH = 2**18
"""Elements orthogonalised in one call on a CPU: enough to hide dispatch, few enough for its cache.

Against a loop over the matrices, in ms on one thread (AVX2, float32): 64 of 32 x 64, 10.6 to 2.1
(5.1 times faster); 64 of 48 x 128, 16.1 to 8.2 (2.0); 32 of 96 x 256, 46 to 32 (1.5); from
192 x 192 on the products alone count (1.0), and one call for all would lose a tenth.
"""


BUNCH = 2**24
"""Elements whose updates are held at once."""


class Group(NamedTuple):
    """Who updates a parameter, and whether weight decay pulls on it."""

    optimizer: Literal["muon", "adamw"]
    decays: bool


GROUPS: dict[str, Group] = {
    # The first word found in a parameter's name decides. A vector never decays and is AdamW's.
    "embed": Group("adamw", decays=False),
    "router": Group("adamw", decays=True),
    "lora": Group("adamw", decays=True),
    "injection": Group("adamw", decays=False),
    "core_output": Group("adamw", decays=False),  # C of the state's readout, a dynamics parameter
    "norm": Group("adamw", decays=False),
    "scale": Group("adamw", decays=False),  # one gain per head: a table of vectors, not a matrix
    "bias": Group("adamw", decays=False),
    "attention": Group("muon", decays=True),
    "feed_forward": Group("muon", decays=True),
    # Behind the two, in which a gate, or a map over heads, is a matrix as others are.
    "gate": Group("adamw", decays=True),
    "head": Group("adamw", decays=True),
}


def group_of(name: str, parameter: Tensor) -> Group:
    """Return the group of a parameter, from its name and its number of axes.

    A word of `GROUPS` counts where it is a part of the dotted name, or one of the words that
    underscores join: `norm` is in `core.q_norm.weight`, `head` is not in `heads.weight`.

    Raises:
        ConfigError: it is a matrix that no word claims.
    """
    if parameter.ndim < 2:
        return Group("adamw", decays=False)
    for word, group in GROUPS.items():
        if re.search(rf"(^|[._]){word}($|[._])", name):
            return group
    raise ConfigError(
        f"parameter={name} must have a word of openmythos.training.optimizer.GROUPS in its name: "
        f"add a row there, or use one of {', '.join(GROUPS)}"
    )


def learning(model: "OpenMythos", part: TrainedPart) -> frozenset[str]:
    """Return the names of the parameters that learn in a training's steps; the gate's do after."""
    named = model.adapter_parameters() if part == "adapters" else dict(model.named_parameters())
    return frozenset(name for name in named if not name.startswith("core.gate."))


def build_optimizers(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    *,
    fused_splits: Mapping[str, tuple[int, Sequence[int]]] | None = None,
    dtype: torch.dtype | None = None,
) -> "Optimizers":
    """Return the optimizers in which every parameter that wants gradients is exactly once.

    Args:
        named_parameters: the model's.
        config: settings of both optimizers.
        fused_splits: names the matrices that hold several side by side.
        dtype: what Muon orthogonalises in; None: `orthogonal_dtype` of the first parameter's
            device.

    Raises:
        ConfigError: no parameter wants gradients, no word claims one, or a split does not fit.
    """
    named = {name: p for name, p in named_parameters if p.requires_grad}
    if not named:
        raise ConfigError("parameters=0 must be 1 or more: nothing in this model wants a gradient")
    splits = {name: (axis, tuple(sizes)) for name, (axis, sizes) in (fused_splits or {}).items()}
    muon: dict[Split | None, list[Tensor]] = defaultdict(list)
    adamw: dict[bool, list[Tensor]] = defaultdict(list)
    for name, parameter in named.items():
        group = group_of(name, parameter)
        if group.optimizer == "muon" and config.matrices == "muon":
            muon[splits.get(name)].append(parameter)
        else:
            adamw[group.decays].append(parameter)

    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        muon_groups = [{"params": parameters, "split": split} for split, parameters in muon.items()]
        device = next(iter(named.values())).device
        optimizers.append(
            Muon(
                muon_groups,
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                dtype=dtype or orthogonal_dtype(device),
            )
        )
    if adamw:
        adamw_groups = [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, parameters in adamw.items()
        ]
        # Fused is elementwise, hence deterministic, and on one CPU thread 3.5 to 4 times faster
        # than foreach (4.1 against 16.0 ms for 4 M parameters in 70 tensors).
        betas = (config.adam_beta1, config.adam_beta2)
        optimizers.append(
            torch.optim.AdamW(adamw_groups, lr=config.adam_lr, betas=betas, fused=True)
        )
    return Optimizers(named, optimizers, clip=config.clip)


class Optimizers:
    """Several optimizers as one, whose state is keyed by parameter names.

    Names, not positions, so that a checkpoint still fits after the model's modules are reordered.
    """

    def __init__(
        self,
        named: Mapping[str, Tensor],
        optimizers: list[torch.optim.Optimizer],
        *,
        clip: float,
    ) -> None:
        self.optimizers = optimizers
        self.clip = clip
        self.skipped = 0
        """Steps whose gradient was not finite, and which changed nothing."""
        self._owner = {
            p: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self._named = dict(named)
        self._base_lr = [[group["lr"] for group in o.param_groups] for o in optimizers]

    @property
    def orthogonal_dtype(self) -> torch.dtype | None:
        """What Muon orthogonalises in; None where there is no Muon."""
        found = (each.dtype for each in self.optimizers if isinstance(each, Muon))
        return next(found, None)

    def orthogonalise_in(self, dtype: torch.dtype) -> None:
        """Let Muon, where there is one, orthogonalise in `dtype` from now on."""
        for each in self.optimizers:
            if isinstance(each, Muon):
                each.dtype = dtype

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Clip, update, and return the gradient's global norm as it was before clipping.

        Where the norm is infinite or not a number, nothing is updated, no momentum changes, and
        `skipped` grows by one. The caller's step number advances all the same.
        """
        norm = clip_gradients(self._named.values(), self.clip)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        else:
            self.skipped += 1
        return norm

    def set_lr(self, scale: float) -> None:
        """Set every learning rate to `scale` times the configured one."""
        for optimizer, rates in zip(self.optimizers, self._base_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all state as `parameter name.key`, and `skipped`; the tensors are not copies."""
        tensors = {"skipped": torch.tensor(self.skipped)}
        for name, parameter in self._named.items():
            for key, value in self._owner[parameter].state[parameter].items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace all state by what `state_tensors` gave, bit for bit.

        Raises:
            CheckpointError: names or shapes are not this model's; nothing is changed.
        """
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self._named}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            if name in states:
                states[name][key] = value
            elif full_name != "skipped":
                raise CheckpointError(
                    f"optimizer state={full_name} must belong to a trained parameter of this "
                    "model: resume with the configuration that the checkpoint was made with"
                )
        for name, state in states.items():
            self._check_state(name, state)
        for name, state in states.items():
            parameter = self._named[name]
            self._owner[parameter].state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in state.items()
            }
        self.skipped = int(tensors["skipped"]) if "skipped" in tensors else 0

    def _check_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        parameter = self._named[name]
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        shape = tuple(parameter.shape)
        if isinstance(self._owner[parameter], Muon):
            expected: dict[str, tuple[int, ...]] = {"momentum_buffer": shape}
        else:
            expected = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        if shapes and shapes != expected:  # none at all: it never had a gradient
            raise CheckpointError(
                f"optimizer state of {name}={shapes} must be {expected}: resume with the "
                "configuration that the checkpoint was made with"
            )


def clip_gradients(parameters: Iterable[Tensor], clip: float) -> float:
    """Scale the gradients to a global norm of at most `clip`; return the norm before that.

    A norm that is not finite leaves them as they are, and so does a clip of 0.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in with_gradient])
    if clip > 0 and norm.isfinite():
        torch.nn.utils.clip_grads_with_norm_(with_gradient, clip, norm)
    return float(norm)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices, stacks of matrices and fused matrices.

    On 2-D parameters it equals torch.optim.Muon, whose defaults it has. A stack lies
    (experts, in, out), the transpose of a Linear's (out, in), and the learning rate's factor
    comes from (out, in) in both. An expert whose gradient is exactly zero had no tokens this
    step, and is left alone: no update, no momentum, no weight decay.

    A parameter group may hold `split`, an axis of its parameters and the sizes along it: each
    piece is a matrix of its own. `dtype` is what is orthogonalised in; torch's is bfloat16.
    A parameter that `fully_shard` has divided is whole on every rank while it is moved, one at a
    time: a piece of a matrix cannot be orthogonalised alone.
    (torch's, without nesterov and with bfloat16 gradients, overwrites its own momentum.)

    Raises:
        ConfigError: settings are out of range, shapes are others, or splits do not fit.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr: AdjustLr = "original",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for key, value in {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}.items():
            if not value >= 0:
                raise ConfigError(f"{key}={value} must be 0 or more: see the class's defaults")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust_lr": adjust_lr,
            "split": None,
        }
        super().__init__(params, defaults)
        self.dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                _check_shape(parameter, group["split"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        alike: dict[tuple[Any, ...], list[_Piece]] = defaultdict(list)
        for parameter, momentum, group in self._with_gradient():
            if is_sharded(parameter):
                self._move_sharded(parameter, momentum, group)
                continue
            for piece in _split(parameter, parameter.grad, momentum, group):
                shape = tuple(sorted(piece.grad.shape[-2:]))
                alike[(shape, piece.grad.dtype, piece.grad.device)].append(piece)
        for pieces in alike.values():
            for bunch in _bunches(pieces):
                self._move(bunch)
        return loss

    def _with_gradient(self) -> Iterator[tuple[Any, Tensor, dict[str, Any]]]:
        """Yield each parameter that has a gradient, with its momentum and its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                yield parameter, state["momentum_buffer"], group

    def _move(self, pieces: list["_Piece"]) -> None:
        """Move pieces of one shape, orthogonalised together."""
        updates = [piece.direction() for piece in pieces]  # each (n, rows, columns)
        together = updates[0] if len(updates) == 1 else torch.cat(updates)
        orthogonal = orthogonalise(together, self.dtype)
        sizes = [len(update) for update in updates]
        for piece, update in zip(pieces, torch.split(orthogonal, sizes), strict=True):
            piece.apply(update)

    def _move_sharded(self, parameter: Any, momentum: Any, group: dict[str, Any]) -> None:
        """Gather one parameter, move it on every rank alike, and keep this rank's part."""
        weight, grad, moving = (x.full_tensor() for x in (parameter, parameter.grad, momentum))
        for piece in _split(weight, grad, moving, group):
            self._move([piece])
        _keep_part(parameter, weight)
        _keep_part(momentum, moving)


class _Piece(NamedTuple):
    """One matrix or one stack to orthogonalise: views into a parameter, its gradient and momentum.

    All are (n, rows, columns), n = 1 for a matrix. `busy` lists the experts with a gradient;
    None stands for all, which needs no gathering.
    """

    weight: Tensor
    grad: Tensor
    momentum: Tensor
    busy: Tensor | None
    stacked: bool
    group: dict[str, Any]

    def direction(self) -> Tensor:
        """Move the momentum on, and return what to orthogonalise, never taller than wide."""
        grad = self._gather(self.grad)
        momentum = self._gather(self.momentum).lerp_(grad, 1 - self.group["momentum"])
        self._scatter(self.momentum, momentum)
        update = grad.lerp(momentum, self.group["momentum"]) if self.group["nesterov"] else momentum
        return update.mT if self._tall else update

    def apply(self, update: Tensor) -> None:
        """Move the weights by an orthogonalised update, after their decay."""
        lr: float = self.group["lr"]
        rows, columns = self.weight.shape[-2:]
        out_size, in_size = (columns, rows) if self.stacked else (rows, columns)
        factor = LR_FACTORS[self.group["adjust_lr"]](out_size, in_size)
        weight = self._gather(self.weight)
        weight.mul_(1 - lr * self.group["weight_decay"])
        weight.add_(update.mT if self._tall else update, alpha=-lr * factor)
        self._scatter(self.weight, weight)

    @property
    def _tall(self) -> bool:
        return self.weight.shape[-2] > self.weight.shape[-1]

    def _gather(self, tensor: Tensor) -> Tensor:
        return tensor if self.busy is None else tensor.index_select(0, self.busy)

    def _scatter(self, tensor: Tensor, rows: Tensor) -> None:
        if self.busy is not None:
            tensor.index_copy_(0, self.busy, rows)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked by its method, since not every torch has `distributed`."""
    return hasattr(tensor, "full_tensor")


def _keep_part(sharded: Any, whole: Tensor) -> None:
    """Write this rank's part of a tensor that is the same on all ranks."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    sharded.to_local().copy_(copies.redistribute(placements=sharded.placements).to_local())


def _bunches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces together up to `BUNCH` elements, and larger ones alone.

    The updates of a whole model at once would need as much memory again as its weights.
    """
    bunch: list[_Piece] = []
    for piece in pieces:
        if bunch and sum(p.grad.numel() for p in bunch) + piece.grad.numel() > BUNCH:
            yield bunch
            bunch = []
        bunch.append(piece)
    if bunch:
        yield bunch


LR_FACTORS: dict[str, Callable[[int, int], float]] = {
    # Keeps the update's size the same for every (out, in); Jordan et al. 2024.
    "original": lambda out_size, in_size: math.sqrt(max(1, out_size / in_size)),
    # Makes it as large as AdamW's (Liu et al. 2025, arXiv 2502.16982).
    "match_rms_adamw": lambda out_size, in_size: 0.2 * math.sqrt(max(out_size, in_size)),
}


def orthogonalise(
    matrices: Float[Tensor, "matrices rows columns"], dtype: torch.dtype
) -> Float[Tensor, "matrices rows columns"]:
    """Return each matrix with its singular values moved near 1, in `dtype`.

    Five quintic Newton-Schulz iterations, whose coefficients trade exactness (the values end
    between about 0.7 and 1.2) for speed (Jordan et al. 2024). Cheapest with rows <= columns.
    """
    if matrices.device.type != "cpu":
        return _newton_schulz(matrices.to(dtype))
    together = max(1, CPU_BATCH // matrices[0].numel())
    return torch.cat([_newton_schulz(part.to(dtype)) for part in torch.split(matrices, together)])


def _newton_schulz(
    x: Float[Tensor, "matrices rows columns"],
) -> Float[Tensor, "matrices rows columns"]:
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonal_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it faster than float32, else float32.

    On a CPU without AMX or AVX512-BF16, bfloat16 products are emulated, 15 to 25 times slower.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def _check_shape(parameter: Tensor, split: Split | None) -> None:
    shape = tuple(parameter.shape)
    if parameter.ndim not in (2, 3):
        raise ConfigError(
            f"shape={shape} must have two axes, or three for stacked experts: give it to AdamW"
        )
    if split is None:
        return
    axis, sizes = split
    matrix_axes = (parameter.ndim - 2, parameter.ndim - 1)
    if axis % parameter.ndim not in matrix_axes or sum(sizes) != shape[axis]:
        raise ConfigError(
            f"split={split} must name one of the axes {matrix_axes} of shape={shape}, and sizes "
            "that sum to it: correct fused_splits"
        )


def _split(
    parameter: Tensor, grad: Tensor, momentum: Tensor, group: dict[str, Any]
) -> Iterable[_Piece]:
    stacked = parameter.ndim == 3
    busy = None
    if stacked:
        has_gradient = grad.flatten(1).any(dim=1)  # (experts,); True for NaN too
        busy = None if has_gradient.all() else has_gradient.nonzero().squeeze(1)
        if busy is not None and len(busy) == 0:
            return
    views = [parameter, grad, momentum]
    if not stacked:
        views = [view.unsqueeze(0) for view in views]
    axis, sizes = group["split"] or (0, (len(parameter),))
    axis = axis % parameter.ndim - parameter.ndim  # from the end, where a matrix has no third axis
    parts = [torch.split(view, list(sizes), dim=axis) for view in views]
    for weight, part_grad, part_momentum in zip(*parts, strict=True):
        yield _Piece(weight, part_grad, part_momentum, busy=busy, stacked=stacked, group=group)
