"""A job as a JobSet for Google Kubernetes Engine: what `launch_tpu_vm run --gke` writes. Nothing of it was run on GKE yet.

Sources: the JobSet API v1alpha2 (github.com/kubernetes-sigs/jobset, v0.9.1) and its page on TPU multislice; GKE's pages on TPUs
(docs.cloud.google.com/kubernetes-engine/docs/how-to/tpus, how-to/tpu-multislice, concepts/tpu-ironwood).

The supervisor is process 1 of one container a host, so that the snapshot process outlives the trainer. GKE adds TPU_WORKER_ID,
TPU_WORKER_HOSTNAMES and, with several slices, MEGASCALE_* to the pods of a JobSet that ask for google.com/tpu.
"""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

from tools import launch_preflight

PORT = 8476
_JOB = "slice"  # of the JobSet; pods are called NAME-slice-SLICE-HOST
_SECRETS = "/secrets"
_TOKEN = "/tmp/moe-token"
# Exit codes of moe.train that another try would only repeat: config, data, checkpoint, numerics.
_FINAL_CODES = [2, 3, 4, 5]
LONGEST_NAME = 40  # pods' names are hostnames, at most 63 letters with the suffixes


class Options(NamedTuple):
  """What of a job is not in its flags."""

  name: str
  image: str
  run_dir: str
  env: tuple[tuple[str, str], ...] = ()
  labels: tuple[tuple[str, str], ...] = ()
  service_account: str = ""  # of Kubernetes
  spot: bool = False
  max_hours: float | None = None
  autodelete: bool = False
  restarts: int = 20


def token_secret(name: str) -> str:
  return f"{name}-token"


def manifest(options: Options, pod: launch_preflight.Pod, topology: str, train: list[str]) -> dict[str, Any]:
  """The JobSet, as plain values."""
  o, hosts = options, pod.slice.hosts * pod.slices
  rules = [{"name": "finalFailure", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"]}]
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2",
      "kind": "JobSet",
      "metadata": {
          "name": o.name,
          **({"labels": dict(o.labels)} if o.labels else {}),
          # A slice's hosts are one node pool, and no two slices share one.
          "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}},
      "spec": {
          # Headless service: host i of slice s is NAME-slice-s-i.NAME.
          "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": o.name},
          # All pods anew, from the newest good checkpoint; not where that would only fail again.
          "failurePolicy": {"maxRestarts": o.restarts, "rules": rules},
          **({"ttlSecondsAfterFinished": 3600} if o.autodelete else {}),
          "replicatedJobs": [
              {"name": _JOB, "replicas": pod.slices, "template": {"spec": _job(o, pod, topology, train, hosts)}}]}}


def _job(o: Options, pod: launch_preflight.Pod, topology: str, train: list[str], hosts: int) -> dict[str, Any]:
  """One slice: a batch/v1 JobSpec."""
  return {
      "completionMode": "Indexed",
      "parallelism": pod.slice.hosts,
      "completions": pod.slice.hosts,
      # One pod anew joins under its index, and the other hosts' memory decodes what it held.
      "backoffLimit": 4 * pod.slice.hosts,
      "podFailurePolicy": {"rules": [
          {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": _FINAL_CODES}},
          {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
      **({"activeDeadlineSeconds": int(o.max_hours * 3600)} if o.max_hours is not None else {}),
      "template": {
          **({"metadata": {"labels": dict(o.labels)}} if o.labels else {}),
          "spec": _pod(o, pod, topology, train, hosts)}}


def _pod(o: Options, pod: launch_preflight.Pod, topology: str, train: list[str], hosts: int) -> dict[str, Any]:
  tpus, several = {"google.com/tpu": pod.slice.chips_per_host}, hosts > 1
  tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
  selector = {"cloud.google.com/gke-tpu-accelerator": pod.slice.generation.gke, "cloud.google.com/gke-tpu-topology": topology}
  if o.spot:
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
  # The JAX coordinator, and this host's place, from the environment.
  environment = [
      {"name": "COORDINATOR", "value": f"{o.name}-{_JOB}-0-0.{o.name}:{PORT}"},
      {"name": "HOSTS", "value": str(hosts)},
      {"name": "HOSTS_OF_A_SLICE", "value": str(pod.slice.hosts)},
      {"name": "SLICE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}},
      *({"name": key, "value": _literal(value)} for key, value in o.env)]
  container = {
      "name": "train",
      "image": o.image,
      "env": environment,
      "command": ["bash", "-c"],
      "args": [_literal(_script(o, train, several))],
      "ports": [{"containerPort": PORT}],
      "resources": {"limits": dict(tpus), "requests": dict(tpus)}}
  if several:
    container["volumeMounts"] = [{"name": "token", "mountPath": _SECRETS, "readOnly": True}]
  return {
      "restartPolicy": "Never",
      "terminationGracePeriodSeconds": 120,  # SIGTERM makes the trainer save
      **({"serviceAccountName": o.service_account} if o.service_account else {}),
      "securityContext": {"runAsNonRoot": True, "fsGroup": 1000},
      "nodeSelector": selector,
      "tolerations": tolerations,
      "containers": [container],
      **({"volumes": [{"name": "token", "secret": {"secretName": token_secret(o.name)}}]} if several else {})}


def _literal(text: str) -> str:
  """Kubernetes replaces $(NAME) in arguments and environment; $$ is its $."""
  return text.replace("$", "$$")


def _script(o: Options, train: list[str], several: bool) -> str:
  """What bash runs: JOB_COMPLETION_INDEX is the host's number within its slice."""
  command = f"exec python -m moe.train --supervise {shlex.quote(f'--run_dir={o.run_dir}')}"
  if several:
    command = (f"set -eu; umask 077; cp {_SECRETS}/token {_TOKEN}\n"  # the supervisor wants it readable by itself alone
               f"{command} --token_file={_TOKEN} "
               '--multihost="$COORDINATOR,$HOSTS,$((SLICE * HOSTS_OF_A_SLICE + JOB_COMPLETION_INDEX))"')
  return " ".join([command, *map(shlex.quote, train)])


def text(options: Options, pod: launch_preflight.Pod, topology: str, train: list[str], location: tuple[str, str]) -> str:
  """The manifest as YAML, headed by what must be there before it.

  Args:
    location: (project, zone) of the node pools.
  """
  import yaml  # PyYAML, which flax and orbax bring

  body = yaml.safe_dump(manifest(options, pod, topology, train), sort_keys=False, width=10_000)
  return "".join(f"# {line}\n" for line in before(options, pod, topology, location)) + body


def before(o: Options, pod: launch_preflight.Pod, topology: str, location: tuple[str, str]) -> list[str]:
  """Comment lines: the node pools, the secret, and how to start it."""
  project, zone = location
  of, hosts = pod.slice.generation, pod.slice.hosts
  pool = (f"gcloud container node-pools create {o.name}-I --project={project} --cluster=CLUSTER --node-locations={zone} "
          f"--machine-type={of.machine}-{pod.slice.chips_per_host}t --num-nodes={hosts}" + (" --spot" if o.spot else ""))
  lines = ["Written by tools.launch_tpu_vm run --gke; checked against the schemas, not run."]
  if of.chip == "tpu7x" and hosts > 1:
    lines += [f"gcloud compute resource-policies create workload-policy {o.name} --project={project} --type=HIGH_THROUGHPUT "
              f"--accelerator-topology={topology} --region={zone.rpartition('-')[0]}"]
    pool += f" --placement-policy={o.name}"
  elif hosts > 1:
    pool += f" --tpu-topology={topology}"
  lines.append(f"{pool}   # a pool for each I of {pod.slices} slice(s); Autopilot makes them itself")
  if hosts * pod.slices > 1:
    lines.append(f"kubectl create secret generic {token_secret(o.name)} --from-literal=token=$(openssl rand -hex 32)")
  lines += ["kubectl apply -f THIS_FILE", f"kubectl logs -f job/{o.name}-{_JOB}-0 --all-pods",
            f"kubectl delete jobset {o.name}   # the node pools stay, and are billed, until they are deleted or scaled down"]
  return lines
