"""The transformers engine on the embedded student and on tiny random models."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from selfguide_ray.config import Student
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, SamplingParams, make_engine, share_prefix
from selfguide_ray.engine.sampling import choose, gumbel
from selfguide_ray.prompts import Prompts
from selfguide_ray.task_files import read_task, task_files

EMBEDDED = resolve("embedded/nano")


def tiny_model(folder: Path, config) -> Path:
    """A random model of a family with the embedded student's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine():
    settings = load()
    return make_engine(settings.student, settings.cluster)


def plain_model(folder):
    """The model as transformers has it, frozen as the engine's is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def reference():
    return plain_model(EMBEDDED)


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


def greedy(model, ids, new_tokens):
    answer = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    answer = answer[0, len(ids) :].tolist()
    return tuple(answer[:-1] if answer[-1] == model.generation_config.eos_token_id else answer)


def test_greedy_equals_generate_token_for_token(engine, reference, prompts):
    completions = engine.generate(requests(prompts, SamplingParams(max_new_tokens=16)))
    assert [c.ids for (c,) in completions] == [greedy(reference, p + s, 16) for p, s in prompts]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])
def test_any_model_folder_works(tmp_path, prompts, family, tied):
    config = family(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=tied,
    )  # fmt: skip
    folder = tiny_model(tmp_path, config)
    other = make_engine(Student(model=str(folder)), load().cluster)
    completions = other.generate(requests(prompts[::3], SamplingParams(max_new_tokens=6)))
    assert [c.ids for (c,) in completions] == [greedy(plain_model(folder), p + s, 6) for p, s in prompts[::3]]


def test_a_student_in_many_shards_is_read_and_left_as_it_is(tmp_path, reference, prompts):  # statement 28
    reference.save_pretrained(tmp_path, max_shard_size="2MB")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(tmp_path)
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sum(name.endswith(".safetensors") for name in before) >= 8
    other = make_engine(Student(model=str(tmp_path)), load().cluster)
    completions = other.generate(requests(prompts[:4], SamplingParams(max_new_tokens=6)))
    assert [c.ids for (c,) in completions] == [greedy(reference, p + s, 6) for p, s in prompts[:4]]
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_row_does_not_depend_on_its_batch(engine, prompts):
    params = SamplingParams(n=3, temperature=0.9, top_k=40, max_new_tokens=12)
    asked = requests(prompts, params)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked]
    backwards = engine.generate(asked[::-1])[::-1]
    texts = [[c.ids for c in row] for row in together]
    assert texts == [[c.ids for c in row] for row in alone] == [[c.ids for c in row] for row in backwards]
    assert len({ids for row in texts for ids in row}) > len(texts)  # samples and rows differ


def test_where_a_prompt_is_split_does_not_matter(engine, prompts):
    params = SamplingParams(temperature=0.9, max_new_tokens=12)
    split = engine.generate(requests(prompts, params))
    whole = engine.generate(requests([((), p + s) for p, s in prompts], params))
    assert [c.ids for (c,) in split] == [c.ids for (c,) in whole]


def test_logprob_is_the_sum_that_a_full_forward_pass_gives(engine, reference, prompts):
    (prefix, suffix), params = prompts[0], SamplingParams(temperature=0.7, top_k=5, max_new_tokens=8)
    ((completion,),) = engine.generate([Request(prefix, suffix, params, seed=3)])
    ids = [*prefix, *suffix, *completion.ids]
    logprobs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(prefix) + len(suffix)
    expected = sum(logprobs[start - 1 + i, token].item() for i, token in enumerate(completion.ids))
    if completion.finish_reason == "stop":
        expected += logprobs[len(ids) - 1, engine.tokenizer.hf.eos_token_id].item()
    assert completion.logprob == pytest.approx(expected, abs=1e-3)


def test_a_prompt_without_room_is_a_verdict_and_the_others_go_on(engine, prompts):
    fits = requests(prompts[:1], SamplingParams(max_new_tokens=4))
    too_long = Request((), tuple([5] * engine.context), SamplingParams(n=2))
    answers = engine.generate([too_long, *fits])
    assert [c.finish_reason for c in answers[0]] == ["too_long"] * 2
    assert answers[1] == engine.generate(fits)[0]


def test_generation_ends_where_the_context_ends(engine):
    ids = tuple([5] * (engine.context - 3))
    ((completion,),) = engine.generate([Request((), ids, SamplingParams(temperature=5.0, max_new_tokens=50), seed=1)])
    assert len(completion.ids) <= 3


def test_stop_strings_end_a_row_and_are_cut_off(engine, prompts):
    params = SamplingParams(temperature=1.0, max_new_tokens=40)
    free = [c.text for (c,) in engine.generate(requests(prompts, params))]
    stop = max(free, key=len)[5:8]
    stopped = engine.generate(requests(prompts, SamplingParams(temperature=1.0, max_new_tokens=40, stops=(stop,))))
    for text, (completion,) in zip(free, stopped, strict=True):
        assert completion.text == text.split(stop)[0]
        assert completion.finish_reason == "stop" or stop not in text


def test_noise_is_gumbel_distributed_and_keyed():
    keys, positions = torch.arange(200), torch.zeros(200, dtype=torch.long)
    noise = gumbel(keys, positions, torch.arange(500).expand(200, 500))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    assert torch.equal(noise[7], gumbel(keys[7:8], positions[7:8], torch.arange(500)[None])[0])
    assert not torch.equal(noise, gumbel(keys, positions + 1, torch.arange(500).expand(200, 500)))


def test_sampling_follows_the_softmax():
    rows = 20_000
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(rows, 4)
    tokens, _ = choose(logits, SamplingParams(temperature=1.0), torch.arange(rows), torch.zeros(rows, dtype=torch.long))
    shares = torch.bincount(tokens, minlength=4) / rows
    chi_square = (
        rows * (shares - torch.tensor([0.5, 0.3, 0.15, 0.05])) ** 2 / torch.tensor([0.5, 0.3, 0.15, 0.05])
    ).sum()
    assert chi_square < 16.3  # 99.9 % quantile with 3 degrees of freedom


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(temperature=1.0, top_k=2), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.6), {0, 1}),
        (SamplingParams(temperature=1.0, top_p=0.4), {0}),
        (SamplingParams(temperature=0.0), {0}),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.99), {0, 1, 2}),
    ],
)
def test_top_k_and_top_p_cut_the_tail(params, allowed):
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(500, 4)
    tokens, _ = choose(logits, params, torch.arange(500), torch.zeros(500, dtype=torch.long))
    assert set(tokens.tolist()) == allowed


def test_shared_prefix_leaves_each_prompt_a_token():
    assert share_prefix([(1, 2, 3), (1, 2, 4)]) == [((1, 2), (3,)), ((1, 2), (4,))]
    assert share_prefix([(1, 2), (1, 2), (1, 2, 3)]) == [((1,), (2,)), ((1,), (2,)), ((1,), (2, 3))]
    assert share_prefix([(7,)]) == [((), (7,))]
    assert share_prefix([]) == []
