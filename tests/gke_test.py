"""tools.gke: manifests held to the schemas of Kubernetes (kubernetes-validate) and to JobSet's own fields; the Dockerfile."""

import copy
import json
import os
import pathlib
import re
import subprocess

import dockerfile_parse
import kubernetes_validate
import pytest
import yaml

from moe.errors import UserError
from tools import gke
from tools import launch_tpu_vm

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLACE = ["--name=first", "--project=p", "--zone=us-central1-a", "--bucket=gs://b/jobs", "--image=us-docker.pkg.dev/p/r/moe:1"]
KUBERNETES = "1.34"  # the first with TPU7x on GKE: docs.cloud.google.com/kubernetes-engine/docs/concepts/tpu-ironwood

# The fields of JobSet v1alpha2 down to the Job that it wraps: api/jobset/v1alpha2/jobset_types.go of
# github.com/kubernetes-sigs/jobset at v0.9.1. A type, a set of words, or the fields below; [x] is a list of x.
_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"}
_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
JOBSET = {
    "replicatedJobs": [{"name": str, "groupName": str, "replicas": int, "template": {"metadata": dict, "spec": dict},
                        "dependsOn": [{"name": str, "status": {"Ready", "Complete"}}]}],
    "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
    "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
    "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
                      "rules": [{"name": str, "action": _ACTIONS, "onJobFailureReasons": [_REASONS],
                                 "onJobFailureMessagePatterns": [str], "targetReplicatedJobs": [str]}]},
    "suspend": bool, "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int}, "managedBy": str,
    "ttlSecondsAfterFinished": int, "volumeClaimPolicies": [dict]}


def misfits(value, schema, path="spec") -> list[str]:
  """Where a value has a field, a type or a word that the table has not."""
  if isinstance(schema, list):
    return [m for i, item in enumerate(value) for m in misfits(item, schema[0], f"{path}[{i}]")]
  if isinstance(schema, dict):
    unknown = [f"{path}.{key} is no field" for key in value if key not in schema]
    return unknown + [m for key, item in value.items() if key in schema for m in misfits(item, schema[key], f"{path}.{key}")]
  if isinstance(schema, set):
    return [] if value in schema else [f"{path} = {value} is none of {schema}"]
  return [] if isinstance(value, schema) else [f"{path} = {value!r} is no {schema.__name__}"]


def check(manifest: dict) -> None:
  """Strictly: an unknown field is an error.

  Raises:
    kubernetes_validate.ValidationError, AssertionError
  """
  assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
  assert misfits(manifest["spec"], JOBSET) == []
  for job in manifest["spec"]["replicatedJobs"]:
    assert {"metadata", "spec"} >= set(job["template"])
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"], "spec": job["template"]["spec"]}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": job["template"]["spec"]["template"]["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def written(tmp_path, *flags) -> tuple[str, dict]:
  """What `run --gke=FILE` writes: the text, and its manifest."""
  path = tmp_path / "job.yaml"
  at = flags.index("--") if "--" in flags else len(flags)
  assert launch_tpu_vm.main(["run", *PLACE, f"--gke={path}", *flags[:at], *flags[at:]]) == 0
  return path.read_text(), yaml.safe_load(path.read_text())


def job(manifest) -> dict:
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(manifest) -> dict:
  return job(manifest)["template"]["spec"]


# Accelerator and topology labels, chips a host, hosts: GKE's table of TPUs
# (docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus) and xpk's system characteristics.
@pytest.mark.parametrize("kind, slices, config, accelerator, topology, chips, hosts", [
    ("v5litepod-16", 1, "olmoe_1b_7b_v5e_16", "tpu-v5-lite-podslice", "4x4", 4, 4),
    ("v5litepod-8", 1, "rmoe_24_v5e_8", "tpu-v5-lite-podslice", "2x4", 8, 1),
    ("v5p-32", 1, "qwen3_30b_a3b_v5p_16", "tpu-v5p-slice", "2x2x4", 4, 4),
    ("v5p-2048", 2, "deepseek_v3_v5p_2x1024", "tpu-v5p-slice", "8x8x16", 4, 256),
    ("v6e-64", 2, "mixtral_8x7b_v6e_2x64", "tpu-v6e-slice", "8x8", 4, 16),
    ("v6e-8", 1, "demons_3_4b_v6e_8", "tpu-v6e-slice", "2x4", 8, 1),
    ("tpu7x-1024", 1, "mt_nlg_530b_tpu7x_512", "tpu7x", "8x8x8", 4, 128),
    ("tpu7x-8x8x8", 1, "mt_nlg_530b_tpu7x_512", "tpu7x", "8x8x8", 4, 128),
])
def test_a_manifest(tmp_path, kind, slices, config, accelerator, topology, chips, hosts):
  mode = ["--spot", "--max_hours=2", "--autodelete", "--labels=team=moe", "--service_account=trainer", "--env=A=b c"]
  _, manifest = written(tmp_path, f"--type={kind}", f"--num_slices={slices}", *mode, "--",
                        f"--gin_file=configs/run/{config}.gin")
  check(manifest)
  selector = pod(manifest)["nodeSelector"]
  assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
  assert selector["cloud.google.com/gke-tpu-topology"] == topology and selector["cloud.google.com/gke-spot"] == "true"
  tpus = {"google.com/tpu": chips}
  assert pod(manifest)["containers"][0]["resources"] == {"limits": tpus, "requests": tpus}
  assert job(manifest)["completions"] == job(manifest)["parallelism"] == hosts
  assert manifest["spec"]["replicatedJobs"][0]["replicas"] == slices and job(manifest)["completionMode"] == "Indexed"
  assert manifest["metadata"]["annotations"] == {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  assert job(manifest)["activeDeadlineSeconds"] == 7200 and pod(manifest)["serviceAccountName"] == "trainer"
  assert bool(pod(manifest).get("volumes")) == (hosts * slices > 1)


def test_the_shape_follows_the_config_or_the_type(tmp_path):
  """v5p-512 comes as 4x8x8 or 4x4x16: the type may say it."""
  flags = ["--", "--gin.Data.batch_sequences=256"]
  _, manifest = written(tmp_path, "--type=v5p-512", *flags)
  assert pod(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8x8"
  _, manifest = written(tmp_path, "--type=v5p-4x4x16", *flags)
  assert pod(manifest)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x16"


@pytest.mark.parametrize("where, old, new", [
    ((), "replicatedJobs", "replicatedJob"), (("failurePolicy",), "maxRestarts", "maxRestart"),
    (("network",), "enableDNSHostnames", "enableDnsHostnames"), (("replicatedJobs", 0), "replicas", "replica"),
    (("replicatedJobs", 0, "template", "spec"), "completions", "completion"),
    (("replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes"), "values", "value"),
    (("replicatedJobs", 0, "template", "spec", "template", "spec"), "nodeSelector", "nodeSelectors"),
    (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "image", "images"),
    (("replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "resources"), "limits", "limit")])
def test_a_misspelt_field_is_found(where, old, new, tmp_path):
  """The control of every test that calls `check`."""
  _, manifest = written(tmp_path, "--type=v5litepod-16")
  check(manifest)
  spoilt = copy.deepcopy(manifest)
  at = spoilt["spec"]
  for key in where:
    at = at[key]
  at[new] = at.pop(old)
  with pytest.raises((kubernetes_validate.ValidationError, AssertionError, KeyError)):
    check(spoilt)


@pytest.mark.parametrize("spoil", [
    lambda spec: spec["failurePolicy"]["rules"][0].update(action="Fail"),
    lambda spec: spec["failurePolicy"]["rules"][0].update(onJobFailureReasons=["Deadline"]),
    lambda spec: spec.update(ttlSecondsAfterFinished="1h"),
    lambda spec: spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(restartPolicy=1)])
def test_a_wrong_value_is_found(spoil, tmp_path):
  _, manifest = written(tmp_path, "--type=v5litepod-16")
  spoil(manifest["spec"])
  with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
    check(manifest)


def expanded(text: str, environment: dict[str, str]) -> str:
  """What Kubernetes makes of an argument: $(NAME) is replaced where it is known, $$ is $."""
  return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), text)


@pytest.mark.parametrize("slices, slice_number, host, index", [(1, 0, 0, 0), (1, 0, 3, 3), (2, 1, 2, 6)])
def test_what_a_container_runs(tmp_path, slices, slice_number, host, index):
  """The script, expanded as Kubernetes does and run by bash with a stand-in for python: every flag arrives as it was given."""
  value = "it's $HOME $(HOSTS) $$ \"x\""
  flags = ["--gin_file=configs/run/quickstart.gin", f"--gin.x/Domain.name={value!r}", "--gin.x/Domain.path='embedded:kjv'",
           "--gin.Data.domains=(@x/Domain(),)", f"--gin.Mesh.slice={slices}"]
  _, manifest = written(tmp_path, "--type=v5litepod-16", f"--num_slices={slices}", f"--env=KEPT={value}", "--",
                        *flags, "--gin.Data.batch_sequences=32")
  check(manifest)
  container = pod(manifest)["containers"][0]
  environment = {e["name"]: e.get("value", str(slice_number)) for e in container["env"]}
  environment = {name: expanded(text, environment) for name, text in environment.items()}
  assert environment["KEPT"] == value
  script = expanded(container["args"][0], environment)
  assert container["command"] == ["bash", "-c"]
  (tmp_path / "token").write_text("secret")
  (tmp_path / "python").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/arrived\n")
  (tmp_path / "python").chmod(0o755)
  script = script.replace("/secrets/token", f"{tmp_path}/token").replace("/tmp/moe-token", f"{tmp_path}/moe-token")
  subprocess.run(["bash", "-c", script], check=True, env={
      "PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(host), **environment})
  assert (tmp_path / "arrived").read_text().splitlines() == [
      "-m", "moe.train", "--supervise", "--run_dir=gs://b/jobs/first/run", f"--token_file={tmp_path}/moe-token",
      f"--multihost=first-slice-0-0.first:8476,{4 * slices},{index}", *flags, "--gin.Data.batch_sequences=32"]
  assert (tmp_path / "moe-token").stat().st_mode & 0o077 == 0


def test_the_head_says_what_comes_before(tmp_path):
  text, _ = written(tmp_path, "--type=tpu7x-1024", "--", "--gin_file=configs/run/mt_nlg_530b_tpu7x_512.gin")
  head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
  assert "--machine-type=tpu7x-standard-4t --num-nodes=128 --placement-policy=first" in head
  assert "workload-policy first --project=p --type=HIGH_THROUGHPUT --accelerator-topology=8x8x8 --region=us-central1" in head
  text, _ = written(tmp_path, "--type=v5litepod-8")
  assert "ct5lp-hightpu-8t" in text and "secret" not in text  # one host: no topology, no secret


def test_to_standard_output_it_is_the_manifest_alone(capsys):
  assert launch_tpu_vm.main(["run", *PLACE, "--gke", "--type=v5litepod-16"]) == 0
  out, err = capsys.readouterr()
  check(yaml.safe_load(out))
  assert "price: 16 chip(s) of v5e in us-central1" in err and "GKE bills node pools" in err


@pytest.mark.parametrize("flags, words", [
    (["--image="], "--gke needs --image"), ([f"--name={'x' * 41}"], "at most 40"),
    (["--flex_start", "--max_hours=1"], "node pools"),
    (["--reserved"], "node pools"), (["--type=v5p-5x4x4"], "multiples of 4"), (["--type=tpu7x-12"], "does not exist"),
    (["--type=tpu7x-8", "--", "--gin_file=configs/run/mt_nlg_530b_tpu7x_512.gin"], "take --type=tpu7x-1024")])
def test_mistakes_are_one_line(tmp_path, flags, words):
  with pytest.raises(UserError, match=words):
    written(tmp_path, *flags)
  assert not (tmp_path / "job.yaml").exists()


# ---------------------------------------------------------------------------------------------------------------- Dockerfile


def test_the_dockerfile():
  """Its instructions, and that what it copies is what a job needs. It was not built: there is no docker here."""
  parser = dockerfile_parse.DockerfileParser(path=str(ROOT / "Dockerfile"), cache_content=True)
  instructions = [(line["instruction"], line["value"]) for line in parser.structure]
  known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "COMMENT"}
  assert {name for name, _ in instructions} <= known and parser.baseimage == "python:3.12-slim"
  values = dict(instructions)
  assert json.loads(values["ENTRYPOINT"]) == ["python", "-m", "moe.train"] and values["USER"] == "1000"
  assert [name for name, _ in instructions].index("USER") > max(i for i, (name, _) in enumerate(instructions) if name == "RUN")
  # The pair of the compile checks, in one more place.
  pinned = re.search(r'"(jax\[tpu\]==[\d.]+)"', (ROOT / "tools" / "dev.sh").read_text())[1]
  assert values["ARG"] == f'JAX="{pinned}"' and launch_tpu_vm.JAX == pinned
  copied = {word for name, value in instructions if name == "COPY" for word in value.split()[:-1]}
  assert copied == set(launch_tpu_vm.SHIPPED)
  kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
  assert kept == copied and all((ROOT / name).exists() for name in copied)
  assert gke.PORT == 8476
