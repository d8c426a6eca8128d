"""One matrix for embedding and head, which stays one while a model is moved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from openmythos.model.transformer import OpenMythos

EMBED, HEAD = "embed.weight", "head.weight"


def tie(model: OpenMythos) -> None:
    """Take a new model's embedding as its head, now and after any weights are loaded.

    Weights without a head are whole: a file holds the matrix once. Weights whose head is another
    matrix are refused by `load_state_dict`, as those of another shape are.
    """
    tie_again(model)
    model.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]


def tie_again(model: OpenMythos) -> None:
    """Take the embedding as the head where each was replaced by a matrix of its own."""
    model.head.weight = model.embed.weight


def _before_loading(
    model: nn.Module,  # noqa: ARG001 (torch names it)
    tensors: dict[str, Any],
    prefix: str,
    *rest: Any,
) -> None:
    embed, head = tensors.get(prefix + EMBED), tensors.get(prefix + HEAD)
    if embed is None:
        return
    if head is None:
        tensors[prefix + HEAD] = embed
    elif _are_two(embed, head):
        errors: list[str] = rest[-1]
        errors.append(
            f"{prefix}{HEAD} must be {prefix}{EMBED}, as tie_head=True says: load these weights "
            "into a model with tie_head=False"
        )


def _after_loading(model: Any, incompatible: Any) -> None:  # noqa: ARG001 (torch names it)
    tie_again(model)  # `assign=True` gives each place a parameter of its own


def _are_two(one: Tensor, other: Tensor) -> bool:
    """Whether plain tensors lie apart and differ: NaN differs from itself, and may be shared."""
    plain = {type(one), type(other)} <= {Tensor, nn.Parameter}
    return plain and one.data_ptr() != other.data_ptr() and not one.equal(other)
