"""A cache under any sequence of calls gives what one call without it gives."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.testing import assert_close

from openmythos import MythosConfig, OpenMythos

LONGEST = 12
MODELS = {
    attention: OpenMythos(
        MythosConfig(
            vocab_size=29,
            hidden_size=16,
            max_length=LONGEST,
            num_heads=2,
            core_layers=1,
            mean_loops=2,
            attention=attention,
            kv_latent=8,
            rope_dim=4,
            nope_dim=6,
            value_dim=6,
            experts=3,
            experts_per_token=2,
            expert_size=8,
        )
    )
    .to(torch.float64)
    .eval()
    for attention in ("gqa", "mla")
}


class CachedCalls(RuleBasedStateMachine):
    """Two sequences that grow by chunks of unequal real length, at any depth, and roll back."""

    @initialize(attention=st.sampled_from(sorted(MODELS)), slots=st.integers(1, 4))
    def start(self, attention, slots):
        self.model = MODELS[attention]
        self.cache = self.model.new_cache(2, LONGEST, loops=slots)
        self.token_ids = [[], []]
        self.loops = [[], []]
        self.logits = [[], []]

    def room(self):
        return LONGEST - max(len(ids) for ids in self.token_ids)

    @precondition(lambda self: self.room() > 0)
    @rule(data=st.data())
    def append(self, data):
        sequence = data.draw(st.integers(1, min(4, self.room())))
        loops = torch.tensor(
            data.draw(
                st.lists(
                    st.lists(st.integers(1, 5), min_size=sequence, max_size=sequence),
                    min_size=2,
                    max_size=2,
                )
            )
        )
        padding = data.draw(st.lists(st.integers(0, sequence - 1), min_size=2, max_size=2))
        mask = torch.ones(2, sequence, dtype=torch.bool)
        for row, count in enumerate(padding):
            mask[row, sequence - count :] = False
        seed = data.draw(st.integers(0, 10))
        ids = torch.randint(0, 29, (2, sequence), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            out = self.model(ids, loops, cache=self.cache, mask=mask)
        for row in range(2):
            real = mask[row]
            self.token_ids[row] += ids[row][real].tolist()
            self.loops[row] += loops[row][real].tolist()
            self.logits[row] += list(out.logits[row][real])
            assert out.loops[row][real].tolist() == loops[row][real].tolist()

    @precondition(lambda self: any(self.token_ids))
    @rule(data=st.data())
    def roll_back(self, data):
        counts = [data.draw(st.integers(0, len(ids))) for ids in self.token_ids]
        self.cache.rollback(counts)
        for row, count in enumerate(counts):
            for kept in (self.token_ids, self.loops, self.logits):
                kept[row] = kept[row][: len(kept[row]) - count]

    @invariant()
    def equals_one_call_without_a_cache(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths == [len(ids) for ids in self.token_ids]
        for ids, loops, logits in zip(self.token_ids, self.loops, self.logits, strict=True):
            if ids:
                with torch.no_grad():
                    alone = self.model(torch.tensor([ids]), torch.tensor([loops])).logits[0]
                assert_close(torch.stack(logits), alone, atol=1e-9, rtol=0)


TestAnyCallsOnACache = CachedCalls.TestCase
TestAnyCallsOnACache.settings = settings(
    max_examples=15,
    stateful_step_count=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.soak
def test_many_more_calls_on_a_cache():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        CachedCalls,
        settings=settings(
            max_examples=1500,
            stateful_step_count=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
