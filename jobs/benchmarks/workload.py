"""Random models whose greedy text varies and ends by itself, and requests for them; all decided by seeds."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from selfguide_ray.engine import Request, SamplingParams

PAD, EOS, UNKNOWN, WORDS = 0, 1, 2, 3  # special tokens; all ids from WORDS on are words
FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config}
CONSTANT = 4.0  # what the coordinate of the hidden state that no layer writes holds for every token
SHARPNESS = 3.5  # standard deviation of a logit: about 3 nats of entropy at temperature 1
STOP_CHANCE = 0.035  # of a position in random text; answers then have about 21 tokens, those cut at 48 included
# Sharp attention, weak enough that the prefix does not decide how long its task's answers are.
GAINS = {"q_proj": 2.0, "k_proj": 2.0, "v_proj": 0.5, "o_proj": 0.5}
CALIBRATION = 1200  # tokens on which the chance is set


@dataclass(frozen=True)
class Shape:
    """What a random model is made of. A size is named after its weights in matrix products, the input table left out."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int = 2048
    stop_chance: float = STOP_CHANCE

    @property
    def words(self) -> list[int]:
        """The ids that prompts are drawn from."""
        return list(range(WORDS, self.vocabulary))


SHAPES = {
    "15M": Shape("llama", layers=8, hidden=384, heads=6, kv_heads=2, ffn=1024, vocabulary=8192),
    "120M": Shape("qwen2", layers=15, hidden=768, heads=12, kv_heads=4, ffn=2048, vocabulary=32000),
    "3M": Shape("llama", layers=2, hidden=256, heads=4, kv_heads=2, ffn=704, vocabulary=4096),
    "tiny": Shape("llama", layers=2, hidden=64, heads=2, kv_heads=2, ffn=128, vocabulary=512, context=4096),
}


@dataclass(frozen=True)
class Work:
    """Tasks that share a prefix each, and their requests."""

    tasks: int = 2
    requests: int = 64
    prefix: int = 600
    suffix: tuple[int, int] = (5, 35)
    new_tokens: int = 48

    def __str__(self) -> str:
        low, high = self.suffix
        return (
            f"{self.tasks} tasks × {self.requests} requests, prefix {self.prefix} tokens, suffix {low}–{high}, "
            f"up to {self.new_tokens} new tokens"
        )

    def draw(self, words: Sequence[int], seed: int, **params: float) -> list[Request]:
        """The requests in an arrival order that mixes the tasks; another seed shares no prefix with this one."""
        chance = random.Random(seed)
        asked = SamplingParams(max_new_tokens=self.new_tokens, **params)
        requests = []
        for _ in range(self.tasks):
            prefix = tuple(chance.choices(words, k=self.prefix))
            for _ in range(self.requests):
                suffix = tuple(chance.choices(words, k=chance.randint(*self.suffix)))
                requests.append(Request(prefix, suffix, asked))
        chance.shuffle(requests)
        return [replace(request, seed=seed * 1_000_003 + i) for i, request in enumerate(requests)]


def save_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """A random model of the shape with a tokenizer of as many words, as a folder that every engine reads.

    A folder that is there already is left as it is.
    """
    if folder.exists():
        return folder
    config = FAMILIES[shape.family](
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomise(model)
        _let_it_stop(model, torch.randint(WORDS, shape.vocabulary, (2, CALIBRATION // 2)), shape.stop_chance)
    model.save_pretrained(folder)
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN} | {f"w{i}": i for i in range(WORDS, shape.vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Weights so large that a token depends on all before it, other than the usual ones, which yield loops.

    No layer writes the first coordinate of the hidden state: it is the same for all tokens, so that a weight on it is
    a bias, which the head of these families has none of.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        if name.endswith("embed_tokens.weight"):
            weight.normal_()
            weight[:, 0] = CONSTANT
        elif name.endswith("lm_head.weight"):
            weight.normal_(std=SHARPNESS / math.sqrt(weight.shape[1]))
            weight[:, 0] = 0
        else:
            kind = name.split(".")[-2]
            weight.normal_(std=GAINS.get(kind, 1.0) / math.sqrt(weight.shape[1]))
            if kind in ("o_proj", "down_proj"):
                weight[0] = 0


@torch.no_grad()
def _let_it_stop(model: PreTrainedModel, ids: torch.Tensor, chance: float) -> None:
    """Set the bias of EOS so that it is the likeliest token at this share of the positions."""
    hidden = model.model(ids).last_hidden_state.flatten(0, 1)
    logits = hidden @ model.lm_head.weight.T
    rival = logits[:, WORDS:].amax(-1)
    needed = (rival - logits[:, EOS]) / hidden[:, 0]
    model.lm_head.weight[EOS, 0] = needed.quantile(chance)
    # Neither of these is ever the likeliest: an answer holds words alone.
    model.lm_head.weight[PAD, 0] = model.lm_head.weight[UNKNOWN, 0] = -1000 / CONSTANT


def prompts(requests: Sequence[Request]) -> list[list[int]]:
    """Each request's tokens in one piece."""
    return [[*request.prefix, *request.suffix] for request in requests]
