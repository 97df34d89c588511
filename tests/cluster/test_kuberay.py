"""The manifests: fields that KubeRay knows, commands that rayrl understands, pools that suffice.

Nothing here runs on Kubernetes.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rayrl import cli
from rayrl.config import Config, stage_config
from rayrl.run.start_check import LEARNING, Machine, stage_problems
from tests.documents import ROOT

FOLDER = ROOT / "jobs" / "kuberay"
SCHEMA = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
JOBS = ("cpu.yaml", "gpu.yaml")


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text("utf-8"))
    return found


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The head and the pools of workers."""
    spec = job["spec"]["rayClusterSpec"]
    return [{"groupName": "head", **spec["headGroupSpec"]}, *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only  # type: ignore[no-any-return]


def has(group: dict[str, Any]) -> dict[str, float]:
    """What one pod of a group offers to Ray."""
    given, limits = group["rayStartParams"], container(group)["resources"]["limits"]
    # KubeRay hands it to a shell, in quotes
    custom = json.loads(json.loads(given.get("resources", "'\"{}\"'").strip("'")))
    cpus = float(given.get("num-cpus", limits["cpu"]))
    return {"CPU": cpus, "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}


def configuration(job: dict[str, Any]) -> Config:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "rayrl"]
    return cli.configuration(cli.parse(words[3:]))


def asked(config: Config, verb: str) -> Iterator[dict[str, float]]:
    """What each process of a stage reserves."""
    c = config.cluster
    if verb != "sft":
        worker = {"CPU": c.env_worker_cpus, **c.env_worker_resources}
        yield from [worker] * c.most_env_workers
        replica = {"CPU": c.replica_cpus, "GPU": c.replica_gpus, **c.replica_resources}
        yield from [replica] * c.replicas
    if verb in LEARNING:
        rank = {"CPU": c.learner_cpus, "GPU": c.learner_gpus, **c.learner_resources}
        yield from [rank] * config.learner.world_size


@pytest.mark.parametrize("name", JOBS)
def test_kuberay_knows_every_field(name: str) -> None:
    job = manifest(name)
    check = jsonschema.Draft202012Validator(SCHEMA)
    assert [error.message for error in check.iter_errors(job)] == []
    wrong = copy.deepcopy(job)
    wrong["spec"]["shutdownAfterJobFinished"] = True
    wrong["spec"]["backoffLimit"] = "3"
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]["minReplica"] = 1
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert len(list(check.iter_errors(wrong))) == 4


@pytest.mark.parametrize("name", JOBS)
def test_a_lost_cluster_is_made_again_and_the_run_is_still_there(name: str) -> None:
    job = manifest(name)
    spec, config = job["spec"], configuration(job)
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    claim = yaml.safe_load((FOLDER / "storage.yaml").read_text("utf-8"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(job):
        mounts = {one["name"]: one["mountPath"] for one in container(group)["volumeMounts"]}
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        assert mounts.keys() == volumes.keys()
        shared = volumes["data"]["persistentVolumeClaim"]["claimName"]
        assert shared == claim["metadata"]["name"]
        assert Path(config.run.dir).is_relative_to(mounts["data"])
        model = config.model.path
        assert model == "embedded" or Path(model).is_relative_to(mounts["data"])


@pytest.mark.parametrize("name", JOBS)
def test_the_pools_have_what_every_stage_reserves(name: str) -> None:
    """Placed one by one, the greediest first, at the most pods that a pool may have."""
    job = manifest(name)
    config = configuration(job)
    for stage in config.recipe:
        ready = stage_config(config, stage)
        pods = [has(group) for group in groups(job) for _ in range(group.get("maxReplicas", 1))]
        for needs in sorted(asked(ready, stage.verb), key=lambda one: -sum(one.values())):
            room = [p for p in pods if all(p.get(k, 0) >= n for k, n in needs.items())]
            assert room, f"{stage.name}: no pod has {needs}"
            for key, amount in needs.items():
                room[0][key] = room[0].get(key, 0) - amount


@pytest.mark.parametrize("name", JOBS)
def test_only_the_pool_of_env_workers_grows(name: str) -> None:
    job = manifest(name)
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]
    grow = {
        group["groupName"]
        for group in groups(job)[1:]
        if group["minReplicas"] < group["maxReplicas"]
    }
    assert grow == {"play"}
    config = configuration(job)
    (play,) = (group for group in groups(job) if group["groupName"] == "play")
    assert config.cluster.env_worker_resources == {"play": 1}
    assert play["minReplicas"] * has(play)["play"] >= config.cluster.env_workers
    assert play["maxReplicas"] * has(play)["play"] == config.cluster.env_workers_max
    assert has(play)["GPU"] == 0
    assert play["minReplicas"] <= play["replicas"] <= play["maxReplicas"]
    others = {key for group in groups(job) if group is not play for key in has(group)}
    assert "play" not in others


@pytest.mark.parametrize(("name", "gpus"), [("cpu.yaml", 0), ("gpu.yaml", 4)])
def test_the_plan_fits(name: str, gpus: int) -> None:
    job = manifest(name)
    config = configuration(job)
    pods = [has(group) for group in groups(job) for _ in range(group.get("maxReplicas", 1))]
    cpus = int(sum(pod["CPU"] for pod in pods))
    assert sum(pod["GPU"] for pod in pods) == gpus
    small = []
    for stage in config.recipe:
        ready = stage_config(config, stage)
        assert not [
            problem
            for problem in stage_problems(ready, Machine(cpus, gpus, 64), stage.verb)
            if "reserved" in problem
        ]
        small += [
            problem
            for problem in stage_problems(ready, Machine(1, 0, 64), stage.verb)
            if "reserved" in problem
        ]
    assert small, "it is a plan of several machines"


@pytest.mark.parametrize("name", JOBS)
def test_versions_and_sizes_agree(name: str) -> None:
    job = manifest(name)
    pins = (ROOT / "constraints.txt").read_text("utf-8")
    assert f"ray=={job['spec']['rayClusterSpec']['rayVersion']}\n" in pins
    images = {container(group)["image"] for group in groups(job)}
    assert len(images) == 1
    tag = images.pop().removeprefix("REGISTRY/")
    dockerfile = (FOLDER / "Dockerfile").read_text("utf-8")
    assert re.search(rf"-t REGISTRY/{tag} ", dockerfile), "the image that the Dockerfile makes"
    assert tag.startswith(f"rayrl:{PROJECT['version']}")
    assert "EXTRAS=vllm" in dockerfile
    assert "vllm" in PROJECT["optional-dependencies"]
    for group in groups(job):
        size = container(group)["resources"]
        assert size["requests"] == size["limits"]
        shm = group["template"]["spec"]["volumes"][1]["emptyDir"]["sizeLimit"]
        assert int(shm.removesuffix("Gi")) <= int(size["limits"]["memory"].removesuffix("Gi")) / 2
