"""How the embedded students are made: a Llama trained from scratch on Natural Instructions, in the pipeline's own forms.

`corpus` makes rows of tokens of task files, `learning` is what a worker does with them, `recipe` goes from one to the
other on Ray and leaves a model's folder with its card. The settings are a YAML file, `configs/student-*.yaml`.
"""

from typing import Literal

from pydantic import Field, model_validator

from selfguide_ray.config import refuse_uri
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.sections import Section


class Shape(Section):
    """The model."""

    vocabulary: int = Field(4096, ge=300, le=65535)
    """Tokens of the byte-level BPE, special ones included."""
    hidden: int = Field(256, ge=8)
    """Width."""
    layers: int = Field(4, ge=1)
    """Depth."""
    heads: int = Field(8, ge=1)
    """Attention heads."""
    kv_heads: int = Field(4, ge=1)
    """Heads of keys and values."""
    feed_forward: int = Field(704, ge=8)
    """Width of the feed-forward layers."""
    context: int = Field(1024, ge=32)
    """Tokens of a training row, and of the longest prompt."""


class Recipe(Section):
    """Everything a student depends on but the version of the code."""

    output: str = "runs/student"
    """The folder of the work, a path or a URI such as s3://bucket/work; in it, when all is done, `student/`."""
    source: str = "natural-instructions"
    """A checkout of Natural Instructions: a folder with `tasks/` or `tasks.tar.xz`, and `splits/`."""
    seed: int = Field(1, ge=0)
    """Decides the documents, their order, and the first weights."""
    start: str | None = None
    """A student to go on from: its folder, or embedded/nano. Its tokenizer and its development tasks are kept."""
    shape: Shape = Shape()
    development: int = Field(48, ge=0)
    """Training tasks left out, to try settings of the method on: none shares a source with a task that is learned."""
    made_up: float = Field(0.15, ge=0, lt=1)
    """Share of documents of tasks that the project makes up: copy, choose, count, rearrange words."""
    renamed: float = Field(0.5, ge=0, le=1)
    """Share of the conversations of a task with classes whose labels are random words, learned from the examples alone."""
    names: Literal["words", "texts"] = "words"
    """Where these words are from: the list of the made-up tasks, or one to three of the tasks' own texts, in any case."""
    longest: int = Field(1000, ge=1)
    """Characters of the longest input that is learned from."""
    turns: int = Field(8, ge=0)
    """A conversation shows at most so many examples before its last answer."""
    primer_tokens: int = Field(0, ge=0)
    """Tokens to begin with, of texts that are repeated word for word: copying is learned before anything else."""
    rounds: int = Field(3, ge=1)
    """Conversations that an instance is part of, each time in other company."""
    documents: int | None = Field(None, ge=1)
    """At most so many documents; by default all."""
    tokens: int = Field(60_000_000, ge=1)
    """Tokens to train on, one row after the other; beyond the corpus it begins anew in another order."""
    batch_rows: int = Field(8, ge=1)
    """Rows in an optimiser step, over all workers."""
    rows_per_pass: int = Field(2, ge=1)
    """Rows that a worker takes at a time; as many as its memory holds."""
    user_weight: float = Field(0.2, ge=0, le=1)
    """Weight of a token that the student reads, against one that it writes."""
    least_turn: int = Field(1, ge=1)
    """A turn that the student writes weighs at least as much as so many tokens: a label against a whole item."""
    learning_rate: float = Field(3e-3, gt=0)
    """Peak rate, kept from the warm-up to the decay."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up."""
    decay: float = Field(0.3, gt=0, le=1)
    """Last share of the steps, in which the rate falls linearly to zero. Until it begins, `tokens` may still be raised."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW (β 0.9, 0.95), or Muon for the matrices and AdamW for the rest."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    dtype: Literal["float32", "bfloat16", "mixed"] = "float32"
    """Number format of weights and activations; bfloat16 keeps float32 copies to learn, mixed has float32 weights and
    computes products in bfloat16."""
    compile: bool = False
    """Compile the model with torch.compile; on a CPU this takes a C++ compiler."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """How far DeepSpeed shards optimiser, gradients and weights over the workers."""
    workers: int = Field(1, ge=1)
    """Ray Train workers, data-parallel."""
    cpus_per_worker: float = Field(1, ge=0)
    """CPUs, and so threads, of a worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a worker."""
    checkpoint_seconds: float = Field(300, ge=0)
    """How often the state is kept, to go on from after a death."""

    @model_validator(mode="after")
    def _read_from_disk(self) -> "Recipe":
        refuse_uri("source", self.source)
        refuse_uri("start", self.start)
        return self

    @model_validator(mode="after")
    def _unsharded_muon(self) -> "Recipe":
        if self.optimizer == "muon" and (self.zero_stage or self.dtype == "bfloat16"):
            raise SelfGuideError(
                f"optimizer: muon does not go with zero_stage={self.zero_stage} and dtype={self.dtype}.",
                "Muon sees a matrix as a whole, and ZeRO and bfloat16 weights keep flattened parts of it.",
                "Set zero_stage=0 and dtype=mixed or float32, or optimizer=adamw.",
            )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.tokens // (self.batch_rows * self.shape.context))

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        left = (self.steps - step) / (self.steps * self.decay)
        return self.learning_rate * min(1.0, left, (step + 1) / max(1, self.warmup_steps))
