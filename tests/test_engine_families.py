"""Greedy text equals `generate` token for token, whatever the family: 500 prompts each, tiny random weights."""

import random

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfguide_ray.config import Student
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.engine import Request, SamplingParams, make_engine
from selfguide_ray.engine.batching import Batch
from selfguide_ray.engine.cached import CachedBatches
from selfguide_ray.errors import SelfGuideError

VOCABULARY, NEW = 4096, 12
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8,
    "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
OLD = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
WINDOWED = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

OURS = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "mistral_window": ("MistralConfig", {"sliding_window": 16}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gemma2": ("Gemma2Config", {**WINDOWED, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", {**OLD, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 512}),
}
CACHED = {
    "bloom": ("BloomConfig", {**OLD, "hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon": ("FalconConfig", {**OLD, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "alibi": True}),
}  # fmt: skip
SMALL_ONLY = {"GPT2Config", "BloomConfig", "FalconConfig"}


def saved(folder, config_class, given):
    torch.manual_seed(0)
    settings = given if config_class in SMALL_ONLY else {**SMALL, **given}
    AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("embedded/nano")).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def prompts(count, seed=0):
    """Prompts of ten prefixes, some of which begin alike, and of six suffix lengths."""
    rng = random.Random(seed)
    head = tuple(rng.randrange(3, VOCABULARY) for _ in range(140))
    prefixes = [head[: 130 * (i % 2)] + tuple(rng.randrange(3, VOCABULARY) for _ in range(30)) for i in range(10)]
    drawn = [
        (rng.choice(prefixes), tuple(rng.randrange(3, VOCABULARY) for _ in range(1 + 5 * (i % 6))))
        for i in range(count)
    ]
    return drawn


@torch.inference_mode()
def generated(model, split):
    """`generate` on prompts of one length at a time, so that nothing is padded."""
    expected = {}
    by_length = {}
    for prefix, suffix in split:
        by_length.setdefault(len(prefix + suffix), []).append(prefix + suffix)
    for length, several in by_length.items():
        answers = model.generate(torch.tensor(several), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        for prompt, answer in zip(several, answers[:, length:].tolist(), strict=True):
            expected[prompt] = tuple(answer[: answer.index(1)] if 1 in answer else answer)
    return [expected[prefix + suffix] for prefix, suffix in split]


def answers(folder, split, **student):
    engine = make_engine(Student(model=str(folder), **student), load().cluster)
    requests = [Request(prefix, suffix, SamplingParams(max_new_tokens=NEW)) for prefix, suffix in split]
    return engine, [completion.ids for (completion,) in engine.generate(requests)]


@pytest.mark.parametrize("family", OURS)
def test_greedy_equals_generate_with_shared_attention(tmp_path, family):
    model = saved(tmp_path, *OURS[family])
    split = prompts(500)
    engine, found = answers(tmp_path, split)
    assert isinstance(engine.batch, Batch)
    assert found == generated(model, split)
    assert len(set(found)) > 250  # the model says many things


@pytest.mark.parametrize("family", CACHED)
def test_greedy_equals_generate_where_the_attention_is_the_models_own(tmp_path, family):
    model = saved(tmp_path, *CACHED[family])
    split = prompts(100)
    engine, found = answers(tmp_path, split)
    assert isinstance(engine.batch, CachedBatches)
    assert found == generated(model, split)
    assert len(set(found)) > 50


def test_strict_mode_says_the_same(tmp_path):
    model = saved(tmp_path, *OURS["mistral_window"])
    split = prompts(60)
    assert answers(tmp_path, split, strict=True, batch_rows=8)[1] == generated(model, split)


def test_strict_mode_is_refused_where_it_cannot_be_kept(tmp_path):
    saved(tmp_path, *CACHED["bloom"])
    with pytest.raises(SelfGuideError, match=r"student\.strict") as caught:
        answers(tmp_path, prompts(2), strict=True)
    assert "Set student.strict=false" in caught.value.instead
