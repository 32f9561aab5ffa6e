"""Rows that come and go: identity, memory, adapters side by side, labels, several callers, failures."""

import json
import random
import threading
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from selfguide_ray.config import Student
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, SamplingParams, make_engine
from selfguide_ray.engine.transformers import TransformersEngine

VOCABULARY = 4096
GIB = 1 << 30
KV_BYTES = 2 * 2 * 2 * 16 * 4  # of a token: layers, keys and values, heads, width, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose text varies."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2600, initializer_range=0.3, eos_token_id=1, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("embedded/nano")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def start(folder, **student) -> TransformersEngine:
    return make_engine(Student(model=str(folder), **student), load().cluster)


def room_for(tokens):
    """The setting with room for so many tokens, less the eighth that passes need."""
    return (tokens + 0.5) * KV_BYTES * 8 / 7 / GIB


def asked(count, params, prefixes=3, prefix=40, suffixes=(1, 20), adapters=(None,), seed=0):
    """Requests of a few prefixes, in random order."""
    rng = random.Random(seed)
    heads = [tuple(rng.randrange(3, VOCABULARY) for _ in range(prefix)) for _ in range(prefixes)]
    return [
        Request(
            heads[i % prefixes], tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(*suffixes))),
            params, seed=rng.getrandbits(60), adapter=adapters[i % len(adapters)],
        )
        for i in range(count)
    ]  # fmt: skip


def ids(answers):
    return [[completion.ids for completion in several] for several in answers]


def with_logprobs(answers):
    return [[(completion.ids, completion.logprob) for completion in several] for several in answers]


# --- row identity


def test_text_is_the_same_whatever_the_batch_and_the_order(folder):
    requests = asked(150, SamplingParams(n=2, temperature=1.0, max_new_tokens=10))
    first = ids(start(folder).generate(requests))
    order = list(range(150))
    random.Random(1).shuffle(order)
    small = start(folder, batch_rows=5)
    shuffled = {}
    for part in (order[:7], order[7:100], order[100:]):
        shuffled |= dict(zip(part, ids(small.generate([requests[i] for i in part])), strict=True))
    assert [shuffled[i] for i in range(150)] == first
    assert len({text for several in first for text in several}) == 300


def test_strict_mode_is_the_same_bit_for_bit(folder):
    requests = asked(60, SamplingParams(temperature=1.0, max_new_tokens=90))
    whole = with_logprobs(start(folder, strict=True, batch_rows=8).generate(requests))
    engine = start(folder, strict=True, batch_rows=8)
    order = list(range(60))
    random.Random(1).shuffle(order)
    found = {}
    for part in (order[:1], order[1:30], order[30:]):
        for i, several in zip(part, with_logprobs(engine.generate([requests[i] for i in part])), strict=True):
            found[i] = several
    assert [found[i] for i in range(60)] == whole
    usual = ids(start(folder).generate(requests))
    assert usual == [[text for text, _ in several] for several in whole]


def test_callers_in_several_threads_share_the_batch_and_get_their_own(folder):
    engine = start(folder, batch_rows=16)
    params = SamplingParams(temperature=1.0, max_new_tokens=20)
    parts = [asked(n, params, seed=n) for n in (40, 3, 25, 1)]
    expected = [ids(start(folder).generate(part)) for part in parts]
    alone = engine.counters.copy()
    found = [None] * len(parts)

    def call(i):
        found[i] = ids(engine.generate(parts[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert engine.counters.since(alone).requests == 69


def test_sampling_follows_the_distribution_of_generate(folder, reference):
    """Chi-square of 20,000 first tokens against the softmax that `generate` samples from."""
    request = asked(1, SamplingParams(n=20_000, temperature=0.8, top_k=8, max_new_tokens=1))[0]
    counts = Counter(c.ids[0] if c.ids else 1 for c in start(folder, batch_rows=512).generate([request])[0])
    logits = reference(torch.tensor([request.prefix + request.suffix])).logits[0, -1]
    values, tokens = logits.topk(8)
    shares = (values.double() / 0.8).softmax(-1).tolist()
    expected = {token: 20_000 * share for token, share in zip(tokens.tolist(), shares, strict=True)}
    assert set(counts) <= set(expected)
    pooled = sum(e for e in expected.values() if e < 5)
    chi_square = sum((counts[t] - e) ** 2 / e for t, e in expected.items() if e >= 5)
    assert pooled < 20
    assert chi_square < 24.3  # 99.9 % quantile with 7 degrees of freedom
    torch.manual_seed(0)
    drawn = reference.generate(
        torch.tensor([request.prefix + request.suffix]), do_sample=True, temperature=0.8, top_k=8, top_p=1.0,
        max_new_tokens=1, num_return_sequences=4000, pad_token_id=0,
    )[:, -1].tolist()  # fmt: skip
    theirs = Counter(drawn)
    two_sample = sum(
        (counts[t] / 5 - theirs[t]) ** 2 / (expected[t] / 5 * 1.2) for t, e in expected.items() if e / 5 >= 5
    )
    assert two_sample < 24.3


# --- memory


def test_keys_and_values_stay_within_the_setting(folder):
    """300 requests with a prefix of their own; room for four of them."""
    setting = room_for(4 * 700)
    engine = start(folder, kv_memory_gib=setting)
    requests = asked(60, SamplingParams(max_new_tokens=6), prefixes=60, prefix=600)
    held = []
    original = engine._advance

    def watch(row, token):
        batch = engine.batch
        held.append(batch.prefixes.tokens + batch.store.rows * batch.store.tokens)
        original(row, token)

    engine._advance = watch
    found = ids(engine.generate(requests))
    assert max(held) <= engine.bounds.tokens == 4 * 700
    assert found == ids(start(folder).generate(requests))


def test_rows_that_outgrow_the_memory_wait_and_go_on(folder):
    params = SamplingParams(temperature=1.0, max_new_tokens=400)
    requests = asked(12, params, prefixes=1)
    engine = start(folder, kv_memory_gib=room_for(1000))
    put_back = []
    found = None
    engine.generate(requests[:1])
    release = engine.batch._release
    engine.batch._release = lambda row: (put_back.append(not row.finish_reason), release(row))
    found = engine.generate(requests)
    assert any(put_back)
    assert ids(found) == ids(start(folder).generate(requests))
    assert max(len(c.ids) for (c,) in found) > 200


def test_what_cannot_fit_is_a_verdict(folder):
    engine = start(folder, kv_memory_gib=room_for(600))
    params = SamplingParams(n=2, max_new_tokens=5)
    large, small = asked(1, params, prefix=700)[0], asked(1, params, prefix=30)[0]
    answers = engine.generate([large, small])
    assert [c.finish_reason for c in answers[0]] == ["too_long"] * 2
    assert ids(answers[1:]) == ids(start(folder).generate([small]))
    assert engine.batch is None or engine.batch.idle  # none where the failure came last
    assert not engine.batch.prefixes.needed


def test_many_samples_of_one_prompt_come_in_as_they_fit(folder):
    params = SamplingParams(n=50, temperature=1.0, max_new_tokens=4)
    requests = asked(2, params)
    tight = start(folder, batch_rows=12, kv_memory_gib=room_for(700)).generate(requests)
    assert ids(tight) == ids(start(folder).generate(requests))


def test_a_common_head_is_computed_once_and_counted_as_cached(folder):
    engine = start(folder)
    rng = random.Random(0)
    head, tails = tuple(rng.randrange(3, VOCABULARY) for _ in range(300)), [(5, 6, 7), (8, 9, 10, 11)]
    answers = engine.generate([Request(head + tail, (4,), SamplingParams(max_new_tokens=2)) for tail in tails])
    cached = sorted(completion.cached_tokens for (completion,) in answers)
    assert cached == [0, 256]  # whole chunks of 128
    again = engine.generate([Request(head + tails[0], (4,), SamplingParams(n=3, max_new_tokens=2))])[0]
    assert [c.cached_tokens for c in again] == [303, 303, 303]  # each sample computes the last token of its prompt
    assert engine.counters.cached_tokens == 256 + 3 * 303


def test_counters_tell_what_was_done(folder):
    engine = start(folder, batch_rows=4)
    answers = engine.generate(asked(10, SamplingParams(n=2, max_new_tokens=5)))
    counters = engine.counters
    assert counters.requests == 10
    assert counters.generated_tokens == sum(c.generated_tokens for several in answers for c in several)
    assert counters.prompt_tokens == sum(c.prompt_tokens for several in answers for c in several)
    assert 0 < counters.rows <= counters.places == counters.steps * 4
    assert counters.ideal_seconds > 0
    assert counters.busy_seconds > 0


# --- adapters


def adapter(model_folder, folder, seed, **given):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **given}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


def plain_peft(folder, request):
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, request.adapter).eval() if request.adapter else base
    prompt = request.prefix + request.suffix
    answer = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=request.params.max_new_tokens, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    return tuple(answer[:-1] if answer[-1] == 1 else answer)


def test_adapters_side_by_side_answer_as_plain_peft_does(folder, tmp_path):
    kinds = [
        {}, {"r": 7}, {"target_modules": ["q_proj", "down_proj"]}, {"use_rslora": True}, {"lora_alpha": 1},
        {"use_dora": True}, {"target_modules": ["lm_head", "v_proj"]},
    ]  # fmt: skip
    folders = [adapter(folder, tmp_path / str(i), i, **kind) for i, kind in enumerate(kinds)]
    requests = asked(24, SamplingParams(max_new_tokens=8), prefixes=24, adapters=(None, *folders))
    engine = start(folder, max_adapters=3)
    assert [engine._model_of(name) for name in folders] == ["", "", "", "", "", folders[5], folders[6]]
    found = ids(engine.generate(requests))
    assert found == [[plain_peft(folder, request)] for request in requests]
    assert len({texts[0] for texts in found}) == 24
    assert ids(engine.generate(requests[::-1]))[::-1] == found
    assert len(engine.adapters.places) == 3


def test_an_adapter_changes_only_its_own_rows(folder, tmp_path):
    name = adapter(folder, tmp_path / "a", 3)
    plain = asked(6, SamplingParams(max_new_tokens=8), prefixes=1)
    mixed = [r for p in plain for r in (p, Request(p.prefix, p.suffix, p.params, p.seed, name))]
    engine = start(folder)
    found = ids(engine.generate(mixed))
    assert found[::2] == ids(start(folder).generate(plain))
    assert all(a != b for a, b in zip(found[::2], found[1::2], strict=True))


def test_tuned_weights_take_the_place_of_the_base(folder, tmp_path):
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    requests = asked(6, SamplingParams(max_new_tokens=6), adapters=(None, str(tmp_path)))
    found = ids(start(folder).generate(requests))
    assert found[::2] == ids(start(folder).generate(requests[::2]))
    expected = [
        model.eval().generate(torch.tensor([r.prefix + r.suffix]), max_new_tokens=6, do_sample=False, pad_token_id=0)
        for r in requests[1::2]
    ]
    assert [texts[0] for texts in found[1::2]] == [
        tuple(e[0, len(r.prefix + r.suffix) :].tolist()) for e, r in zip(expected, requests[1::2], strict=True)
    ]


# --- labels

LABELS = ((11, 12, 13, 1), (11, 12, 1), (14, 1), (15, 16, 17, 18, 1))


def true_probabilities(model, prompt):
    scores = []
    for label in LABELS:
        logprobs = model(torch.tensor([[*prompt, *label]])).logits[0].log_softmax(-1).double()
        scores.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(label)))
    return torch.tensor(scores, dtype=torch.double)


@pytest.mark.parametrize("strict", [False, True])
def test_scores_of_labels_equal_full_forward_passes(folder, reference, strict):
    requests = asked(20, SamplingParams(labels=LABELS, label_mode="score"))
    for request, (completion,) in zip(requests, start(folder, strict=strict).generate(requests), strict=True):
        scores = true_probabilities(reference, request.prefix + request.suffix)
        assert completion.label_probabilities == pytest.approx(scores.softmax(-1).tolist(), abs=1e-4)
        best = int(scores.argmax())
        assert completion.ids == LABELS[best][:-1]
        assert completion.logprob == pytest.approx(scores[best].item(), abs=1e-3)
        assert completion.probability == completion.label_probabilities[best]
        assert completion.finish_reason == "stop"


def test_labels_are_drawn_by_their_scores(folder, reference):
    request = asked(1, SamplingParams(n=4000, temperature=2.0, labels=LABELS, label_mode="score"))[0]
    answers = start(folder).generate([request])[0]
    scores = true_probabilities(reference, request.prefix + request.suffix)
    counts = Counter(c.ids for c in answers)
    for label, share in zip(LABELS, (scores / 2).softmax(-1).tolist(), strict=True):
        assert counts[label[:-1]] / 4000 == pytest.approx(share, abs=0.035)


def walked(model, prompt, label):
    """The label's probability token by token among what the labels leave open."""
    probability, logprob = 1.0, 0.0
    for i, token in enumerate(label):
        open_ = sorted({other[i] for other in LABELS if other[:i] == label[:i]})
        logits = model(torch.tensor([[*prompt, *label[:i]]])).logits[0, -1].double()
        probability *= logits[open_].softmax(-1)[open_.index(token)].item()
        logprob += logits.log_softmax(-1)[token].item()
    return probability, logprob


def test_decoding_stays_within_the_labels_and_tells_their_probability(folder, reference):
    requests = asked(10, SamplingParams(n=4, temperature=1.5, labels=LABELS))
    mixed = [*requests, *asked(10, SamplingParams(max_new_tokens=5), seed=3)]
    answers = start(folder).generate(mixed)
    said = {completion.ids for several in answers[:10] for completion in several}
    assert said <= {label[:-1] for label in LABELS}
    assert len(said) > 1
    for request, several in zip(requests, answers[:10], strict=True):
        for completion in several:
            label = (*completion.ids, 1)
            probability, logprob = walked(reference, request.prefix + request.suffix, label)
            assert completion.probability == pytest.approx(probability, abs=1e-4)
            assert completion.logprob == pytest.approx(logprob, abs=1e-3)
    assert ids(answers[10:]) == ids(start(folder).generate(mixed[10:]))


@pytest.mark.parametrize("labels", [((5, 6), (5, 6, 7)), ((5,), (5,)), ((),)])
def test_labels_that_cannot_be_told_apart_are_refused(labels):
    with pytest.raises(ValueError, match="begin another"):
        SamplingParams(labels=labels)


def test_the_likeliest_tokens_are_reported(folder, reference):
    request = asked(1, SamplingParams(max_new_tokens=4, logprobs=3))[0]
    ((completion,),) = start(folder).generate([request])
    text = [*request.prefix, *request.suffix, *completion.ids]
    logprobs = reference(torch.tensor([text])).logits[0].log_softmax(-1)
    for i, told in enumerate(completion.logprobs):
        values, tokens = logprobs[len(request.prefix + request.suffix) - 1 + i].topk(3)
        assert [token for token, _ in told] == tokens.tolist()
        assert [value for _, value in told] == pytest.approx(values.tolist(), abs=1e-3)


# --- failures


def test_a_failing_step_fails_its_calls_and_not_the_next(folder, tmp_path):
    engine = start(folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    requests = asked(4, SamplingParams(max_new_tokens=3), adapters=(None, str(broken)))
    with pytest.raises(Exception, match=r"Repo id|not found"):
        engine.generate(requests)
    assert ids(engine.generate(requests[:1])) == ids(start(folder).generate(requests[:1]))


def test_a_failing_call_fails_alone(folder, tmp_path):
    """Whoever leads when a step fails, only the call with the broken adapter raises."""
    broken = adapter(folder, tmp_path / "broken", 0)
    (tmp_path / "broken" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))  # without its scale
    fine = [asked(30, SamplingParams(temperature=1.0, max_new_tokens=30), seed=i) for i in range(3)]
    bad = asked(2, SamplingParams(max_new_tokens=3), adapters=(broken,))
    expected = [ids(start(folder).generate(part)) for part in fine]
    engine = start(folder, batch_rows=24)
    engine.generate(fine[0][:1])
    found, raised = {}, []

    def call(i):
        found[i] = ids(engine.generate(fine[i]))

    def call_bad():
        try:
            engine.generate(bad)
        except KeyError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    threads.insert(1, threading.Thread(target=call_bad))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(3)] == expected
    assert raised == ["'lora_alpha'"]
    assert engine.batch is None or engine.batch.idle  # none where the failure came last
    assert not engine.calls
    assert not engine.alone


def test_a_model_with_another_memory_is_refused(tmp_path):
    from transformers import MambaConfig

    from selfguide_ray.errors import SelfGuideError

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(resolve("embedded/nano")).save_pretrained(tmp_path)
    with pytest.raises(SelfGuideError, match="other means than keys and values"):
        start(tmp_path).generate(asked(1, SamplingParams(max_new_tokens=2)))
