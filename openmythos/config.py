"""What a model's weights need: one frozen, validated dataclass.

Settings of a training run, of sampling or of a server live beside the code that reads them.
This file imports no torch, so that every `--help` answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from openmythos.errors import CheckpointError, ConfigError
from openmythos.numbers import real

AttentionKind = Literal["gqa", "mla"]
FeedForwardKind = Literal["swiglu", "relu2"]
InjectionKind = Literal["lti", "free", "linear", "add", "none"]
NormPlacement = Literal["pre", "peri", "sandwich"]
FirstState = Literal["zeros", "noise", "e"]
CoreOutputKind = Literal["linear", "norm", "none"]
RopePairing = Literal["half", "interleaved"]
HaltingKind = Literal["none", "gate", "delta", "kl", "act"]
CachePolicy = Literal["per_loop", "last"]
WeightsKind = Literal["fp32", "bf16", "int8"]
WeightsChoice = Literal[WeightsKind, "auto", "file"]

MOST = 1 << 31
"""More than any size or count."""

CONFIG_FILE = "config.json"
MODEL_TYPE = "openmythos"


@dataclass(frozen=True, kw_only=True)
class MythosConfig:
    """The shape of a recurrent-depth transformer.

    Start from `MythosConfig.preset("tiny")` and `replace(...)` what differs. A dense core is
    `experts=0`; a plain transformer is `injection="none", h0="e", core_output="none",
    mean_loops=1` with as many core layers as wanted.
    """

    vocab_size: int = 4096
    """Rows of the embedding; token ids run from 0 to vocab_size - 1."""
    hidden_size: int = 256
    """Width of the residual stream."""
    max_length: int = 1024
    """Most positions of a sequence, prompt and continuation together."""

    num_heads: int = 8
    """Query heads of each attention."""
    kv_heads: int | None = None
    """Key and value heads of `gqa`; must divide num_heads. Default: num_heads."""
    head_dim: int | None = None
    """Width of a head in `gqa`; even. Default: hidden_size / num_heads."""
    attention: AttentionKind = "gqa"
    """Grouped-query attention, or multi-head latent attention (DeepSeek-V2)."""
    qk_norm: bool = True
    """Normalise queries and keys to unit RMS before the product, with a learned scale."""
    qk_bias: bool = False
    """Add a learned bias to queries and keys of `gqa` before rotation."""
    kv_latent: int = 64
    """`mla`: width of the latent that is cached per token, beside `rope_dim`."""
    q_latent: int = 0
    """`mla`: width of the query's latent; 0 projects queries straight from the state."""
    rope_dim: int = 16
    """`mla`: rotated part of a head; one rotated key per token is shared by all heads. Even."""
    nope_dim: int = 32
    """`mla`: unrotated part of a head's query and key."""
    value_dim: int = 32
    """`mla`: width of a head's value."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_pairing: RopePairing = "half"
    """Which channels turn together: i with i + d/2 (`half`), or 2i with 2i + 1."""

    prelude_layers: int = 1
    """Layers run once before the loop."""
    core_layers: int = 2
    """Layers inside the loop."""
    coda_layers: int = 1
    """Layers run once after the loop."""
    mean_loops: int = 8
    """Mean number of loops in training, and the default at inference."""

    norm: NormPlacement = "pre"
    """`pre`: x + f(norm x). `peri`: x + norm f(norm x). `sandwich`: norm(x + f(norm x))."""
    norm_eps: float = 1e-6
    """Added to the mean square inside every norm."""
    feed_forward: FeedForwardKind = "swiglu"
    """Gated SiLU, or squared ReLU."""
    feed_forward_size: int | None = None
    """Inner width of dense feed-forwards. Default: 8/3 (swiglu) or 4 (relu2) of hidden_size."""

    experts: int = 0
    """Routed experts of each core layer; 0 makes the core dense."""
    shared_experts: int = 1
    """Experts that every token passes, beside the routed ones."""
    experts_per_token: int = 2
    """Routed experts chosen for each token at each loop."""
    expert_size: int = 256
    """Inner width of one expert. A multiple of 8 keeps grouped products on the fast path."""
    routed_scale: float = 1.0
    """Factor on the weighted sum of the routed experts."""
    balance_rate: float = 0.01
    """How far one optimizer step moves a router's bias for an over- or underloaded expert."""

    router_loops: int = 1
    """Loops with a router of their own, so that each may choose other experts; later loops use the
    last. 1 is one router for all."""

    lora_rank: int = 0
    """Rank of the depth-wise LoRA on the core's maps; 0 has none."""
    lora_loops: int | None = None
    """Loops with a correction of their own; later loops use the last. Default: mean_loops."""

    injection: InjectionKind = "lti"
    """How e enters each loop: `lti` A h + B e with A < 1; `free` a diagonal without that bound;
    `linear` one matrix on [h, e]; `add` h + e; `none` h alone."""
    h0: FirstState = "zeros"
    """State before the first loop: zeros, e, or normal noise in training. Noise is drawn by the
    Trainer, which gives it to each call; a loop of your own passes h0, or begins with zeros."""
    core_output: CoreOutputKind = "linear"
    """Between core and coda: a matrix C, a norm, or nothing."""
    prelude_norm: bool = True
    """Normalise the prelude's output e."""
    loop_norm: bool = False
    """Normalise the state after every loop."""
    final_norm: bool = True
    """Normalise the coda's output before the head."""
    gate_size: int = 32
    """Hidden units of the gate that decides when tokens leave the core; 0: it is linear."""
    learned_act: bool = False
    """Learn Graves' exit probability jointly with the model, for `halting="act"`."""

    tie_head: bool = True
    """Use the embedding's matrix as output head."""
    embedding_scale: float | None = None
    """Factor on the embedding. Default: sqrt(hidden_size), as its rows start at unit length."""
    logit_scale: float | None = None
    """Factor on the logits. Default: 1 up to a width of 128, then falling as its root, so that
    a token's own logit under a tied head starts no larger in a wide model (a width of 2048 would
    start at a loss of 29 nats)."""
    out_init: float = 0.5
    """Scale of the out-projections at start, relative to 1/sqrt(fan_in); 0 starts each layer as
    the identity, which leaves all loops collinear."""

    _derived: ClassVar[set[str]]
    """Fields of this one object that nobody set, whose values follow from others; of one that was
    read from JSON, those that have the values they would follow to."""

    def __post_init__(self) -> None:
        """Fill derived defaults, then check every field.

        Raises:
            ConfigError: a field has an unknown name or a size that cannot be built.
        """
        object.__setattr__(self, "_derived", set())
        check_types(self)
        self._check_bounds()
        self._check_kinds()
        for name in ("hidden_size", "num_heads"):  # others are derived from them
            self._at_least(name, 1)
        self._fill()
        self._check_sizes()
        self._check_together()

    def _fill(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}: "
                "choose another number of heads, or give head_dim"
            )
        for name, value in self._following().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
                self._derived.add(name)

    def _following(self) -> dict[str, float | None]:
        """What each field is that nobody sets; `replace` derives it anew. None: there is none."""
        divides = self.hidden_size % self.num_heads == 0
        wide = self.hidden_size * (8 / 3 if self.feed_forward == "swiglu" else 4)
        return {
            "head_dim": self.hidden_size // self.num_heads if divides else None,
            "kv_heads": self.num_heads,
            "feed_forward_size": max(8, round(wide / 8) * 8),
            "lora_loops": self.mean_loops,
            "embedding_scale": float(self.hidden_size**0.5),
            "logit_scale": min(1.0, (128 / self.hidden_size) ** 0.5),
        }

    def _check_kinds(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(f"{name}={value!r} must be one of {', '.join(get_args(kind))}")

    def _check_bounds(self) -> None:
        """Before any arithmetic: a number of hundreds of digits is more than a float can be."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and abs(value) >= MOST:
                raise ConfigError(
                    f"{field.name} has {value.bit_length()} bits, must be below {MOST}"
                )

    def _check_sizes(self) -> None:
        at_least_one = (
            "vocab_size hidden_size max_length num_heads kv_heads head_dim kv_latent rope_dim "
            "nope_dim value_dim mean_loops feed_forward_size expert_size lora_loops core_layers "
            "router_loops"
        )
        for name in at_least_one.split():
            self._at_least(name, 1)
        for name in [
            "prelude_layers",
            "coda_layers",
            "experts",
            "shared_experts",
            "lora_rank",
            "q_latent",
            "gate_size",
        ]:
            self._at_least(name, 0)
        rotated = "rope_dim" if self.attention == "mla" else "head_dim"
        if getattr(self, rotated) % 2:
            raise ConfigError(
                f"{rotated}={getattr(self, rotated)} must be even, because rotary embedding turns "
                f"pairs of channels: choose {getattr(self, rotated) + 1}"
            )
        for name in ("norm_eps", "embedding_scale", "logit_scale", "balance_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("out_init", "routed_scale"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.rope_base < 1:
            raise ConfigError(f"rope_base={self.rope_base} must be 1 or more")

    def _check_together(self) -> None:
        if self.num_heads % self.kv_heads:  # type: ignore[operator]
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"kv_heads={self.kv_heads} must divide num_heads={self.num_heads}: "
                f"choose one of {', '.join(map(str, divisors))}"
            )
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"experts_per_token={self.experts_per_token} must be from 1 to "
                f"experts={self.experts}"
            )
        if self.router_loops > 1 and not self.experts:
            raise ConfigError(
                f"router_loops={self.router_loops} must go with experts: a core without any has no "
                "router, so leave it 1"
            )
        if self.qk_bias and self.attention == "mla":
            raise ConfigError("qk_bias=True must go with attention='gqa': MLA has no such bias")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value < least:
            raise ConfigError(f"{name}={value} must be {least} or more")

    @classmethod
    def preset(cls, name: str) -> MythosConfig:
        """Return a named scale, `"nano"` to `"1t"`; `replace` then changes fields of it.

        Raises:
            ConfigError: there is no such preset; the message lists them.
        """
        from openmythos.scales import SCALES

        if not isinstance(name, str) or name not in SCALES:
            raise ConfigError(f"preset={name!r} must be one of {', '.join(SCALES)}")
        return cls(**SCALES[name])

    def replace(self, **changes: Any) -> MythosConfig:
        """Return a copy with some fields changed, validated again.

        Fields that nobody set follow: another `hidden_size` is another default `head_dim`. JSON
        holds every field and not who set it. In a config that was read from there, as a loaded
        model's, a field follows where it has the value that it would have if nobody had set it.

        Raises:
            ConfigError: a name is not a field, or the new values do not fit.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(f"{name}={changes[name]!r} is not a field: {', '.join(names)}")
        opened: dict[str, Any] = dict.fromkeys(self._derived)
        return dataclasses.replace(self, **{**opened, **changes})

    def open(self) -> MythosConfig:
        """Return a copy whose derived fields are None again: a form to fill in, not a model."""
        copied = copy.copy(self)
        for name in self._derived:
            object.__setattr__(copied, name, None)
        return copied

    def to_json(self) -> str:
        """Return the config as JSON, with a `model_type` as Hugging Face's folders have."""
        fields = {"model_type": MODEL_TYPE, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG_FILE) -> MythosConfig:
        """Build a config from `to_json`'s text; `replace` says which of its fields follow others.

        Raises:
            CheckpointError: the text is not such a config; the message names `source`.
            ConfigError: a value does not fit.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{source} must be JSON: {error}") from error
        if not isinstance(fields, dict) or fields.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f"{source} must hold model_type={MODEL_TYPE!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - names)
        if unknown:
            raise CheckpointError(
                f"{source} has the unknown field {unknown[0]!r}: it was written by another version"
            )
        config = cls(**fields)
        following = config._following()
        same = {name for name, value in following.items() if getattr(config, name) == value}
        config._derived.update(same)
        return config

    @classmethod
    def load(cls, folder: str | Path) -> MythosConfig:
        """Read `config.json` of a checkpoint's folder.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise CheckpointError(f"{path} must exist: {folder} is not a model's folder")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"{path} must be readable ({error.strerror}): check its permissions"
            ) from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} must be JSON in UTF-8: {error}") from error
        return cls.from_json(text, str(path))


KINDS: dict[str, Any] = {
    "attention": AttentionKind,
    "feed_forward": FeedForwardKind,
    "injection": InjectionKind,
    "norm": NormPlacement,
    "h0": FirstState,
    "core_output": CoreOutputKind,
    "rope_pairing": RopePairing,
}


def check_types(config: Any) -> None:
    """Refuse values of a wrong type before arithmetic on them fails obscurely.

    Args:
        config: a dataclass; its fields of integers, floats and booleans are looked at.

    Raises:
        ConfigError: a field has another type, or is not finite.
    """
    for field in dataclasses.fields(config):
        value, optional = getattr(config, field.name), "None" in str(field.type)
        if value is None and optional:
            continue
        kind = str(field.type).split(" ")[0]
        if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{field.name}={value!r} must be an integer")
        if kind == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{field.name}={value!r} must be true or false")
        if kind == "float" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{field.name}={value!r} must be a number")
        if kind == "float" and real(value) is None:
            raise ConfigError(f"{field.name}={value!r} must be a finite number")
