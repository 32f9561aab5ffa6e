"""A search shares what its points have alike, chooses by validation alone, and stops what has no chance."""

import json

import pytest
from recording import RecordingEngine

from selfguide_ray import executor, method, trainer
from selfguide_ray.config_file import load, read
from selfguide_ray.embedded import resolve
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.executor import ShardWorker
from selfguide_ray.models import learn
from selfguide_ray.run import Run
from selfguide_ray.search import Search, points
from selfguide_ray.search.ablation import Ablation, ablate, configs
from selfguide_ray.search.command import page, search
from selfguide_ray.search.selection import choose, hopeless
from selfguide_ray.search.walk import CHOSEN, Walk

BASE = """
student: {engine: scripted}
tasks: {select: "example00[1256]*", per_shard: 1, instances: 20, validation: 20}
inputs: {rounds: 20, prompts_per_round: 5, length_slack: 0.5}
outputs: {samples: 4}
trainset: {keep: 4, length_slack: 0.5}
models: {epochs: 1}
scores: {bootstrap: 0}
"""
TWELVE = {
    "inputs.temperature": [0.6, 1.0],
    "trainset.min_frequency": [0.3, 0.6],
    "models.epochs": [1, 2, 3],
}


@pytest.fixture
def engine(monkeypatch):
    """Jobs run in this process, on one engine that counts."""
    one = RecordingEngine()

    def map_shards(config, shards, stages, make_engine, permit=executor.always):
        worker = ShardWorker(config, stages, lambda: one, permit)
        for shard in shards:
            yield from worker.work(shard)

    def train_packs(config, packs, permit=executor.always):
        learn(config, packs)
        for pack in packs:
            yield from ((task, Run(config.run).exists(f"models/{task}/model.json")) for task, _ in pack.tasks)

    monkeypatch.setattr(executor, "connect", lambda: None)
    monkeypatch.setattr(executor, "map_shards", map_shards)
    monkeypatch.setattr(trainer, "train_packs", train_packs)
    return one


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def settings(base, **given):
    return Search.model_validate({"run": str(base.parent / "search"), "base": str(base), "grid": TWELVE, **given})


def test_twelve_points_ask_the_engine_for_a_quarter_of_what_twelve_runs_do(base, engine, tmp_path):
    walk = Walk(settings(base, stop=False))
    told = walk.go()
    shared = len(engine.requests)
    engine.requests.clear()
    for number, point in enumerate(points(settings(base))):
        config = load(base, [f"run={tmp_path}/alone/{number}", "predictions.instances=validation"])
        parts = {name: getattr(point.config, name) for name in ("inputs", "trainset", "models")}
        method.perform(config.model_copy(update=parts), method.SELFGUIDE)
    assert len(told["points"]) == 12
    assert all(row["scored"] == 4 for row in told["points"])
    assert shared <= len(engine.requests) / 4
    # What is shared is what the point would have made alone.
    first = walk.points[0]
    for table in ("inputs", "trainset", "predictions"):
        mine, alone = Run(first.config.run), Run(f"{tmp_path}/alone/0")
        rows = [
            row for row in alone.read_all(table).to_pylist() if table != "predictions" or row["system"] == "selfguide"
        ]
        assert mine.read_all(table).to_pylist() == rows


def test_points_like_the_base_share_what_no_baseline_makes(base, engine):
    """The baselines' runs have the same settings for inputs as the points, and make none."""
    told = Walk(settings(base, grid={"models.epochs": [1, 2]})).go()
    writing = [r.seed for r in engine.requests if engine.tokenizer.decode(r.prefix + r.suffix).endswith("ITEM:")]
    assert len(writing) == len(set(writing)) == 4 * 20 * 5
    # Four shards each for the second point and for the run, or runs, of the choice.
    assert told["taken_over"]["inputs"] == 4 + len(set(told["chosen"].values())) * 4


def test_a_search_that_is_started_again_makes_nothing_again(base, engine):
    grid = {"models.epochs": [1, 2]}
    told = Walk(settings(base, grid=grid)).go()
    engine.requests.clear()
    again = Walk(settings(base, grid=grid)).go()
    assert engine.requests == []
    assert again | {"taken_over": 0} == told | {"taken_over": 0}


def test_the_choice_is_written_before_a_held_out_instance_is_looked_at(base, engine):  # statement 25
    looked = []
    put = Run.put

    def watch(run, relative, data, replace=True):
        looked.append((run.root, relative))
        return put(run, relative, data, replace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "put", watch)
        walk = Walk(settings(base, grid={"models.epochs": [1, 2]}))
        walk.go()
    root = walk.run.root
    before = looked[: looked.index((root, CHOSEN))]
    assert not [where for where, _ in before if "/chosen/" in where or where.endswith("held_out")]
    assert [where for where, _ in looked if where.endswith("baselines/held_out")]


def test_the_choice_is_the_same_whatever_is_held_out(engine, tmp_path):  # statement 25
    def chosen(name, change):
        """The choice over three test tasks, whose first instances are held out, once these have been changed."""
        folder = tmp_path / name
        (folder / "tasks").mkdir(parents=True)
        (folder / "splits" / "default").mkdir(parents=True)
        names = [path.stem for path in sorted(resolve("embedded/tasks").glob("example00[156]*"))]
        (folder / "splits" / "default" / "test_tasks.txt").write_text("\n".join(names))
        for task in names:
            document = json.loads((resolve("embedded/tasks") / f"{task}.json").read_text())
            for instance in document["Instances"][:20]:
                change(instance)
            (folder / "tasks" / f"{task}.json").write_text(json.dumps(document))
        (folder / "base.yaml").write_text(BASE.replace("select:", f"source: {folder}/tasks, select:"))
        found = settings(folder / "base.yaml", grid={"trainset.min_frequency": [0.3, 0.6], "models.epochs": [1, 2]})
        told = Walk(found).go()
        return told["chosen"], [row["gain"] for row in told["points"]], told["judged"]

    plain = chosen("plain", lambda instance: None)
    changed = chosen("changed", lambda instance: instance.update(input="nothing", output=["quite another answer"]))
    assert plain[:2] == changed[:2]
    assert plain[2] != changed[2]


def test_the_report_tells_points_and_the_choice_and_escapes_text(base, engine, capsys):
    path = base.parent / "search.yaml"
    path.write_text(json.dumps({"run": str(base.parent / "s"), "base": str(base), "grid": {"models.epochs": [1, 2]}}))
    assert search([str(path)]) == 0
    html = (base.parent / "s" / "search.html").read_text()
    told = json.loads((base.parent / "s" / "search.json").read_text())
    for row in told["points"]:
        assert row["label"] in html
    assert set(told["chosen"]) == set(told["judged"]) == set(told["tasks"])
    assert all(
        set(scores) == {"copy", "majority", "zero_shot", "few_shot", "selfguide"} for scores in told["judged"].values()
    )
    assert "gain over few_shot" in capsys.readouterr().out
    told["points"][0]["label"] = "<script>"
    assert "<script>" not in page(told)


# --- the rules


FOUND = {"a": {"t1": 60.0, "t2": 40.0, "g": 30.0}, "b": {"t1": 52.0, "t2": 50.0, "g": 20.0}, "c": {"t1": 90.0}}
RIVAL = {"t1": 50.0, "t2": 45.0, "g": 25.0}
FAMILIES = [["t1", "t2"], ["g"]]


def test_one_point_for_all_has_the_best_gain_on_its_worst_task():
    # a: +10 and -5; b: +2 and +5; c is not through.
    assert choose("one_for_all", FOUND, RIVAL, FAMILIES) == {"t1": "b", "t2": "b", "g": "a"}


def test_each_task_has_its_best_point():
    assert choose("per_task", FOUND, RIVAL, FAMILIES) == {"t1": "c", "t2": "b", "g": "a"}


def test_a_tie_goes_to_the_larger_mean_and_then_to_the_first():
    found = {"a": {"t": 5.0, "u": 5.0}, "b": {"t": 5.0, "u": 9.0}, "c": {"t": 5.0, "u": 9.0}}
    assert choose("one_for_all", found, {"t": 0.0, "u": 0.0}, [["t", "u"], []]) == {"t": "b", "u": "b"}


def test_a_point_is_stopped_when_it_is_behind_for_certain():
    good, bad, near = [100.0] * 30, [0.0] * 30, [100.0] * 29 + [0.0]
    found = {"lead": {"t": good, "u": good}, "bad": {"t": bad, "u": good}, "near": {"t": good, "u": near}}
    stopped = hopeless(found, seed=0)
    assert set(stopped) == {"bad"}
    leader, upper = stopped["bad"]
    assert (leader, upper) == ("lead", -50.0)
    assert hopeless({}, seed=0) == hopeless({"only": {"t": good}}, seed=0) == {}
    assert hopeless({"lead": {"t": good}, "other": {"u": bad}}, seed=0) == {}  # nothing to compare


def test_a_stopped_point_goes_no_further(base, engine, monkeypatch):
    monkeypatch.setattr("selfguide_ray.search.walk.hopeless", lambda found, seed: {last(found): ("x", -3.0)})

    def last(found):
        return list(found)[-1]

    told = Walk(settings(base, grid={"models.epochs": [1, 2]})).go()
    kept, stopped = told["points"]
    assert (kept["scored"], stopped["scored"]) == (4, 2)
    assert stopped["stopped"] == {"leader": "x", "upper": -3.0, "shards": 2}
    assert set(told["chosen"].values()) == {kept["name"]}


def test_weights_that_did_not_stay_are_learned_again_for_the_held_out_instances(base, engine):
    walk = Walk(settings(base, grid={"models.epochs": [1]}, settings={"models.keep": "none"}))
    told = walk.go()
    assert walk.sharing.left() == []
    assert told["taken_over"]["models"] == 0
    assert all("selfguide" in scores for scores in told["judged"].values())


# --- what is refused


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"grid": {}}, "grid: holds nothing to search."),
        ({"grid": {"models.epochs": []}}, "grid: holds nothing to search."),
        ({"grid": {"tasks.instances": [1, 2]}}, "grid: tasks.instances cannot be searched."),
        ({"rival": "selfguide"}, "rival: selfguide, baselines: copy, majority, zero_shot, few_shot."),
        ({"grid": {"models.epoch": [1]}}, "command line: models.epoch is not a setting."),
        ({"settings": {"tasks.validation": 0}}, "tasks.validation: is 0."),
    ],
)
def test_a_search_that_makes_no_sense_is_explained(base, given, what):
    with pytest.raises(SelfGuideError) as caught:
        points(settings(base, **given))
    assert caught.value.what == what


def test_the_search_of_the_paper_is_read():
    found = points(read(Search, "configs/search.yaml"))
    assert len(found) == 5 * 2 * 2 * 3
    assert len({point.name for point in found}) == len(found)


def test_a_points_name_does_not_depend_on_the_rest_of_the_grid(base):
    few = points(settings(base, grid={"models.epochs": [2]}))
    many = points(settings(base, grid={"models.epochs": [1, 2, 3]}))
    assert few[0].name == many[1].name


# --- ablations


def test_an_ablation_shares_what_is_not_changed_and_compares_with_the_base(base, engine, capsys):
    path = base.parent / "ablation.yaml"
    variants = {"strict": {"trainset.min_frequency": 0.9}, "again": {"outputs.guided_by": "{base}"}}
    given = {"run": str(base.parent / "a"), "base": str(base), "variants": variants, "seeds": [0, 1]}
    path.write_text(json.dumps(given))
    assert ablate([str(path)]) == 0
    told = json.loads((base.parent / "a" / "ablation.json").read_text())
    names = [f"{base.parent}/a/{name}-{seed}" for name in ("base", "strict", "again") for seed in (0, 1)]
    for family in told["families"]:
        assert [run for group in family["groups"] for run in group["runs"]] == names
        assert [group["over_first"] is None for group in family["groups"]] == [True, False, False]
    for seed in (0, 1):
        first, *others = (Run(f"{base.parent}/a/{name}-{seed}") for name in ("base", "strict", "again"))
        for other in others:
            assert other.read_all("inputs").equals(first.read_all("inputs"))
        assert others[0].read_all("outputs").equals(first.read_all("outputs"))
        assert not others[1].read_all("outputs").equals(first.read_all("outputs"))
    answering = {request.adapter for request in engine.requests if request.params.n == 4}
    assert {str(adapter).split("/a/")[-1].split("/")[0] for adapter in answering} == {"None", "base-0", "base-1"}
    assert "over the first" in capsys.readouterr().out
    engine.requests.clear()
    assert ablate([str(path)]) == 0
    assert engine.requests == []


@pytest.mark.parametrize("variants", [{}, {"base": {}}, {"a/b": {}}])
def test_an_ablation_without_proper_names_is_refused(base, variants):
    with pytest.raises(SelfGuideError, match=r"^variants: "):
        configs(Ablation.model_validate({"base": str(base), "variants": variants}))
