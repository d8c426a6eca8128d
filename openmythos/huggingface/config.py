"""A model's shape as transformers keeps it: `MythosConfig`, field by field."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from openmythos.config import MODEL_TYPE, MythosConfig

KEPT = {field.name: field.name for field in dataclasses.fields(MythosConfig)}
"""Where each field is kept."""
KEPT["max_length"] = "max_position_embeddings"  # the field's name is a setting of `generate` there


class OpenMythosConfig(PreTrainedConfig):  # type: ignore[misc]  # no types there
    """`MythosConfig` for transformers, whose names of sizes it knows too.

    Raises:
        ConfigError: a field does not fit; the sentence names it.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values", "loops"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "feed_forward_size",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_head",
    }

    def __init__(self, **fields: Any) -> None:
        names = {**self.attribute_map, "max_length": KEPT["max_length"]}
        fields = {names.get(name, name): value for name, value in fields.items()}
        own = {name: fields.pop(kept) for name, kept in KEPT.items() if kept in fields}
        for name, value in dataclasses.asdict(MythosConfig(**own)).items():
            setattr(self, KEPT[name], value)
        super().__init__(**fields)

    @property
    def mythos(self) -> MythosConfig:
        """The shape as the model takes it.

        Raises:
            ConfigError: a field was set to what does not fit.
        """
        return MythosConfig(**{name: getattr(self, kept) for name, kept in KEPT.items()})

    @classmethod
    def of(cls, config: MythosConfig) -> OpenMythosConfig:
        """Return the same shape for transformers."""
        return cls(**dataclasses.asdict(config))

    @property
    def num_hidden_layers(self) -> int:
        """Layers that have weights, each once."""
        return int(self.prelude_layers + self.core_layers + self.coda_layers)

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `config.json` as `MythosConfig` reads it: every field, and no other."""
        del use_diff
        return self.mythos.to_json()
