"""Our models in Hugging Face's transformers: `import openmythos.huggingface`, and its classes know them.

`AutoConfig`, `AutoTokenizer` and `AutoModelForCausalLM` then read a model's folder, as do
`pipeline`, `Trainer` and PEFT, which all take what those return. Needs the extra `hf`.
"""  # noqa: E501

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "transformers must be installed: pip install 'transformers>=5.24,<6'"
    ) from error

from openmythos.huggingface.adapters import adapter_targets
from openmythos.huggingface.cache import OpenMythosCache
from openmythos.huggingface.config import OpenMythosConfig
from openmythos.huggingface.model import OpenMythosForCausalLM, OpenMythosOutput
from openmythos.huggingface.tokenizer import OpenMythosTokenizer
from openmythos.huggingface.training import BalanceRouters

AutoConfig.register(OpenMythosConfig.model_type, OpenMythosConfig)
AutoTokenizer.register(OpenMythosConfig, fast_tokenizer_class=OpenMythosTokenizer)
AutoModelForCausalLM.register(OpenMythosConfig, OpenMythosForCausalLM)

# By this table a Trainer knows that labels are shifted by one.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[OpenMythosConfig.model_type] = OpenMythosForCausalLM.__name__

__all__ = [
    "BalanceRouters",
    "OpenMythosCache",
    "OpenMythosConfig",
    "OpenMythosForCausalLM",
    "OpenMythosOutput",
    "OpenMythosTokenizer",
    "adapter_targets",
]
