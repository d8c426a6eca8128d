"""The named sizes are what their names say."""

import pytest
import torch

from openmythos.config import MythosConfig
from openmythos.errors import ConfigError
from openmythos.model.transformer import OpenMythos
from openmythos.scales import SCALES

NAMED = {"1b": 1e9, "3b": 3e9, "10b": 1e10, "50b": 5e10, "100b": 1e11, "500b": 5e11, "1t": 1e12}


def on_meta(name):
    with torch.device("meta"):
        return OpenMythos(MythosConfig.preset(name))


def test_there_are_seven_large_scales_and_three_small_ones():
    assert list(SCALES) == ["nano", "tiny", "small", *NAMED]


@pytest.mark.parametrize("name", NAMED)
def test_a_scale_has_the_parameters_of_its_name_within_5_percent(name):
    total = sum(p.numel() for p in on_meta(name).parameters())
    assert total == pytest.approx(NAMED[name], rel=0.05)


@pytest.mark.parametrize("name", ["100b", "500b", "1t"])
def test_scales_from_100b_on_take_a_million_tokens(name):
    assert MythosConfig.preset(name).max_length == 1_000_000


@pytest.mark.parametrize("name", SCALES)
def test_most_layers_stand_in_the_core_and_rows_are_aligned_for_grouped_products(name):
    config = MythosConfig.preset(name)
    assert config.core_layers >= config.prelude_layers + config.coda_layers
    assert config.expert_size % 8 == 0
    assert config.hidden_size % 8 == 0


@pytest.mark.parametrize("name", SCALES)
def test_operations_per_loop_are_those_of_active_parameters(name):
    # 2 operations for each weight that a token meets, with no keys to look at.
    model = on_meta(name)
    c, active = model.config, 0
    for part, parameter in model.core.named_parameters():
        routed = ".router." not in part and "feed_forward.w_" in part and parameter.ndim == 3
        share = c.experts_per_token / c.experts if routed else 1
        if "layers" in part and parameter.ndim > 1 and "scale" not in part:
            active += share * parameter.numel()
    assert model.core.flops(keys=0) == pytest.approx(2 * active, rel=1e-3)


def test_sizes_that_nobody_set_follow_the_others():
    nano = MythosConfig.preset("nano")
    wide = nano.replace(hidden_size=2048, num_heads=16, kv_heads=None)
    fresh = MythosConfig(**{**SCALES["nano"], "hidden_size": 2048, "num_heads": 16, "kv_heads": 16})
    assert wide == fresh
    assert wide.replace(hidden_size=128).logit_scale == 1
    assert nano.replace(head_dim=48, hidden_size=256).replace(hidden_size=128).head_dim == 48
    with pytest.raises(ConfigError, match="num_heads=3 must divide hidden_size=32"):
        nano.replace(hidden_size=32, num_heads=3)
    with pytest.raises(ConfigError, match=r"routed_scale=nan must be a finite number"):
        nano.replace(routed_scale=float("nan"))


CHANGES = {"hidden_size": 256, "num_heads": 16, "mean_loops": 5, "feed_forward": "relu2"}


@pytest.mark.parametrize("name", SCALES)
def test_sizes_that_nobody_set_follow_the_others_of_a_config_that_was_saved(name):
    fresh = MythosConfig.preset(name).replace(num_heads=8, kv_heads=None)
    read = MythosConfig.from_json(fresh.to_json())
    assert read == fresh
    for more in range(1, len(CHANGES) + 1):
        changes = dict(list(CHANGES.items())[:more])
        assert read.replace(**changes) == fresh.replace(**changes)


def test_sizes_that_somebody_set_stay_in_a_config_that_was_saved():
    own = {"head_dim": 22, "kv_heads": 1, "feed_forward_size": 80, "lora_loops": 2}
    own |= {"embedding_scale": 3.0, "logit_scale": 0.25}
    set_by_hand = MythosConfig(hidden_size=68, num_heads=3, **own)  # 3 do not divide 68
    read = MythosConfig.from_json(set_by_hand.to_json()).replace(hidden_size=256, mean_loops=3)
    assert {name: getattr(read, name) for name in own} == own


@pytest.mark.parametrize("name", SCALES)
def test_a_pass_on_meta_has_its_shape(name):
    with torch.device("meta"):
        model = OpenMythos(MythosConfig.preset(name))
        token_ids = torch.zeros(2, 5, dtype=torch.int64)
        cache = model.new_cache(batch_size=2, max_length=8)
        assert model(token_ids, 3, cache=cache).logits.shape == (2, 5, model.config.vocab_size)
    assert cache.length == 5
