"""Generation equals what it abbreviates: the whole sequence computed anew for every token."""

import pytest
import torch
from tiny import some_ids, tiny
from typecheck import unchecked

from openmythos.errors import InputError
from openmythos.inference.generate import generate
from openmythos.inference.noise import draw_at
from openmythos.inference.sampling import Sampling
from openmythos.inference.thinking import Thinking

GREEDY = Sampling(temperature=0)


def written(model, token_ids, count=6, **options):
    """Token ids and loops of a whole generation, `(batch, new)` each."""
    new = list(generate(model, token_ids, max_new_tokens=count, **options))
    return torch.stack([n.token_ids for n in new], 1), torch.stack([n.loops for n in new], 1)


def written_without_cache(model, token_ids, thinking, count=6):
    new, taken = [], []
    for _ in range(count):
        out = model(
            token_ids, thinking.loops, halting=thinking.halting, threshold=thinking.threshold
        )
        token = out.logits[:, -1].argmax(-1)
        new.append(token)
        taken.append(out.loops[:, -1])
        token_ids = torch.cat([token_ids, token.unsqueeze(1)], 1)
    return torch.stack(new, 1), torch.stack(taken, 1)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize(
    "thinking",
    [
        Thinking(loops=1),
        Thinking(loops=4),
        Thinking(loops=7, halting="delta", threshold=0.45),
        Thinking(loops=7, halting="gate", threshold=0.4),
        Thinking(loops=7, halting="kl", threshold=0.015),
    ],
)
def test_greedy_text_equals_that_of_calls_without_a_cache(attention, thinking):
    # float64, because near ties of the logits may fall otherwise in fp32.
    model = tiny(attention=attention, dtype=torch.float64)
    token_ids = some_ids(batch=4, sequence=5)
    tokens, loops = written(model, token_ids, thinking=thinking, sampling=GREEDY)
    expected, taken = written_without_cache(model, token_ids, thinking)
    assert tokens.tolist() == expected.tolist()
    assert loops.tolist() == taken.tolist()
    if thinking.halting in ("delta", "gate"):
        assert len(loops.unique()) > 1  # or the case would show nothing


def test_default_depth_is_the_models_mean():
    model = tiny(mean_loops=3)
    _, loops = written(model, some_ids(), sampling=GREEDY)
    assert set(loops.flatten().tolist()) == {3}


def test_a_seed_repeats_a_text_and_another_does_not():
    model, token_ids = tiny(), some_ids()
    texts = [
        written(model, token_ids, 12, sampling=Sampling(temperature=2.0, seed=seed))[0].tolist()
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_rows_are_drawn_by_seed_row_and_place_behind_their_own_prompt():
    model, sampling = tiny(), Sampling(temperature=2.0, seed=1)
    batch, mask = some_ids(2, 5), torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    tokens, _ = written(model, batch, 3, sampling=sampling, mask=mask)
    for row, prompt in enumerate([batch[0].tolist(), batch[1, 2:].tolist()]):
        for token in tokens[row].tolist():
            logits = model(torch.tensor([prompt])).logits[0, -1]
            assert token == draw_at(logits, sampling, 1, row, len(prompt))
            prompt.append(token)


def test_without_a_seed_torchs_own_generator_decides():
    model, token_ids, texts = tiny(), some_ids(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(written(model, token_ids, 12, sampling=Sampling(temperature=2.0))[0].tolist())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("halting", ["none", "delta"])
def test_unequal_prompts_in_a_batch_are_continued_as_alone(side, halting):
    model = tiny(dtype=torch.float64)
    threshold = None if halting == "none" else 0.45
    thinking = Thinking(loops=5, halting=halting, threshold=threshold)
    prompts = [some_ids(1, length, seed=length)[0] for length in (3, 7, 5)]
    batch = torch.zeros(3, 7, dtype=torch.int64)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(7 - len(prompt), 7)
        batch[row, place], mask[row, place] = prompt, True
    together = written(model, batch, thinking=thinking, sampling=GREEDY, mask=mask)
    alone = [
        written(model, prompt.unsqueeze(0), thinking=thinking, sampling=GREEDY)
        for prompt in prompts
    ]
    for part in (0, 1):  # tokens, loops
        assert together[part].tolist() == [one[part][0].tolist() for one in alone]


def test_the_one_slot_cache_writes_and_is_smaller():
    model, token_ids = tiny(), some_ids()
    tokens, _ = written(
        model, token_ids, thinking=Thinking(loops=3, cache_policy="last"), sampling=GREEDY
    )
    assert tokens.shape == (2, 6)
    prompt_only, _ = written(model, token_ids, thinking=Thinking(loops=3), sampling=GREEDY)
    assert tokens[:, 0].tolist() == prompt_only[:, 0].tolist()  # the prompt keeps all loops


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_a_rule_has_no_more_slots_than_its_tokens_take_loops(monkeypatch, policy):
    model, caches = tiny(), []
    made = model.new_cache

    def kept(*sizes, **options):
        caches.append(made(*sizes, **options))
        return caches[-1]

    monkeypatch.setattr(model, "new_cache", kept)
    thinking = Thinking(loops=500, halting="delta", threshold=0.45, cache_policy=policy)
    written(model, some_ids(), thinking=thinking)
    assert caches[0].slots < 100


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer of 1 or more"),
        (
            {"max_new_tokens": 58},
            "max_new_tokens=58 after a prompt of 7 tokens must end by max_length=64: at most 57",
        ),
        ({"thinking": Thinking(loops=0)}, "loops=0 must be 1 or more"),
        ({"thinking": Thinking(loops=-3)}, "loops=-3 must be 1 or more"),
        (
            {"thinking": Thinking(threshold=0.5)},
            "threshold=0.5 must be left out with halting='none'",
        ),
        (
            {"thinking": Thinking(halting="gate", threshold=2.0)},
            "threshold=2.0 must be above 0 and at most 1",
        ),
        (
            {"thinking": Thinking(halting="act")},
            "halting='act' needs a model trained with it",
        ),
        ({"token_ids": some_ids()[0]}, "token_ids has shape (7,), must be (batch, sequence)"),
        ({"token_ids": [[1, 2]]}, "token_ids is list, must be a torch.Tensor"),
        ({"token_ids": some_ids() + 50}, "token_ids holds "),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, "mask has shape (2, 6), must be (2, 7)"),
        (
            {"mask": torch.tensor([[True] * 7, [False] * 7])},
            "mask marks no token of prompt 1: each must have one at least",
        ),
        ({"vocab_size": 0}, "vocab_size=0 must be an integer of 1 or more"),
        ({"vocab_size": 2.5}, "vocab_size=2.5 must be an integer of 1 or more"),
    ],
)
def test_what_cannot_be_written_is_refused(options, sentence):
    asked = {"token_ids": some_ids(), "max_new_tokens": 4, **options}
    with unchecked(), pytest.raises(InputError) as error:
        generate(tiny(), **asked)
    assert str(error.value).startswith(sentence)


def test_loops_of_each_prompt_are_refused():
    with unchecked(), pytest.raises(InputError, match="must be an integer, the budget of every"):
        generate(
            tiny(), some_ids(), max_new_tokens=4, thinking=Thinking(loops=torch.tensor([3, 3]))
        )
