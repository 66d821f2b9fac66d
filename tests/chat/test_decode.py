"""The lean loop gives what transformers gives; the sampler obeys its settings."""

from __future__ import annotations

from collections import Counter

import torch

from backend.chat.decode import Decoder, Sampler, generate, stop_token_ids, time_generation
from tests.evaluate.tiny import make_model


def test_greedy_equals_transformers_generate() -> None:
    model = make_model()
    prompt = [0, 17, 45, 201, 88]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    eos = stop_token_ids(model, None)
    ours = list(generate(model, prompt, Sampler(), max_new_tokens=40, stop_ids=eos))
    assert ours == [token for token in expected if token not in eos]


def test_cached_logits_equal_a_full_forward_pass() -> None:
    model = make_model()
    ids = [0, 5, 9, 250, 31, 7]
    decoder = Decoder(model)
    decoder.feed(ids[:3])
    for end in range(4, len(ids) + 1):
        step = decoder.feed([ids[end - 1]])
        whole = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


def test_generation_ends_at_the_stop_token_and_when_cancelled() -> None:
    model = make_model()
    tokens = list(generate(model, [0, 4], Sampler(), max_new_tokens=10, stop_ids=[]))
    assert len(tokens) == 10
    first_of_its_kind = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 0)
    stopped = list(generate(model, [0, 4], Sampler(), max_new_tokens=10, stop_ids=[tokens[first_of_its_kind]]))
    assert stopped == tokens[:first_of_its_kind]
    answers = iter([False, False, True])
    cancelled = generate(model, [0, 4], Sampler(), max_new_tokens=10, stop_ids=[], cancelled=lambda: next(answers))
    assert list(cancelled) == tokens[:2]


def test_stop_ids_come_from_generation_config_and_tokenizer() -> None:
    model = make_model()
    model.generation_config.eos_token_id = [1, 42]
    assert stop_token_ids(model, 7) == {1, 42, 7}
    assert stop_token_ids(model, None) == {1, 42}


def test_sampler_draws_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    sampler = Sampler(temperature=1.0, seed=5)
    drawn = Counter(sampler(logits) for _ in range(6000))
    for token, probability in enumerate([0.1, 0.6, 0.3]):
        assert abs(drawn[token] / 6000 - probability) < 0.025  # four standard errors


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    assert {Sampler(1.0, 0.59, seed)(logits) for seed in range(200)} == {1}
    assert {Sampler(1.0, 0.85, seed)(logits) for seed in range(200)} == {1, 2}
    assert {Sampler(1.0, 1.0, seed)(logits) for seed in range(200)} == {0, 1, 2}


def test_close_distributions_with_one_seed_draw_the_same_tokens() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = Sampler(1.0, 0.9, seed=3), Sampler(1.0, 0.9, seed=3)
    same = 0
    for _ in range(300):
        logits = 3 * torch.randn(50, generator=random)
        same += a(logits) == b(logits + 0.01 * torch.randn(50, generator=random))
    assert same > 285


def test_timing_is_of_the_asked_work() -> None:
    model = make_model()
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    timing = time_generation(model, prompt_tokens=12, new_tokens=4, seed=0)
    assert seen == [12, 1, 1, 1, 1]
    assert timing.prefill_s > 0 and timing.decode_s > 0
