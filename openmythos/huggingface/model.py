"""`OpenMythos` as a causal language model of transformers.

The folder stays ours: `save_pretrained` writes what `openmythos.load` and every command read, and
`from_pretrained` reads it, whatever its weights are kept in.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from openmythos.config import HaltingKind, MythosConfig, WeightsKind
from openmythos.errors import InputError
from openmythos.huggingface.adapters import check_adapters, has_adapters
from openmythos.huggingface.cache import OpenMythosCache
from openmythos.huggingface.calls import cache_of, mask_of, positions_of, refuse_unknown
from openmythos.huggingface.config import OpenMythosConfig
from openmythos.huggingface.folders import (
    HUB,
    MARKS,
    OF_LOADING,
    OF_OUTPUT,
    OF_SAVING,
    check_attention,
    find_folder,
    generation_of,
    mark_ends,
    read_folder,
    with_loops,
)
from openmythos.inference.language_model import LanguageModel
from openmythos.model.files import fill, save_model
from openmythos.model.tied import HEAD, tie_again
from openmythos.model.transformer import MythosOutput, OpenMythos
from openmythos.training.depth import backprop_loops, sample_loops
from openmythos.training.settings import DepthLaw
from openmythos.training.trainer import NOISE

PREFIX = "model."


@dataclass
class OpenMythosOutput(CausalLMOutputWithPast):  # type: ignore[misc]  # no types there
    """What transformers' causal models return, and the loops of each token."""

    loops: Int[Tensor, "batch sequence"] | None = None


class OpenMythosForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A recurrent-depth transformer for `generate`, `pipeline`, `Trainer` and PEFT.

    `loops`, `halting` and `threshold` go into the call, or into `generate`, and decide how deep it
    thinks. In training, a call without `loops` draws them for each sequence as `openmythos train`
    does; a model that always met one depth is bound to it.

    Args:
        config: the shape.
        model: one with weights. Default: a new one.
    """

    config_class = OpenMythosConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Layer", "Core"]
    depth: DepthLaw = "poisson"
    """Law by which loops are drawn in training; see `openmythos.training.depth`."""

    def __init__(self, config: OpenMythosConfig, model: OpenMythos | None = None) -> None:
        super().__init__(config)
        check_attention(self.config._attn_implementation)
        self.model = _new(config.mythos) if model is None else model
        self.loads: Int[Tensor, "1 layers experts"] | None = None
        self.register_load_state_dict_pre_hook(_as_in_files)
        self.post_init()
        if config.tie_head:
            self._keys_to_ignore_on_save = {PREFIX + HEAD}

    @classmethod
    def of(cls, model: OpenMythos | LanguageModel) -> OpenMythosForCausalLM:
        """Return a model that is there already; one with a tokenizer ends texts as that says."""
        inner = model.model if isinstance(model, LanguageModel) else model
        whole = cls(OpenMythosConfig.of(inner.config), inner).train(inner.training)
        if isinstance(model, LanguageModel):
            mark_ends(whole.generation_config, model.tokenizer.end_id)
        return whole._as_generated()

    def _as_generated(self) -> OpenMythosForCausalLM:
        """Repeat in the config what begins, ends and pads texts: a Trainer compares them."""
        for name in MARKS:
            setattr(self.config, name, getattr(self.generation_config, name))
        return self

    def forward(
        self,
        input_ids: Int[Tensor, "batch sequence"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows sequence"] | None = None,
        cache: OpenMythosCache | None = None,
        past_key_values: OpenMythosCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "batch sequence"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        loops: int | Int[Tensor, " batch"] | Int[Tensor, "batch sequence"] | None = None,
        halting: HaltingKind = "none",
        threshold: float | None = None,
        **unused: Any,
    ) -> OpenMythosOutput | tuple[Any, ...]:
        """Compute logits, and the loss where there are labels: the mean, in nats a token.

        Args:
            input_ids: tokens behind those of the cache.
            attention_mask: `(batch, columns)`, 0 for padding; of the cache's columns, too.
            position_ids: rotary positions, rising, of each row or of all; default: each token's
                place in its text.
            cache: what was read before, as this model returns it; extended in place.
            past_key_values: its older name.
            inputs_embeds: refused.
            labels: the same tokens, -100 where none is to be predicted; shifted here.
            use_cache: return a cache, new where there was none.
            output_hidden_states: return the state after each loop, as `hidden_states`; in training
                every loop then carries gradient.
            logits_to_keep: return the logits of so many last tokens; 0: of all.
            loops: most loops of every token, of each sequence or of each token. Default: the
                config's mean; in training, drawn.
            halting: when a token leaves the core before: none, gate, delta, kl or act.
            threshold: the rule's bound; None is its own default.
            unused: what transformers' callers add.

        Raises:
            InputError: something does not fit, or is not known.
        """
        if input_ids is None or inputs_embeds is not None:
            raise InputError(
                "inputs_embeds must be left out: give input_ids, which the model embeds"
            )
        refuse_unknown(unused)
        kept = cache_of(cache, past_key_values)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._check_training(kept)
        elif kept is None and use_cache:
            kept = OpenMythosCache()
        states = self.config.output_hidden_states
        states = bool(states if output_hidden_states is None else output_hidden_states)
        mask = mask_of(attention_mask, input_ids, 0 if kept is None else kept.columns)
        if kept is not None and mask is not None and not mask.any():
            kept.advance(input_ids, mask)
            return self._output(self._nothing(input_ids), kept, labels, logits_to_keep, unused)
        drawn = learns and loops is None and halting == "none"
        chosen = self._drawn(input_ids) if drawn else loops
        last = backprop_loops(self.config.mean_loops) if drawn and not states else None
        out: MythosOutput = self.model(
            input_ids,
            self.config.mean_loops if chosen is None else chosen,
            cache=None if kept is None else kept.ready(self.model, *input_ids.shape),
            halting=halting,
            threshold=threshold,
            mask=mask,
            positions=positions_of(position_ids, mask, input_ids),
            h0=self._noise(input_ids) if learns and self.config.h0 == "noise" else None,
            backprop_loops=last,
            return_states=states,
        )
        if kept is not None:
            kept.advance(input_ids, mask)
        if learns and (counted := out.loads) is not None:
            loads = counted.sum(0, keepdim=True)  # calls of a step may differ in depth
            self.loads = loads if self.loads is None else self.loads + loads
        return self._output(out, kept, labels, logits_to_keep, unused)

    def _check_training(self, kept: OpenMythosCache | None) -> None:
        check_adapters(self.model)
        if kept is not None:
            raise InputError(
                "cache must be left out in training: what it has read carries no gradient"
            )

    def _nothing(self, input_ids: Tensor) -> MythosOutput:
        """What comes of a call of padding alone, as the first part of a padded prompt may be."""
        logits = self.model.embed.weight.new_zeros((*input_ids.shape, self.config.vocab_size))
        return MythosOutput(logits, torch.zeros_like(input_ids))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # numpy's arithmetic is not torch's
    def _drawn(self, input_ids: Tensor) -> Int[Tensor, " batch"]:
        """Loops of each sequence of a training step, from torch's generator.

        Processes that draw the same number have sequences of their own.
        """
        if self.config.learned_act:
            raise InputError(
                "learned_act=True must go with halting='act' in training, and a loss of its own: "
                "train such a model with `openmythos train`"
            )
        seed, count = int(torch.randint(2**31, ())), len(input_ids)
        first = count * (dist.get_rank() if _together() else 0)
        mine = range(first, first + count)
        depth = sample_loops(self.depth, self.config.mean_loops, seed=seed, step=0, indices=mine)
        return torch.from_numpy(depth).to(input_ids.device)

    def _noise(self, input_ids: Tensor) -> Float[Tensor, "batch sequence hidden"]:
        shape = (*input_ids.shape, self.config.hidden_size)
        return torch.randn(shape, device=input_ids.device) * NOISE

    def _output(
        self,
        out: MythosOutput,
        kept: OpenMythosCache | None,
        labels: Tensor | None,
        logits_to_keep: int,
        given: dict[str, Any],
    ) -> OpenMythosOutput | tuple[Any, ...]:
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=out.logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=given.get("num_items_in_batch"),
            )
        whole = OpenMythosOutput(
            loss=loss,
            logits=out.logits[:, -logits_to_keep:],  # -0: all of them
            cache=kept,
            hidden_states=None if out.states is None else tuple(out.states),
            loops=out.loops,
        )
        as_dict = given.get("return_dict")
        as_dict = self.config.return_dict if as_dict is None else as_dict
        return whole if as_dict else whole.to_tuple()

    def rebalance(self) -> None:
        """Move the routers' biases by the loads of the training calls since the last time.

        To be called after each optimizer step, as `BalanceRouters` does in a `Trainer`; by each of
        several processes, whose loads add up. Routers that do not learn stay as they are: an
        adapter's file would not have their biases.
        """
        loads, self.loads = self.loads, None
        routers = [layer.router for layer in self.model.core.experts_layers()]
        learns = [router.weight.requires_grad for router in routers]
        if loads is None or not learns or not all(learns):
            return
        if _together():
            dist.all_reduce(loads)
        self.model.core.rebalance(loads)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the core's layers anew in the backward pass, each at each loop, to save memory.

        Raises:
            InputError: it is to be done otherwise.
        """
        del activation_checkpointing_kwargs  # how torch does it, which changes no result
        if every_n_layers != 1 or offload:
            raise InputError(
                "every_n_layers and offload must be left out: every layer of the core is computed "
                "anew, where it lies"
            )
        self.model.core.checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep what the backward pass needs."""
        self.model.core.checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the core's layers are computed anew in the backward pass."""
        return self.model.core.checkpointing

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        """Give `generate` a cache of ours."""
        del rest
        limit, most = self.model.config.max_length, generation_config.max_length
        if most is not None and most > limit:
            raise InputError(
                f"max_length={most} must be at most {limit}, prompt and new tokens together: "
                "shorten the prompt, or ask for fewer new tokens"
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise InputError(
                f"cache_implementation={kind!r} must be left out: the model has a cache of its own"
            )
        given = model_kwargs.get("cache") is not None
        if generation_config.use_cache is not False and not given:
            model_kwargs["cache"] = OpenMythosCache()

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Refuse another attention than torch's.

        Raises:
            InputError: it is another.
        """
        check_attention(attn_implementation)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load tensors; a tied head that they lack counts as missing, as safetensors expects."""
        lacks = self.config.tie_head and not {HEAD, PREFIX + HEAD} & set(state_dict)
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if lacks and not strict:
            found.missing_keys.append(PREFIX + HEAD)
        return found

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refuse another size; transformers asks without one to get the embedding.

        Raises:
            InputError: the size is another.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise InputError(
                f"new_num_tokens={new_num_tokens} must be vocab_size={self.config.vocab_size}: a "
                "model keeps the tokens that it was trained with"
            )
        return self.model.embed

    def init_weights(self) -> None:
        """Leave weights as they are: a new model's are made with it, by name and seed."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Make the head the embedding's matrix again, where it is to be."""
        if self.config.tie_head:
            tie_again(self.model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: OpenMythosConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        generation_config: GenerationConfig | None = None,
        adapter_kwargs: dict[str, Any] | None = None,
        **given: Any,
    ) -> OpenMythosForCausalLM:
        """Read a model's folder, a model of the package, or a repository of the hub.

        Args:
            pretrained_model_name_or_path: the folder; or a name, `openmythos-lm`; or on the hub.
            config: as read from there; `mean_loops` may be another, and no other field.
            dtype: cast to this one, as in `OpenMythos.from_pretrained`; `auto`: do not.
            torch_dtype: its older name.
            device_map: one device, or `auto`: a GPU where there is one. Default: the CPU.
            generation_config: what `generate` goes by. Default: the folder's.
            adapter_kwargs: of an adapter on the model, as the `Auto` classes find it.
            given: of the hub, as elsewhere in transformers, or fields of the config.

        Raises:
            CheckpointError: the folder holds no model, or a damaged one.
            InputError: an argument is not known, or does not fit.
            OSError: there is no such folder, and none on the hub.
        """
        given = {OpenMythosConfig.attribute_map.get(n, n): x for n, x in given.items()}
        hub = {name: given.pop(name) for name in HUB if name in given}
        fields = {name: value for name, value in given.items() if name not in OF_LOADING}
        check_attention(fields.pop("attn_implementation", None))
        if config is not None:
            check_attention(config._attn_implementation)
        use_cache = fields.pop("use_cache", None)
        told = {name: fields.pop(name) for name in OF_OUTPUT if name in fields}
        folder = find_folder(pretrained_model_name_or_path, hub)
        kind = dtype if dtype is not None else torch_dtype
        model = read_folder(folder, config, kind, device_map, fields)
        config = OpenMythosConfig.of(model.config) if config is None else copy.deepcopy(config)
        for name, value in {**told, "mean_loops": model.config.mean_loops}.items():
            setattr(config, name, value)
        whole = cls(config, model).eval()
        whole.generation_config = generation_config or generation_of(folder)
        if use_cache is not None:
            whole.generation_config.use_cache = use_cache
        whole.name_or_path = whole.config.name_or_path = str(pretrained_model_name_or_path)
        adapter = dict(adapter_kwargs or {})
        if path := adapter.pop("_adapter_model_path", None):
            whole.load_adapter(path, adapter_kwargs=adapter)
        return whole._as_generated()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        weights: WeightsKind | None = None,
        **given: Any,
    ) -> None:
        """Write a model's folder, as `OpenMythos.save_pretrained` does.

        Args:
            save_directory: the folder, made where it is missing.
            is_main_process: only then is anything written.
            state_dict: the tensors, where they were gathered from several processes.
            push_to_hub: refused; `push_to_hub` is a method.
            weights: `fp32`, `bf16` or `int8`; default: as they are.
            given: what callers add for models of several files; nothing else.

        Raises:
            CheckpointError: a file cannot be written, or a weight is not finite.
            InputError: there are no such `weights`, an argument is not known, or the model holds
                adapters.
        """
        for name in given:
            if name not in OF_SAVING:
                raise InputError(f"{name} must be left out: saving takes no such argument")
        if push_to_hub:
            raise InputError("push_to_hub must be left out: call model.push_to_hub(REPOSITORY)")
        if has_adapters(self):
            raise InputError(
                "save_pretrained must come after merge_and_unload: the model holds adapters, which "
                "PEFT's own save_pretrained writes"
            )
        if not is_main_process:
            return
        model = self.model
        model.config = with_loops(model.config, self.config.mythos, {})
        if state_dict is not None:
            with torch.device("meta"):
                model = OpenMythos(model.config)
            fill(model, {n.removeprefix(PREFIX): x for n, x in state_dict.items()}, "state_dict")
        self.generation_config.validate(strict=True)
        save_model(model, Path(save_directory), None, weights)
        self.generation_config.save_pretrained(save_directory)


def _new(config: MythosConfig) -> OpenMythos:
    """A new model in torch's default dtype, with what always stays in fp32."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        model = OpenMythos(config)
    finally:
        torch.set_default_dtype(dtype)
    return model.to(dtype)


def _together() -> bool:
    """Whether several processes train one model."""
    return dist.is_available() and dist.is_initialized()


def _as_in_files(_: nn.Module, tensors: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Take tensors by the names that our files have, too: a `Trainer` resumes from them."""
    del rest
    own = prefix + PREFIX
    for name in [n for n in tensors if n.startswith(prefix) and not n.startswith(own)]:
        tensors[own + name.removeprefix(prefix)] = tensors.pop(name)
