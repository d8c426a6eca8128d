"""A model's tokenizer as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from openmythos.config import CONFIG_FILE, MythosConfig
from openmythos.inference.shipped import find_model
from openmythos.training.tokenizer import Tokenizer


class OpenMythosTokenizer(PreTrainedTokenizerFast):  # type: ignore[misc]  # no types there
    """Byte-level BPE whose one mark starts a text, ends it and pads it.

    A text's ids are those that models are trained on: behind the mark, which is put first unless
    `add_special_tokens=False`. The mark written out in a text is text, unless
    `split_special_tokens=False`. Prompts of a batch are padded on the left.
    """

    padding_side = "left"
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - as transformers has it

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **given: Any
    ) -> OpenMythosTokenizer:
        """Read the tokenizer of a folder, of a model in the package, or of the hub.

        Raises:
            TokenizerError: it is none of ours: it loses text, or has no mark.
        """
        folder = find_model(pretrained_model_name_or_path)
        where = folder if folder.is_dir() else pretrained_model_name_or_path
        made: OpenMythosTokenizer = super().from_pretrained(where, *args, **given)
        own = Tokenizer(Backend.from_str(made.backend_tokenizer.to_str()))  # it checks
        if made.init_kwargs.get("split_special_tokens") is None:
            made.init_kwargs["split_special_tokens"] = made.split_special_tokens = True
            made.backend_tokenizer.encode_special_tokens = True
        if made.model_max_length >= VERY_LARGE_INTEGER and (folder / CONFIG_FILE).is_file():
            made.model_max_length = MythosConfig.load(folder).max_length
        mark = own.end_mark
        for name in ("bos_token", "eos_token", "pad_token"):
            if getattr(made, name) is None:
                setattr(made, name, mark)
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{mark} $A", pair=f"{mark} $A {mark} $B", special_tokens=[(mark, own.end_id)]
        )
        return made

    def apply_chat_template(
        self, *args: Any, tokenizer_kwargs: dict[str, Any] | None = None, **given: Any
    ) -> Any:
        """Write a conversation as its template has it, whose marks are tokens."""
        marked = {"split_special_tokens": False, **(tokenizer_kwargs or {})}
        return super().apply_chat_template(*args, tokenizer_kwargs=marked, **given)
