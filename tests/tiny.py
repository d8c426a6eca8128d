"""Models small enough to compare with plain loops, with weights that make every part matter."""

import torch

from openmythos.config import MythosConfig
from openmythos.model.transformer import OpenMythos

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "max_length": 64,
    "num_heads": 6,
    "kv_heads": 2,
    "head_dim": 8,
    "kv_latent": 12,
    "rope_dim": 4,
    "nope_dim": 6,
    "value_dim": 10,
    "core_layers": 2,
    "mean_loops": 3,
    "feed_forward_size": 40,
    "experts": 5,
    "experts_per_token": 2,
    "expert_size": 16,
}


def tiny(*, seed=0, spread=0.3, dtype=torch.float32, **changes):
    """A model of a few thousand parameters whose vectors, too, differ from their first values."""
    model = OpenMythos(MythosConfig(**{**SIZES, **changes}), seed=seed).eval()
    if spread:
        shake(model, seed=seed, spread=spread)
    return model.to(dtype)


@torch.no_grad()
def shake(model, *, seed=0, spread=0.3):
    """Move norms, biases, LoRA, gates and the injection away from their first values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("core.gate."):
            continue
        if parameter.ndim < 2 or name.endswith(("lora.up", "_scale", "_bias", "injection.weight")):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += (spread * noise).to(parameter.dtype)
    for exit_ in model.core.learned_exits().values():
        exit_.bias.fill_(-0.5)
    gate, own = model.core.gate, torch.Generator().manual_seed(seed)
    gate.weight.normal_(0, spread, generator=own)
    if gate.size:
        gate.w_in.normal_(0, spread, generator=own)


def some_ids(batch=2, sequence=7, *, vocab=SIZES["vocab_size"], seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, sequence), generator=generator)


def some_loops(*shape, most=5, seed=0):
    """Loops for each sequence or token, from 1 to `most`, both of them among these."""
    loops = torch.randint(1, most + 1, shape, generator=torch.Generator().manual_seed(seed))
    flat = loops.view(-1)
    flat[0], flat[-1] = most, 1
    return loops


def in_parts(model, token_ids, sizes, loops, cache, **options):
    """Read `token_ids` in parts of these sizes; return logits and loops of the whole."""
    outs, at = [], 0
    for size in sizes:
        part = slice(at, at + size)
        budget = loops[:, part] if isinstance(loops, torch.Tensor) and loops.ndim == 2 else loops
        outs.append(model(token_ids[:, part], budget, cache=cache, **options))
        at += size
    return torch.cat([out.logits for out in outs], 1), torch.cat([out.loops for out in outs], 1)
