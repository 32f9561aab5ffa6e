"""The settings of a run: seven sections named like the tables, and `student` and `cluster`.

The defaults are the reference's (spec §1, §2); a YAML file states only what differs. The text below a field is its
documentation everywhere: in errors, in `selfguide settings`, in the README. `config_file` reads them.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from selfguide_ray.documents import check_setting, read_json
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.redaction import redacted
from selfguide_ray.sections import PerFamily, Section, per_family

# Chat phrases that mark a reply about the text instead of the text (our list; the reference's idea, spec §1.2.3).
CHAT_PHRASES = (
    "Sure,", "Sure!", "Certainly", "Of course", "Here is", "Here's", "Thank you for", "Great question", "I apologize",
    "I'm sorry", "As an AI", "As a language model", "I cannot", "Let me",
)  # fmt: skip


def refuse_uri(name: str, value: str | None) -> None:
    """A path that cannot be a URI is not one."""
    if value is not None and "://" in value:
        raise SelfGuideError(
            f"{name}: {redacted(value)} is a URI.",
            "It is read from a local path; only runs may lie on an object store.",
            "Copy it to a disk that all nodes see, and give the path there.",
        )


class Student(Section):
    """Which model, and how it runs."""

    model: str = "embedded/nano"
    """A folder with a Hugging Face causal LM, a hub name, or embedded/nano, the small student inside the package."""
    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    """What generates: transformers (our engine on its models), vllm, or scripted, a stand-in without a model for tests."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    max_prompt_tokens: int = Field(3000, ge=16)
    """Longest prompt in tokens; also bounded by the model's context less the new tokens."""
    batch_rows: int = Field(128, ge=1)
    """Rows that the engine decodes together."""
    kv_memory_gib: float | None = Field(None, gt=0)
    """Memory for keys and values; by default 1 GiB on a CPU and on a GPU 85 % of what the weights leave free."""
    max_adapters: int = Field(32, ge=1)
    """LoRA adapters kept in memory, whose rows decode together over one base."""
    strict: bool = False
    """Batches of one fixed shape: a row's numbers are the same bit for bit whatever runs beside it. Slower."""
    vllm: dict[str, Any] = Field({})
    """Further arguments of vLLM's engine, by name; engine: vllm."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    request_seconds: float | None = Field(None, gt=0)
    """Longest that a row may decode; then it has no text and is timed_out. engine: transformers."""

    @model_validator(mode="after")
    def _on_disk(self) -> "Student":
        refuse_uri("student.model", self.model)
        return self


class Cluster(Section):
    """How much of the cluster to use. Nothing here changes a result by more than rounding."""

    engines: int = Field(1, ge=1)
    """Engine actors; each loads the student once."""
    shards_in_flight: int = Field(2, ge=1)
    """Shards that an engine works on at a time, so that it stays full while one waits for its slowest row."""
    cpus_per_engine: float = Field(1, ge=0)
    """CPUs, and so threads, of an engine."""
    gpus_per_engine: float = Field(0, ge=0)
    """GPUs of an engine."""
    bad_rows: int = Field(8, ge=0)
    """Rows of a table's shard that may kill the engine, hang it or make it fail; with more, the shard fails."""
    stall_seconds: float | None = Field(1800, gt=0)
    """An engine without progress for so long is started anew, and the row that hangs it is timed_out; null waits for ever."""
    groups: int = Field(1, ge=1)
    """Training groups, each a Ray Train run that walks its share of the tasks."""
    workers: int | tuple[int, int] = 1
    """Workers in a group; they train each task together, data-parallel. [fewest, most] goes with what nodes there are."""
    cpus_per_worker: float = Field(1, ge=0)
    """CPUs, and so threads, of a training worker."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs of a training worker."""
    tasks_per_batch: int = Field(8, ge=1)
    """Tasks whose adapters a lone worker trains in one batch; 1 trains one task after the other."""
    tokens_per_pass: int = Field(2048, ge=1)
    """Tokens of one training pass: tasks share a batch up to it, and a batch with more is accumulated. Raise it on a GPU."""
    models_on_disk: int = Field(64, ge=1)
    """Where weights do not stay: tasks that are trained before their predictions are made and the weights removed."""
    checkpoint_seconds: float = Field(300, ge=0)
    """How often the state of training is kept, to go on from after a death."""
    drain_seconds: float = Field(60, ge=0)
    """How long a job that is told to stop may go on with the shards and packs in hand; a second signal ends it at once."""

    @field_validator("workers", mode="before")
    @classmethod
    def _count_or_range(cls, value: Any) -> int | tuple[int, int]:
        bounds = tuple(value) if isinstance(value, list | tuple) else (value, value)
        if len(bounds) != 2 or any(type(bound) is not int for bound in bounds) or not 1 <= bounds[0] <= bounds[1]:
            raise ValueError("Input should be a whole number from 1, or two of them, [fewest, most]")
        return value if isinstance(value, int) else bounds


class Tasks(Section):
    """Which tasks, and what is held out."""

    source: str = "embedded/tasks"
    """A directory or tar archive of task files, one file, or embedded/tasks, the examples inside the package."""
    select: str = "all"
    """Comma-separated: all, a name or GLOB, a split (default/test), category:NAME, language:NAME; a&b is both, !a takes away."""
    splits: str | None = None
    """Directory of Natural Instructions' split lists; by default looked for beside the source."""
    per_shard: int = Field(8, ge=1)
    """Tasks in a shard, the unit of work and of resume."""
    instances: int = Field(100, ge=0)
    """Held-out instances of a task: the first of a test task, in order (the official rule), else a seeded sample."""
    validation: int = Field(0, ge=0)
    """Further instances to choose settings by, drawn with the seed and stratified by answer; none is held out."""
    gold: int = Field(0, ge=0)
    """Still further ones, drawn likewise, that the system gold_tuned learns from."""
    strict: bool = False
    """Stop at the first broken task file instead of listing it at the end."""

    @field_validator("select", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value

    @model_validator(mode="after")
    def _on_disk(self) -> "Tasks":
        refuse_uri("tasks.source", self.source)
        refuse_uri("tasks.splits", self.splits)
        return self


LabelMode = Literal["free", "decode", "score"]


class Inputs(Section):
    """Rounds in which the student invents inputs (spec §1.1, §1.2)."""

    rounds: PerFamily[int] = per_family(40, 20)
    """Rounds; each sees the inputs that survived the rounds before."""
    prompts_per_round: int = Field(10, ge=1)
    """Prompts of a task in a round, one new input each."""
    temperature: PerFamily[float] = per_family(0.6, 1.0)
    """Sampling temperature; 0 is greedy."""
    top_k: int = Field(40, ge=0)
    """Sample among the k likeliest tokens; 0 is all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this probability."""
    max_new_tokens: int = Field(500, ge=1)
    """Longest new input in tokens."""
    max_earlier: int = Field(10, ge=0)
    """A prompt shows 1 to this many earlier inputs, drawn at random."""
    length_filter: bool = True
    """Drop inputs whose length in characters is outside mean ± length_sigmas standard deviations of the examples'."""
    length_sigmas: float = Field(2.0, ge=0)
    """Half-width of that range in standard deviations."""
    length_slack: float = Field(0.0, ge=0)
    """Widen the range at both ends by this share of the mean length; a few examples tell little about lengths."""
    noise_words: tuple[str, ...] = ("input", "output", *CHAT_PHRASES)
    """Texts that hold one of these words or phrases, or a blank line, are dropped; a task may add its own."""
    prefixes: tuple[str, ...] = ()
    """Texts that begin with one of these words or phrases, in any case, are dropped."""
    max_perplexity: float | None = Field(None, ge=1)
    """Drop inputs that the student wrote with a perplexity per token above this."""
    verify: float | None = Field(None, ge=0, le=1)
    """Ask the student if an input is a proper item; drop it if the probability of yes, among yes and no, is below this."""
    least: PerFamily[int] = per_family(0, 0)
    """Survivors wanted, of each label asked for or of a generation task; with fewer, extra rounds follow."""
    extra_rounds: int = Field(0, ge=0)
    """Rounds that may follow to reach inputs.least; they ask only for labels that lack survivors."""


class Outputs(Section):
    """The student answers its inputs (spec §1.3)."""

    samples: int = Field(20, ge=1)
    """Answers sampled for each input."""
    temperature: float = Field(0.2, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_k: int = Field(10, ge=0)
    """Sample among the k likeliest tokens; 0 is all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this probability."""
    max_new_tokens: int = Field(500, ge=1)
    """Longest answer in tokens, in predictions too."""
    guided_by: str | None = None
    """The folder of a run over the same tasks, whose tuned models answer instead of the student: a further iteration."""
    labels: LabelMode = "free"
    """Classification: any text (the reference), only what the labels leave open, or a draw by the scores of all labels."""


class Trainset(Section):
    """Votes, filters and balance that make training pairs of answers (spec §1.4, §1.5). No engine is needed."""

    keep: int = Field(10, ge=1)
    """Of the samples, those with the highest summed log-probability that may vote."""
    length_filter: PerFamily[bool] = per_family(False, True)
    """Drop answers whose length is outside the range of the examples' outputs; never useful for labels."""
    length_sigmas: float = Field(2.0, ge=0)
    """Half-width of that range in standard deviations."""
    length_slack: float = Field(0.0, ge=0)
    """Widen the range at both ends by this share of the mean length."""
    noise_words: tuple[str, ...] = ("input", "output", *CHAT_PHRASES)
    """Answers that hold one of these words or phrases, or a blank line, are dropped; a task may add its own."""
    prefixes: tuple[str, ...] = ()
    """Answers that begin with one of these words or phrases, in any case, are dropped."""
    min_frequency: float = Field(0.3, ge=0, le=1)
    """The most frequent answer needs this share of the votes."""
    vote: Literal["exact", "consensus"] = "exact"
    """Generation: the commonest text wins (the reference), or the one most like the others, its mean ROUGE-L as its share."""
    vote_among: Literal["survivors", "samples"] = "survivors"
    """The share is taken of the answers that survive their filters (the reference), or of all that may vote."""
    vote_weight: Literal["one", "probability"] = "one"
    """Every vote counts one, or its label's probability among the labels; outputs.labels: decode or score."""
    answer: Literal["voted", "agreed", "wanted"] = "voted"
    """Classification: the winner of the vote (the reference), only if it is the label asked for, or that label itself."""
    extract_labels: bool = True
    """Take the one label that a wordy answer names; off, an answer has to equal a label (the reference)."""
    in_context: int = Field(22, ge=1)
    """Pairs that self_icl shows as examples and self_icl_tuned learns, as many of each label; the reference's number."""
    flipped: float = Field(1.0, ge=0, le=1)
    """Share of the pairs that flipped_tuned learns with a wrong answer."""
    novelty: float | None = Field(None, ge=0, le=1)
    """Drop a pair whose input has a higher ROUGE-L than this with an example's, or with a surviving pair's before it."""
    middle_lengths: float | None = Field(None, gt=0, le=1)
    """Keep this share of a task's pairs, the middle by length of input: 0.8 drops the shortest and the longest tenth."""
    decontaminate: Literal["off", "mark", "drop"] = "mark"
    """Pairs whose input overlaps that of a held-out instance, or equals it: not looked for, marked, or dropped."""
    overlap_words: int = Field(8, ge=1)
    """Inputs overlap if they share a run of so many words that neither the task's instruction nor an example holds."""
    overlap_rouge: float = Field(0.8, gt=0, le=1)
    """Inputs overlap if their ROUGE-L is at least this."""
    balance: bool = True
    """Keep as many pairs of each label as the rarest label has (classification)."""
    max_tokens: int = Field(2000, ge=16)
    """Pairs longer than this are dropped, never cut."""

    @field_validator("decontaminate", mode="before")
    @classmethod
    def _off_in_yaml(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class Models(Section):
    """Fine-tuning (spec §2)."""

    method: Literal["lora", "full"] = "lora"
    """Train a LoRA adapter, or all weights as the paper does."""
    rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(32, gt=0)
    """Scale of the adapter: alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapter."""
    quantize: Literal["none", "nf4"] = "none"
    """Train the adapter on a base in four bits (QLoRA); needs a GPU and bitsandbytes."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: names, or all-linear."""
    epochs: int = Field(3, ge=1)
    """Passes over a task's pairs."""
    batch_size: int = Field(1, ge=1)
    """Pairs in an optimiser step, over all workers of the group."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak rate; by default 5e-5 for all weights (the reference) and 2e-4 for an adapter."""
    schedule: Literal["linear", "constant"] = "linear"
    """Linear decay to zero, or constant."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW (β 0.9, 0.999; ε 1e-8)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of a task's pairs that is held out of training, and its loss computed after each epoch."""
    patience: int = Field(0, ge=0)
    """End a task after so many epochs without a lower validation loss; 0 goes through all epochs."""
    keep: Literal["adapter", "best", "last", "none"] = "adapter"
    """Weights that stay: an adapter's (whole weights go once predictions are made), of the best or last epoch, or none."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """How far DeepSpeed shards optimiser, gradients and weights over a group's workers."""
    deepspeed: dict[str, Any] = Field({})
    """Further keys of a DeepSpeed configuration, or the path of a JSON file with them; merged over ours."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, more time."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        refuse_uri("models.deepspeed", value)
        return _json_object(Path(value), "models.deepspeed")

    @property
    def peak_rate(self) -> float:
        """The learning rate in force."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 5e-5)

    @property
    def weights_stay(self) -> bool:
        """Whether a task's weights are still there when its predictions are made."""
        return self.keep in ("best", "last") or (self.keep == "adapter" and self.method == "lora")


SystemName = Literal[
    "copy", "majority", "zero_shot", "few_shot", "few_shot_random", "few_shot_filtered", "few_shot_vote", "self_icl",
    "few_shot_tuned", "self_icl_tuned", "unfiltered_tuned", "flipped_tuned", "gold_tuned", "selfguide",
]  # fmt: skip
# Those that learn, each from pairs of its own.
LEARNERS: tuple[SystemName, ...] = (
    "few_shot_tuned", "self_icl_tuned", "unfiltered_tuned", "flipped_tuned", "gold_tuned", "selfguide",
)  # fmt: skip


class Predictions(Section):
    """Which systems answer the held-out instances."""

    systems: tuple[SystemName, ...] = Field(("copy", "majority", "zero_shot", "few_shot", "selfguide"), min_length=1)
    """The systems, floors first; the README tells what each is."""
    instances: Literal["held_out", "validation"] = "held_out"
    """What they answer: the instances held out, or those of tasks.validation, to choose settings by."""
    labels: LabelMode = "free"
    """Classification: answer with any text (the reference), within the labels, or the label that scores best."""

    @property
    def tuned(self) -> tuple[SystemName, ...]:
        """Those of the systems that are fine-tuned."""
        return tuple(system for system in LEARNERS if system in self.systems)

    @property
    def taught(self) -> tuple[SystemName, ...]:
        """The systems that want pairs of `trainset`, besides selfguide: to learn them, or to show them."""
        wanted = {"self_icl_tuned" if system == "self_icl" else system for system in self.systems}
        return tuple(system for system in LEARNERS[:-1] if system in wanted or system == "few_shot_tuned")


class Scores(Section):
    """How predictions are scored."""

    bootstrap: int = Field(1000, ge=0)
    """Resamples behind each 95 % interval; 0 leaves intervals out."""


# What method: reference leaves no choice in: a default gives way to it, a setting that says otherwise is refused.
AS_REFERENCE: dict[str, dict[str, Any]] = {
    "inputs": {"length_slack": 0.0, "verify": None, "max_perplexity": None, "prefixes": (), "extra_rounds": 0},
    "outputs": {"labels": "free", "guided_by": None},
    "trainset": {
        "length_slack": 0.0,
        "prefixes": (),
        "novelty": None,
        "middle_lengths": None,
        "vote": "exact",
        "vote_among": "survivors",
        "vote_weight": "one",
        "answer": "voted",
        "extract_labels": False,
    },
    "predictions": {"labels": "free"},
}


class Budget(Section):
    """Where a job stops by itself, over all submissions of the run. What is finished is kept; with more it goes on."""

    hours: float | None = Field(None, gt=0)
    """Hours of engines and training workers, each counted, while a job has them or waits for them."""
    money: float | None = Field(None, gt=0)
    """The same as money; needs budget.price."""
    price: float | None = Field(None, gt=0)
    """Money for such an hour."""

    @model_validator(mode="after")
    def _priced(self) -> "Budget":
        if self.money is not None and self.price is None:
            raise SelfGuideError(
                f"budget.money: is {self.money:g}, and budget.price is not set.",
                "What a run has cost is its hours times a price.",
                "Set budget.price to what an hour of an engine or a worker costs, or give budget.hours.",
            )
        return self


class Config(Section):
    """Everything a run depends on."""

    run: str = "runs/default"
    """The run's folder: a path, or a URI such as s3://bucket/run."""
    seed: int = Field(0, ge=0)
    """Decides every random choice together with a row's identity."""
    method: Literal["selfguide", "reference"] = "selfguide"
    """Ours, or the reference code's behaviour where it differs, with its own metrics, to reproduce its figures."""
    student: Student = Student()
    cluster: Cluster = Cluster()
    budget: Budget = Budget()
    tasks: Tasks = Tasks()
    inputs: Inputs = Inputs()
    outputs: Outputs = Outputs()
    trainset: Trainset = Trainset()
    models: Models = Models()
    predictions: Predictions = Predictions()
    scores: Scores = Scores()

    @model_validator(mode="after")
    def _instances_set_apart(self) -> "Config":
        """What wants instances that are set apart finds some."""
        for wanted, setting, why in (
            (
                "gold_tuned" in self.predictions.systems and not self.tasks.gold,
                "gold",
                "predictions.systems has gold_tuned, which learns from them",
            ),
            (
                self.predictions.instances == "validation" and not self.tasks.validation,
                "validation",
                "predictions.instances is validation",
            ),
        ):
            if wanted:
                raise SelfGuideError(
                    f"tasks.{setting}: is 0.",
                    f"{why}.",
                    f"Set tasks.{setting} to a number, or change the other setting.",
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _give_way(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("method") != "reference":
            return value
        completed = dict(value)
        for section, fixed in AS_REFERENCE.items():
            given = completed.get(section)
            given = given.model_dump(exclude_unset=True) if isinstance(given, Section) else given or {}
            completed[section] = fixed | given if isinstance(given, dict) else given
        return completed

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> "Config":
        for section, fixed in AS_REFERENCE.items() if self.method == "reference" else ():
            for name, value in fixed.items():
                if (given := getattr(getattr(self, section), name)) != value:
                    raise SelfGuideError(
                        f"{section}.{name} is {json.dumps(given)} beside method: reference.",
                        f"The reference code knows only {json.dumps(value)} there, and its figures depend on it.",
                        f"Leave {section}.{name} out, or choose method: selfguide.",
                    )
        return self


def _json_object(path: Path, name: str) -> dict[str, Any]:
    """The content of a JSON file that a setting names: the run depends on it, not on the file."""
    instead = "Give a JSON file of DeepSpeed's, or the keys themselves."
    try:
        found = read_json(path.expanduser().read_text(encoding="utf-8"))
        check_setting(found)
    except OSError as error:
        raise SelfGuideError(f"{name}: {path} cannot be read.", f"{error.strerror}.", instead) from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise SelfGuideError(f"{name}: {path} is no JSON.", f"{' '.join(str(error).split())}.", instead) from error
    if not isinstance(found, dict):
        raise SelfGuideError(f"{name}: {path} holds a {type(found).__name__}.", "Keys and values are wanted.", instead)
    return found
