"""One task by several processes in step: ZeRO teaches what a plain loop teaches, and a death changes nothing.

The ranks are real processes with gloo. A fork server that has imported everything starts them, so that a restart after
a SIGKILL takes a fraction of a second.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import uuid

import pytest
import torch
from alike import plain_step
from pairs import unlike, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.embedded import resolve
from selfguide_ray.failures import failures
from selfguide_ray.models import UNFINISHED, Pack, learn
from selfguide_ray.prompts import Prompts
from selfguide_ray.run import Run
from selfguide_ray.schema import row_seed, task_rows
from selfguide_ray.student import StudentTokenizer
from selfguide_ray.tuning import data_parallel
from selfguide_ray.tuning.data_parallel import passes
from selfguide_ray.tuning.pairs import Pair, batches, rate_factor

pytestmark = pytest.mark.slow
SECONDS = 100  # after which ranks hang
TASKS = {"colours": 7, "sizes": 5}


def make_student(folder):
    """A tiny model with the small student's tokenizer; two workers divide few of its parameters evenly."""
    shutil.copytree(resolve("embedded/nano"), folder, dirs_exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shape = {"hidden_size": 33, "head_dim": 12, "intermediate_size": 49, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    size = len(StudentTokenizer(load().student).hf)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        told = LlamaConfig(vocab_size=size, max_position_embeddings=640, **shape, **heads)
        AutoModelForCausalLM.from_config(told).save_pretrained(folder)
    return folder


def plan(folder, student, tasks, *overrides):
    """A run with a few pairs of every task."""
    settings = ["models.batch_size=3", "models.learning_rate=0.003", "models.epochs=4", "models.clip=0.5"]
    cluster = ["cluster.tasks_per_batch=1", f"student.model={student}"]
    config = load(None, [f"run={folder}", *settings, *cluster, *overrides])
    run, prompts = Run(config.run), Prompts(StudentTokenizer(config.student), 500)
    run.write("tasks", "00000", task_rows(tasks), {})
    write_pairs(run, "00000", [row for task in tasks for row in unlike(prompts, task, TASKS[task.name])])
    return config, run


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def planned(tmp_path_factory, make_task, student):
    """A new run with two tasks."""

    def make(*overrides):
        tasks = [make_task(task, instruction="Say it.") for task in TASKS]
        return plan(tmp_path_factory.mktemp("run"), student, tasks, *overrides)

    return make


COLOURS = Pack((("colours", "00000"),), 1)


class Death:
    """What kills a rank: the nth optimiser step, before it is taken, or the nth file that a checkpoint puts."""

    def __init__(self, place, count):
        self.place, self.count = place, count

    def arm(self):
        """Wait for it in this process."""
        owner, name = {"step": (data_parallel.Fitting, "_learn"), "file": (Run, "put")}[self.place]
        honest, left = getattr(owner, name), self.count

        def deadly(*args, **named):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **named)

        setattr(owner, name, deadly)


def be_a_rank(rank, world, store, works, death):
    """The process of a rank."""
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world
    )
    if death is not None:
        death.arm()
    barrier = torch.distributed.barrier if world > 1 else lambda: None
    for config, some in works:
        learn(Config.model_validate(config), some, rank, world, barrier)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """Starts ranks that learn packs under a config each; returns whether all came to the end."""
    folder = tmp_path_factory.mktemp("stores")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed.runtime.zero.muon.muon_optimizer", "peft", "test_data_parallel"])

    def start(*works, world=2, deaths=()):
        store = str(folder / uuid.uuid4().hex)
        works = [(config.model_dump(mode="json"), some) for config, some in works]  # its generic classes do not pickle
        before = {name: os.environ.get(name) for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")}
        os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
        ranks = [
            context.Process(target=be_a_rank, args=(rank, world, store, works, dict(deaths).get(rank)))
            for rank in range(world)
        ]
        try:
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(SECONDS)
                assert rank.exitcode is not None, "a rank hangs"
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return all(rank.exitcode == 0 for rank in ranks)

    return start


def weights(run, task="colours"):
    folder = f"{run.root}/models/{task}"
    (name,) = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    return load_file(f"{folder}/{name}")


def told(run, task="colours"):
    found = run.get_json(f"models/{task}/model.json")
    return {name: value for name, value in found.items() if name not in ("seconds", "settings")}


def distance(some, others):
    """The norm of the difference of all tensors."""
    assert some.keys() == others.keys()
    return sum((some[name] - others[name]).square().sum() for name in some).sqrt().item()


def assert_alike(run, other, first, tolerance=1e-3):
    """The losses agree to 1e-5, and the weights to a share of their way from `first`.

    They cannot agree better: AdamW turns the sign of a gradient that is nearly nought into a step.
    """
    assert told(run)["losses"] == pytest.approx(told(other)["losses"], rel=1e-5)
    way = distance(weights(other), first)
    assert way > 0.01
    assert distance(weights(run), weights(other)) <= tolerance * way


def assert_equal(run, other):
    one, two = weights(run), weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert told(run) == told(other)


@pytest.fixture(scope="module")
def untrained(student):
    return load_file(student / "model.safetensors")


FULL = "models.method=full"
VARIANTS = {
    "zero 0": (FULL, "models.zero_stage=0"),
    "zero 1": (FULL, "models.zero_stage=1"),
    "zero 2": (FULL, "models.zero_stage=2"),
    "zero 3": (FULL, "models.zero_stage=3"),
    "lora, zero 0": ("models.rank=3", "models.dropout=0.1"),
    "lora, zero 3": ("models.rank=3", "models.zero_stage=3"),
}
ALL = pytest.mark.parametrize("variant", VARIANTS)
WHOLE = pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("lora")])


@pytest.fixture(scope="module")
def calm(planned, group):
    """Every variant, learned by two workers and disturbed by nothing."""
    made = {name: planned(*overrides) for name, overrides in VARIANTS.items()}
    assert group(*[(config, [COLOURS]) for config, _ in made.values()])
    assert [failures(run) for _, run in made.values()] == [[]] * len(made)
    return {name: run for name, (_, run) in made.items()}


# --- what is learned


def plain_loop(config, run, task):
    """The task's losses and weights after plain torch: AdamW, clipping and schedule, one sequence after the other."""
    rows = [row for row in run.read_all("trainset").to_pylist() if row["task"] == task]
    tokenizer = StudentTokenizer(config.student)
    model = AutoModelForCausalLM.from_pretrained(config.student.model, dtype=torch.float32).train()
    plan = list(batches(len(rows), config.models, row_seed(config.seed, task, "train")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=config.models.weight_decay)
    sums = [[0.0, 0] for _ in range(config.models.epochs)]
    for step, (epoch, members) in enumerate(plan):
        optimizer.param_groups[0]["lr"] = 0.003 * rate_factor(step, len(plan), config.models)
        total, count = plain_step(model, optimizer, tokenizer, [rows[i] for i in members], config.models.clip)
        sums[epoch][0] += total
        sums[epoch][1] += count
    named = {name: tensor.detach() for name, tensor in model.named_parameters()}
    return [total / count for total, count in sums], named


@WHOLE
def test_two_workers_learn_what_a_plain_loop_teaches(planned, calm, untrained, variant):
    config, _ = planned(*VARIANTS[variant])
    losses, expected = plain_loop(config, calm[variant], "colours")
    assert told(calm[variant])["losses"] == pytest.approx(losses, rel=1e-5)
    way = distance(expected, untrained)
    assert way > 0.1
    assert distance(weights(calm[variant]), expected) <= 1e-3 * way


# --- deaths


@ALL
def test_a_group_killed_at_random_ends_the_same_bit_for_bit(planned, group, calm, variant):
    chance = random.Random(variant)
    config, run = planned(*VARIANTS[variant], "cluster.checkpoint_seconds=0")
    for dying in ({chance.randrange(2)}, {0, 1}):
        deaths = [(rank, Death(chance.choice(("step", "file")), chance.randint(2, 4))) for rank in dying]
        assert not group((config, [COLOURS]), deaths=deaths)
        assert run.trained() == []
    assert run.names(f"{UNFINISHED}/{COLOURS.name}/colours")
    assert group((config, [COLOURS]))
    assert failures(run) == []
    assert_equal(run, calm[variant])
    assert not run.names(UNFINISHED)


def test_fewer_or_more_workers_go_on_where_others_died(planned, group, calm, untrained):
    variants = ("zero 0", "zero 2", "zero 3")
    made = [planned(*VARIANTS[variant], "cluster.checkpoint_seconds=0") for variant in variants]
    for (config, run), (before, place) in zip(made, [(2, 5), (2, 7), (1, 6)], strict=True):
        assert not group((config, [COLOURS]), world=before, deaths=[(0, Death("step", place))])
        note = run.get_json(f"{UNFINISHED}/{COLOURS.name}/colours/latest.json")
        assert (note["world"], note["step"]) == (before, place - 1)
    assert group(*[(config, [COLOURS]) for config, _ in made[:2]], world=1)
    assert group((made[2][0], [COLOURS]), world=2)
    for variant, (_, run) in zip(variants, made, strict=True):
        assert told(run)["steps"] == 12
        assert_alike(run, calm[variant], untrained)


# --- passes


def test_a_batch_is_cut_into_passes_that_all_ranks_take():
    pairs = [Pair((i,) * length, (1,)) for i, length in enumerate((3, 9, 4, 4, 4))]
    assert passes(pairs, 1, 100) == [[pairs]]
    assert passes(pairs, 2, 100) == [[[pairs[0], pairs[2], pairs[4]], [pairs[1], pairs[3]]]]
    cut = passes(pairs, 2, 10)
    assert cut == [[[pairs[0], pairs[2]], [pairs[1]]], [[pairs[4]], [pairs[3]]]]
    assert passes(pairs[:1], 3, 1) == [[[pairs[0]], [], []]]


def test_small_passes_checkpointing_and_padding_learn_the_same(planned, group, calm, student, tmp_path, untrained):
    plain = ("zero 0", "zero 1", "zero 2", "zero 3", "lora, zero 3")
    small = {name: planned(*VARIANTS[name], "cluster.tokens_per_pass=1") for name in plain}
    again = {name: planned(*VARIANTS[name], "models.gradient_checkpointing=true") for name in plain}
    # The same weights under a name of which a layout without padding could not be true.
    shutil.copytree(student, tmp_path / "window")
    shape = json.loads((student / "config.json").read_text())
    told_of = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 600}
    (tmp_path / "window" / "config.json").write_text(json.dumps(shape | told_of))
    padded = {name: planned(*VARIANTS[name], f"student.model={tmp_path / 'window'}") for name in ("zero 0", "zero 3")}
    assert group(*[(config, [COLOURS]) for some in (small, again, padded) for config, _ in some.values()])
    for some in (small, again, padded):
        for name, (_, run) in some.items():
            assert failures(run) == []
            first = untrained if "lora" not in name else {n: torch.zeros_like(x) for n, x in weights(run).items()}
            assert_alike(run, calm[name], first)


# --- one task after the other


def test_a_task_learns_the_same_after_another_on_the_same_sharded_base(planned, group, calm):
    config, run = planned(*VARIANTS["lora, zero 3"])
    assert group((config, [Pack((("sizes", "00000"),), 1), COLOURS]))
    assert run.trained() == ["colours", "sizes"]
    assert_equal(run, calm["lora, zero 3"])


def test_the_best_epoch_is_kept_through_deaths(planned, group):
    overrides = (*VARIANTS["zero 3"], "models.validation=0.3", "models.schedule=constant", "models.learning_rate=0.03")
    longer = (*overrides, "models.epochs=9", "models.patience=2", "models.batch_size=2")
    config, run = planned(*longer)
    killed_config, killed = planned(*longer, "cluster.checkpoint_seconds=0")
    assert group((config, [COLOURS]))
    facts = told(run)
    losses, best = facts["validation_losses"], facts["epoch"]
    assert best == losses.index(min(losses)) + 1
    assert len(facts["losses"]) == len(losses) == best + 2 < 9
    assert (facts["pairs"], facts["steps"]) == (7, 3 * len(losses))
    # Training that ends with the best epoch ends with the same weights.
    short_config, short = planned(*longer, f"models.epochs={best}", "models.keep=last", "models.patience=0")
    assert not group((killed_config, [COLOURS]), deaths=[(0, Death("step", 3 * best + 3))])
    assert group((killed_config, [COLOURS]), (short_config, [COLOURS]))
    assert_equal(killed, run)
    one, two = weights(short), weights(run)
    assert all(torch.equal(one[name], two[name]) for name in two)


# --- errors

# A single step, after which no loss is looked at.
LAST_STEP = ("models.epochs=1", "models.batch_size=9", "models.learning_rate=3.0e+38", "models.clip=1.0e+38")
WRONG = {
    "the loss is": (FULL, "models.learning_rate=3.0e+38", "models.zero_stage=3"),
    "the gradient is not finite": (FULL, "models.learning_rate=1.0e+30", "models.zero_stage=3"),
    "some of its weights are not finite": (FULL, *LAST_STEP, "models.zero_stage=0"),
    "fits no module": ("models.target_modules=[nowhere]", "models.zero_stage=2"),
    "DeepSpeed does not accept": (FULL, "models.deepspeed={zero_optimization: {stage: 9}}"),
    "does not accept": (FULL, "models.zero_stage=3", "models.deepspeed={zero_optimization: {reduce_bucket_size: -1}}"),
}


def test_a_task_that_cannot_be_learned_is_explained_and_the_group_goes_on(planned, group, calm):
    made = {told_of: planned(*overrides) for told_of, overrides in WRONG.items()}
    config, run = planned(*VARIANTS["zero 2"])
    nothing = Pack((("unheard of", "00000"),), 1)
    assert group(*[(wrong, [COLOURS]) for wrong, _ in made.values()], (config, [nothing, COLOURS]))
    for told_of, (_, failed) in made.items():
        assert_explained(failed, "colours", told_of)
    assert_explained(run, "unheard of", "there is no pair to learn from")
    assert_equal(run, calm["zero 2"])


def assert_explained(run, task, told_of):
    assert [unit for _, unit, _ in failures(run)] == [task]
    what, why, instead = run.get(f"failures/models/{task}.txt").decode().split("\n\n")[0].split("\n")
    assert told_of in what
    assert why.startswith("  why: ")
    assert instead.startswith("  instead: ")
