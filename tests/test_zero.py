"""What a user says of workers and of DeepSpeed, and what becomes of it."""

import json

import pytest
import torch

from selfguide_ray.config import Config
from selfguide_ray.config_file import load
from selfguide_ray.errors import SelfGuideError
from selfguide_ray.tuning import packs_tasks
from selfguide_ray.tuning.zero import Zero


def test_workers_are_a_number_or_a_range():
    assert load(overrides=["cluster.workers=3"]).cluster.workers == 3
    assert load(overrides=["cluster.workers=[1, 4]"]).cluster.workers == (1, 4)
    ranged = load(overrides=["cluster.workers=[1, 4]"])
    assert Config.model_validate(ranged.model_dump(mode="json")) == ranged
    assert packs_tasks(load(overrides=["cluster.workers=[1, 1]"]))


ALONE = [
    "cluster.workers=[1, 2]",
    "models.zero_stage=1",
    "models.deepspeed={train_batch_size: 8}",
    "models.dropout=0.1",
]


@pytest.mark.parametrize("setting", [*ALONE, "models.gradient_checkpointing=true", "models.method=full"])
def test_what_a_pack_cannot_do_is_done_task_by_task(setting):
    assert not packs_tasks(load(overrides=[setting]))


@pytest.mark.parametrize("value", ["0", "[0, 2]", "[3, 2]", "[1, 2, 3]", "[1]", "many", "1.5", "true", "[1, two]"])
def test_a_wrong_number_of_workers_is_explained(value):
    with pytest.raises(SelfGuideError) as caught:
        load(overrides=[f"cluster.workers={value}"])
    assert caught.value.what.startswith("command line: cluster.workers is ")
    assert "[fewest, most]" in caught.value.why
    assert caught.value.instead.startswith("cluster.workers: Workers in a group")


def test_deepspeed_settings_come_from_a_file_or_the_config(tmp_path):
    path = tmp_path / "zero.json"
    keys = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "train_batch_size": 8}
    path.write_text(json.dumps(keys))
    config = load(overrides=[f"models.deepspeed={path}"])
    assert config.models.deepspeed == keys
    path.unlink()  # the run depends on the keys, not on the file
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert load(overrides=["models.deepspeed={train_batch_size: 8}"]).models.deepspeed == {"train_batch_size": 8}


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "cannot be read"), (b"{", "is no JSON"), (b"\xff", "is no JSON"), (b"[1]", "holds a list")],
)
def test_a_wrong_file_of_deepspeed_settings_is_explained(tmp_path, content, what):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SelfGuideError) as caught:
        load(overrides=[f"models.deepspeed={path}"])
    assert caught.value.what.startswith(f"models.deepspeed: {path} {what}")
    assert caught.value.why
    assert caught.value.instead


def test_the_users_keys_go_over_ours_inside_a_section_too():
    keys = "{zero_optimization: {sub_group_size: 7}, train_micro_batch_size_per_gpu: 9}"
    config = load(overrides=["models.zero_stage=3", "models.clip=0.5", f"models.deepspeed={keys}"])
    settings = Zero(config.models, torch.float32, 2).configuration()
    assert settings["zero_optimization"] == {"stage": 3, "sub_group_size": 7}
    assert settings["train_micro_batch_size_per_gpu"] == 9
    assert settings["gradient_clipping"] == 0.5
