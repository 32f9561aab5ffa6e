"""The cluster files: valid to Ray and KubeRay, from zero, spot, closed, and enough for a run's parts to find a place."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from selfguide_ray import __version__
from selfguide_ray.config_file import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "clusters"
LAUNCHED = {"aws": ROOT / "cluster.yaml", "gcp": FOLDER / "gcp.yaml"}
RAYJOB = FOLDER / "rayjob.yaml"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())
PORT = "8265"  # of the dashboard, where jobs are submitted
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def read(path):
    return yaml.safe_load(path.read_text())


def group(spec, name):
    """A group of the RayJob's workers."""
    return next(g for g in spec["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == name)


def node_types(name):
    """Node types as Ray's autoscaler sees them, by its own reading of the file."""
    if name == "kuberay":
        from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

        return _generate_available_node_types_from_ray_cr_spec(read(RAYJOB)["spec"]["rayClusterSpec"])
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(read(LAUNCHED[name]))["available_node_types"]


def refuses(config):
    """Whether Ray's launcher refuses a file, before it asks the cloud anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(config))
    except (jsonschema.ValidationError, ValueError):
        return True
    return False


@pytest.mark.parametrize("cloud", LAUNCHED)
def test_rays_launcher_takes_the_file_and_would_not_take_a_misspelt_one(cloud):
    config = read(LAUNCHED[cloud])
    assert not refuses(copy.deepcopy(config))
    assert refuses(copy.deepcopy(config) | {"idle_timeout_minuts": 5})
    config["available_node_types"]["gpu"]["max_worker"] = 3
    assert refuses(config)


@pytest.mark.parametrize("cloud", LAUNCHED)
def test_the_launcher_installs_nothing_of_its_own_on_a_node(cloud):
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(read(LAUNCHED[cloud]))
    commands = prepared["setup_commands"] + prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    assert [command for command in commands if "pip" in command or "ray" in command.split()] == []


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_head_and_gpu_nodes_offer_no_cpu_and_a_group_that_does_starts_from_zero(name):
    types = node_types(name)
    head = types.pop("head" if name in LAUNCHED else "headgroup")
    assert (head["resources"]["CPU"], head["resources"].get("GPU", 0), head["max_workers"]) == (0, 0, 0)
    assert set(types) == {"gpu", "cpu"}
    assert [kind["min_workers"] for kind in types.values()] == [0, 0]
    assert (types["gpu"]["resources"]["CPU"], types["gpu"]["resources"]["GPU"]) == (0, 1)
    assert types["cpu"]["resources"]["CPU"] >= 1
    assert types["cpu"]["resources"].get("GPU", 0) == 0
    assert 1 <= types["cpu"]["max_workers"] < types["gpu"]["max_workers"]


@pytest.mark.parametrize("cloud", LAUNCHED)
def test_the_launchers_limit_leaves_room_for_all_groups(cloud):
    config = read(LAUNCHED[cloud])
    most = sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    assert config["max_workers"] == most
    assert config["upscaling_speed"] >= config["available_node_types"]["gpu"]["max_workers"]
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_workers_are_spot_and_the_head_is_not():
    aws = {name: kind["node_config"] for name, kind in read(LAUNCHED["aws"])["available_node_types"].items()}
    gcp = {name: kind["node_config"] for name, kind in read(LAUNCHED["gcp"])["available_node_types"].items()}
    for name in ("gpu", "cpu"):
        assert aws[name]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert gcp[name]["scheduling"]["provisioningModel"] == "SPOT"
        assert "spot" in group(read(RAYJOB)["spec"], name)["template"]["spec"]["nodeSelector"].values()
    assert "InstanceMarketOptions" not in aws["head"]
    assert "scheduling" not in gcp["head"]
    assert "nodeSelector" not in read(RAYJOB)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


@pytest.mark.parametrize("cloud", LAUNCHED)
def test_the_dashboard_listens_on_the_head_alone(cloud):
    config = read(LAUNCHED[cloud])
    starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert len(starts) == 1
    assert re.findall(r"--dashboard-host[= ](\S+)", starts[0]) == ["127.0.0.1"]
    assert "--head" in starts[0].split()
    assert "ports" not in json.dumps(config["docker"])
    settings = json.dumps({key: value for key, value in config.items() if key != "head_start_ray_commands"})
    assert PORT not in settings
    assert "0.0.0.0" not in json.dumps(config)
    assert "security_group" not in config["provider"]  # Ray's own opens SSH, and all ports among the nodes


def test_nothing_leads_from_outside_to_the_rayjobs_dashboard():
    head = read(RAYJOB)["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress", False)


@pytest.mark.parametrize("path", [*LAUNCHED.values(), RAYJOB], ids=lambda path: path.name)
def test_no_secret_is_in_a_file(path):
    secret = re.compile(
        r"(?i)(aws_(secret_)?access_key|AKIA[0-9A-Z]{12}|hf_[a-z0-9]{8}|password|ssh_private_key|token:)"
    )
    assert secret.findall(path.read_text()) == []


def test_kubernetes_takes_the_rayjob():
    jsonschema.validate(read(RAYJOB), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.submissionMod", "K8sJobMode"),
        ("spec.submissionMode", "JobMode"),
        ("spec.backoffLimit", "3"),
        ("spec.activeDeadlineSeconds", 0),
        ("spec.shutdownAfterJobFinishes", False),
        ("spec.rayClusterSpec.autoscalerOptions.version", 2),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeoutMinutes", 5),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.minReplica", 0),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.resources.limits.memory", "48 GB"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers", []),
        ("metadata.name", "SelfGuide"),
    ],
)
def test_the_schema_refuses_what_kubernetes_or_kuberay_would(path, value):
    broken = read(RAYJOB)
    *parents, last = path.split(".")
    inner = broken
    for part in parents:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_rayjob_ends_is_tried_again_and_goes_away():
    spec = read(RAYJOB)["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > 24 * 3600
    assert spec["shutdownAfterJobFinishes"]
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"]
    assert spec["rayClusterSpec"]["autoscalerOptions"]["version"] == "v2"


def test_every_mount_of_a_pod_has_its_volume_and_no_pod_runs_as_root():
    spec = read(RAYJOB)["spec"]["rayClusterSpec"]
    for part in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = part["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        containers = pod.get("initContainers", []) + pod["containers"]
        assert {mount["name"] for c in containers for mount in c.get("volumeMounts", [])} == volumes
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000


def test_the_jobs_command_is_one_that_the_image_holds():
    interpreter, script, config, *overrides = shlex.split(read(RAYJOB)["spec"]["entrypoint"])
    place = "/home/ray/selfguide/"
    assert interpreter == "python"
    assert script.startswith(place)
    assert config.startswith(place)
    assert (ROOT / script.removeprefix(place)).is_file()
    loaded = load(ROOT / config.removeprefix(place), overrides)
    mounts = read(RAYJOB)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert loaded.tasks.source == f"{mounts[0]['mountPath']}/tasks"
    assert f"WORKDIR {place.rstrip('/')}\n" in DOCKERFILE


@pytest.mark.parametrize("name", [*LAUNCHED, "kuberay"])
def test_the_suites_settings_ask_for_what_the_gpu_nodes_offer(name):
    cluster = load(ROOT / "configs" / "suite-lora.yaml").cluster
    gpu = node_types(name)["gpu"]
    offered = (gpu["resources"]["CPU"], gpu["resources"]["GPU"])
    assert (cluster.cpus_per_engine, cluster.gpus_per_engine) == offered
    assert (cluster.cpus_per_worker, cluster.gpus_per_worker) == offered
    assert cluster.engines == gpu["max_workers"]
    assert cluster.groups * cluster.workers == gpu["max_workers"]


def test_a_runs_home_is_a_bucket_that_all_nodes_reach():
    assert load(ROOT / "configs" / "suite-lora.yaml").run.startswith("s3://")
    assert "run=s3://" in read(RAYJOB)["spec"]["entrypoint"]
    types = read(LAUNCHED["aws"])["available_node_types"]
    assert all(kind["node_config"]["IamInstanceProfile"]["Name"] for kind in types.values())


def base_image():
    """(Ray's version, Python's version) of the image that ours is made from."""
    found = re.search(r"^ARG BASE=rayproject/ray[-a-z]*:(\d+\.\d+\.\d+)-py(\d)(\d+)-cu\d+$", DOCKERFILE, re.MULTILINE)
    return found[1], f"{found[2]}.{found[3]}"


def test_the_image_has_the_python_and_the_ray_that_the_package_asks_for():
    ray, python = base_image()
    wanted = re.search(r'^requires-python = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert python in SpecifierSet(wanted)
    ours = next(Requirement(r) for r in re.findall(r'^    "(.+)",$', PYPROJECT, re.MULTILINE) if r.startswith("ray["))
    assert ray in ours.specifier
    assert read(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == ray


def test_the_image_installs_the_package_with_an_extra_that_there_is():
    installs = re.findall(r"^RUN pip install (.+)$", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 1
    ours = [word for word in shlex.split(installs[0]) if word.startswith(".")]
    named = re.fullmatch(r"\.\[(.+)\]", ours[0])[1].split(",")
    section = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    there = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    assert len(ours) == 1
    assert "vllm" in named
    assert set(named) <= there - {"dev"}


def test_the_image_copies_what_there_is_and_runs_as_nobody_special():
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert {"selfguide_ray", "pyproject.toml", "jobs", "configs"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000"


def test_all_files_name_one_image_of_this_version():
    images = {read(path)["docker"]["image"] for path in LAUNCHED.values()}
    images |= set(re.findall(r"image: (\S+)", RAYJOB.read_text()))
    assert images == {f"REGISTRY/selfguide-ray:{__version__}"}


def drive(folder):
    """Stages and a training group on the head and two GPU nodes of cluster.yaml, simulated, with no other node."""
    import ray
    import ray.train.torch
    from ray.cluster_utils import Cluster

    from selfguide_ray import trainer
    from selfguide_ray.method import perform, plan, synthesize
    from selfguide_ray.run import Run

    types = {name: kind["resources"] for name, kind in read(LAUNCHED["aws"])["available_node_types"].items()}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": types["head"]["CPU"]})
    for _ in range(2):
        cluster.add_node(num_cpus=types["gpu"]["CPU"], num_gpus=types["gpu"]["GPU"])
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    seen = {"CPU": ray.cluster_resources().get("CPU", 0), "GPU": ray.cluster_resources()["GPU"]}

    small = ["inputs.rounds=2", "inputs.prompts_per_round=4", "outputs.samples=2", "tasks.per_shard=1"]
    given = [f"run={folder / 'run'}", "student.model=embedded/nano", "student.engine=scripted", "cluster.engines=2"]
    tasks = ["tasks.source=embedded/tasks", "tasks.select=example00[12]*"]
    config = load(ROOT / "configs" / "suite-lora.yaml", [*given, *tasks, *small])
    seen["code"] = perform(config, [plan, synthesize])
    run = Run(config.run)
    seen["pairs"] = len(run.shards("trainset"))
    seen["shards"] = len(run.shards("tasks"))

    # There is no GPU for NCCL; gloo takes its place, and what is asked of the cluster stays the same.
    real = ray.train.torch.TorchConfig
    ray.train.torch.TorchConfig = lambda backend: real("gloo")
    note = folder / "node"
    trainer.fit(lambda: note.write_text(ray.get_runtime_context().get_node_id()), config.cluster, run, 0)
    seen["trained_on_head"] = note.read_text() == cluster.head_node.node_id
    (folder / "seen.json").write_text(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_and_training_find_their_place_where_no_node_offers_a_cpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = f"{ROOT}"
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=500, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == {"CPU": 0, "GPU": 2, "code": 0, "pairs": 2, "shards": 2, "trained_on_head": False}


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
