"""Jobs on Cloud TPU VMs: `python -m tools.launch_tpu_vm up|run|status|logs|stop|down --name=NAME ... [-- flags of moe.train]`

    up      creates the VMs as a queued resource and waits until they are there
    run     checks the job, says the price, ships the code and starts it (and creates the VMs where there are none); with
            --retries it stays, and creates them again after a preemption: the job goes on in the same run directory
    status  what the queued resource, the hosts and the job are doing
    logs    the output of the hosts, from the bucket; --follow goes on
    stop    SIGTERM to the job, which saves a checkpoint; the VMs stay
    down    deletes the VMs; the bucket stays

On every VM a startup script keeps an agent (tools/vm_agent.py), which takes the job from the bucket: it outlives the laptop and
a reboot. With --autodelete it deletes the VMs when the job has ended, with --max_hours at the latest after so long; neither
needs this machine. `run --gke=FILE` writes the same job as a JobSet for Google Kubernetes Engine and buys nothing.
`--mode=ssh` runs the command through ssh instead, for a quick try. Nothing of this was run on Google Cloud yet: it is tested
with a stand-in for gcloud. docs/tpu_vm.md starts from an empty project.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import pathlib
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

from moe.errors import UserError
from tools import gke
from tools import launch_preflight
from tools import terminal
from tools import tpu_prices
from tools import tpu_types

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = ("moe", "configs", "tools", "requirements.txt", "pyproject.toml", "README.md")
# The pair that the compile checks are held to (tools/dev.sh tpu): it pins its own libtpu.
JAX = "jax[tpu]==0.12.0.1"
# The images have an older Python than we need.
SETUP = ("(python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv) && "
         "python3 -m uv venv --quiet --clear --python 3.12 .venv && "
         "python3 -m uv pip install --quiet --python .venv/bin/python " + f"'{JAX}' -r requirements.txt gcsfs")
GONE = ("FAILED", "SUSPENDED", "SUSPENDING", "PREEMPTED", "TERMINATED", "STOPPED", "NOT_FOUND", "DELETING")
POLL_SECONDS = 30.0
_SET_HERE = ("--run_dir", "--multihost", "--token_file", "--supervise")  # of the flags of moe.train
LONGEST_FLEX_START_HOURS = 168  # docs.cloud.google.com/tpu/docs/request-using-flex-start: up to 7 days
# What a VM needs to delete its own queued resource.
SCOPE = "https://www.googleapis.com/auth/cloud-platform"
# docs.cloud.google.com/tpu/docs/tpu7x and .../queued-resources, whose words these are.
NO_TPU7X = ("the Cloud TPU API does not rent out TPU7x: Google's pages say \"To use TPU7x, you must use Google Kubernetes "
            "Engine (GKE)\" (docs.cloud.google.com/tpu/docs/tpu7x)")


class LaunchError(UserError):
  """gcloud refused, or the request does not make sense."""


# ---------------------------------------------------------------------------------------------------------------- gcloud


class Cloud:
  """Every command goes through `run`, which prints it; a dry run stops there."""

  def __init__(self, arguments: argparse.Namespace):
    self.a = arguments
    self._where = [f"--project={arguments.project}", f"--zone={arguments.zone}"]

  def run(self, *command: str, check: bool = True, stdin: bytes | None = None, quiet: bool = False) -> str:
    """Output of `gcloud COMMAND`; a dry run prints the command and gives "".

    Args:
      check: False: "" where it says that the thing does not exist.

    Raises:
      LaunchError: it failed otherwise: what cannot be asked is not taken for gone.
    """
    if not quiet or self.a.dry_run:
      print("+ gcloud " + shlex.join(command), flush=True)
    if self.a.dry_run:
      return ""
    try:
      done = subprocess.run(["gcloud", *command], input=stdin, capture_output=True)
    except FileNotFoundError as error:
      raise LaunchError("gcloud is not installed; see cloud.google.com/sdk, or use --dry_run") from error
    if done.returncode:
      told = done.stderr.decode(errors="replace").strip()
      if not check and any(word in told for word in ("NOT_FOUND", "not found", "404", "matched no objects")):
        return ""
      last = told.splitlines()[-1] if told else f"exit code {done.returncode}"
      raise LaunchError(f"gcloud {' '.join(command[:5])} ... failed: {last}")
    return done.stdout.decode(errors="replace")

  def create(self, script: str, incarnation: str, hours: float | None) -> None:
    """Asks for the VMs.

    Args:
      hours: after which they delete themselves, counted by each from its first boot.
    """
    a = self.a
    nodes = [f"--node-id={a.name}"] if a.num_slices == 1 else [f"--node-count={a.num_slices}", f"--node-prefix={a.name}"]
    metadata = {"moe-incarnation": incarnation, "moe-slices": a.num_slices, "moe-resource": resource(a)}
    if hours is not None:
      metadata["moe-max-hours"] = f"{hours:g}"
    with tempfile.NamedTemporaryFile("w", suffix=".sh", prefix="startup-") as file:
      file.write(script)
      file.flush()
      # The flags of flex-start are known to gcloud's alpha variant only.
      variant = ["alpha"] if a.flex_start else []
      self.run(*variant, "compute", "tpus", "queued-resources", "create", a.name, *self._where, *nodes,
               f"--accelerator-type={a.slice.name}", f"--runtime-version={a.runtime_version}", *_consumption(a), *_place(a),
               "--metadata=" + ",".join(f"{key}={value}" for key, value in metadata.items()),
               f"--metadata-from-file=startup-script={file.name}", "--quiet")

  def delete(self) -> None:
    self.run("compute", "tpus", "queued-resources", "delete", self.a.name, *self._where, "--force", "--quiet", check=False)

  def state(self) -> str:
    """Of the queued resource; where it is ACTIVE, PREEMPTED and the like of its nodes come first."""
    text = self.run("compute", "tpus", "queued-resources", "describe", self.a.name, *self._where, "--format=json", check=False,
                    quiet=True)
    if not text:
      return "NOT_FOUND"
    state = json.loads(text).get("state", {}).get("state", "UNKNOWN")
    if state != "ACTIVE":
      return state
    nodes = [self.node_state(i) for i in range(self.a.num_slices)]
    return next((n for n in nodes if n in GONE), state)

  def node(self, i: int) -> str:
    return self.a.name if self.a.num_slices == 1 else f"{self.a.name}-{i}"

  def node_state(self, i: int) -> str:
    text = self.run("compute", "tpus", "tpu-vm", "describe", self.node(i), *self._where, "--format=json", check=False,
                    quiet=True)
    return json.loads(text).get("state", "UNKNOWN") if text else "NOT_FOUND"

  def ssh(self, i: int, command: str) -> None:
    print(self.run("compute", "tpus", "tpu-vm", "ssh", self.node(i), *self._where, "--worker=all", f"--command={command}"))

  # The bucket folder of the job.

  def put(self, name: str, data: bytes) -> None:
    self.run("storage", "cp", "-", f"{self.a.bucket}/{self.a.name}/{name}", stdin=data)

  def read(self, name: str) -> str:
    return self.run("storage", "cat", f"{self.a.bucket}/{self.a.name}/{name}", check=False, quiet=True)

  def list(self, pattern: str) -> list[str]:
    """Names below the folder, for `read`."""
    root = f"{self.a.bucket}/{self.a.name}/"
    return [path.removeprefix(root) for path in self.run("storage", "ls", root + pattern, check=False, quiet=True).split()]

  def put_code(self, code: bytes) -> str:
    """Its name there."""
    name = f"code-{hashlib.sha256(code).hexdigest()[:16]}.tar.gz"
    self.put(name, code)
    return name


def resource(a: argparse.Namespace) -> str:
  """The queued resource as the TPU API names it."""
  return f"projects/{a.project}/locations/{a.zone}/queuedResources/{a.name}"


def _consumption(a: argparse.Namespace) -> list[str]:
  """Flags of gcloud for how the VMs are paid, and for how long."""
  flags = [flag for flag, on in (("--spot", a.spot), ("--reserved", a.reserved)) if on]
  if a.flex_start:
    flags += ["--provisioning-model=flex-start", f"--max-run-duration={int(3600 * a.max_hours)}s"]
  return flags + ([f"--valid-until-duration={a.valid_until}"] if a.valid_until else [])


def _place(a: argparse.Namespace) -> list[str]:
  """Flags of gcloud for the network, the account and the labels."""
  named = {"network": a.network, "subnetwork": a.subnetwork, "service-account": a.service_account, "labels": a.labels}
  flags = [f"--{name}={value}" for name, value in named.items() if value]
  flags += ["--internal-ips"] if a.internal_ips else []
  return flags + ([f"--scopes={SCOPE}"] if a.autodelete or a.max_hours is not None else [])


def how_paid(a: argparse.Namespace) -> str:
  return "spot" if a.spot else "reserved" if a.reserved else "flex-start" if a.flex_start else "on demand"


# ------------------------------------------------------------------------------------------------------------------ verbs


def up(cloud: Cloud) -> int:
  _say_price(cloud.a)
  if cloud.state() not in ("NOT_FOUND", "") and not cloud.a.dry_run:
    raise LaunchError(f"{cloud.a.name} exists already ({cloud.state()}); `down` deletes it, or choose another --name")
  _create(cloud, cloud.a.max_hours)
  return terminal.FINE


def _create(cloud: Cloud, hours: float | None) -> None:
  incarnation = time.strftime("%Y%m%d-%H%M%S") if not cloud.a.dry_run else "TIME"
  cloud.create(startup_script(cloud.a), incarnation, hours)
  while not cloud.a.dry_run:
    state = cloud.state()
    print(f"{time.strftime('%H:%M:%S')} {cloud.a.name}: {state}", flush=True)
    if state == "ACTIVE":
      return
    if state in GONE:
      raise LaunchError(f"{cloud.a.name} became {state} before it was there; `down`, then another zone, type or --spot")
    time.sleep(cloud.a.poll_seconds)


def _say_price(a: argparse.Namespace, checked: launch_preflight.Checked | None = None) -> None:
  what = a.slice.generation.chip, a.slice.chips * a.num_slices, a.zone, how_paid(a)
  price, lines = tpu_prices.hourly(*what), tpu_prices.describe(*what)
  if checked and checked.step_seconds:
    steps = checked.run.train.steps
    hours = steps * checked.step_seconds / 3600
    lines.append(f"  {steps:,} steps of {checked.step_seconds:g} s (the compiler's estimate in the config's head, not "
                 f"measured): about {hours:,.1f} h" + (f", {hours * price.total:,.0f} USD" if price else ""))
  lines.append(tpu_prices.bound(price, a.max_hours, a.autodelete))
  print("\n".join(lines), flush=True)


def startup_script(a: argparse.Namespace) -> str:
  """The agent, which asks the bucket for the job."""
  agent = (ROOT / "tools" / "vm_agent.py").read_text()
  return ("#!/bin/bash\n# Runs at every boot of every host; written by tools.launch_tpu_vm.\n"
          'home=${MOE_VM_HOME:-/opt/moe}\nmkdir -p "$home"\n'
          f"cat > \"$home/agent.py\" <<'END_OF_AGENT'\n{agent}END_OF_AGENT\n"
          # Again where it is killed (out of memory): nothing else ends the bill. SIGTERM goes on to it.
          'trap \'kill -TERM "$agent"\' TERM\n'
          "while true; do\n"
          f'  python3 "$home/agent.py" {shlex.quote(f"{a.bucket}/{a.name}")} &\n'
          "  agent=$!\n"
          '  wait "$agent"\n'
          "  code=$?\n"
          '  while kill -0 "$agent" 2>/dev/null; do wait "$agent"; code=$?; done\n'
          '  [ "$code" -eq 0 ] && exit 0\n'
          '  sleep "${MOE_VM_POLL_SECONDS:-10}"\n'
          "done\n")


def run(cloud: Cloud) -> int:
  a = cloud.a
  # Everything that this machine can find wrong comes before anything costs money.
  code = archive()
  checked = _preflight(a)
  for note in checked.notes:
    print(f"note: {note}", file=sys.stderr)
  if a.gke is not None:
    return _write_gke(a, checked)
  _say_price(a, checked)
  _check_bucket(cloud, checked)
  state = cloud.state()
  if state in GONE and state != "NOT_FOUND":
    cloud.delete()
  if a.mode == "ssh":
    if state in GONE:
      _create(cloud, a.max_hours)
    return _run_by_ssh(cloud, code)
  # The job lies in the bucket before the VMs are there, so that nothing waits for this machine.
  number = _ship(cloud, code)
  since = None
  if state in GONE:
    _create(cloud, a.max_hours)
    since = time.time()
  if a.dry_run or not (a.retries or a.follow):
    print(f"job {number} of {a.name} is on its way; `logs --follow` shows it, and it goes on without this machine")
    return terminal.FINE
  return _stay(cloud, number, since)


def _preflight(a: argparse.Namespace) -> launch_preflight.Checked:
  pod = launch_preflight.Pod(a.slice, a.num_slices, a.local_paths)
  run_dir = a.run_dir or ""
  if run_dir and not run_dir.startswith("gs://") and not a.local_paths:
    raise LaunchError(f"--run_dir={run_dir} would be on the VMs' own disks, and its checkpoints are gone with them; give a "
                      "folder of gs://, or --local_paths, where the VMs mount it")
  return launch_preflight.check(a.train, pod, launch_preflight.Checkout(ROOT, {str(p.relative_to(ROOT)) for p in _files()}))


def _check_bucket(cloud: Cloud, checked: launch_preflight.Checked) -> None:
  """Refuses data that is not where the config says."""
  for path in launch_preflight.remote_paths(checked.run):
    found = cloud.run("storage", "ls", path, check=False, quiet=True)
    if not found and not cloud.a.dry_run:
      raise LaunchError(f"{path} does not exist; build the data with tools.build_data and `gcloud storage cp -r` it there")


def _write_gke(a: argparse.Namespace, checked: launch_preflight.Checked) -> int:
  """The manifest to a file, or to standard output; the rest to standard error."""
  lines = tpu_prices.describe(a.slice.generation.chip, a.slice.chips * a.num_slices, a.zone, how_paid(a))
  lines.append("  GKE bills node pools, not jobs: --max_hours ends each start of the job, autoscaling (or you) the nodes")
  print("\n".join(lines), file=sys.stderr)
  pod = launch_preflight.Pod(a.slice, a.num_slices)
  named = launch_preflight.topology_named(checked.gin_files, ROOT)
  chip, _, shape = (named[0] if named else "").partition(":")
  same = chip == a.slice.generation.chip and math.prod(map(int, shape.split("x"))) == a.slice.chips
  topology = shape if same and not a.shape_given else a.slice.topology
  options = gke.Options(
      a.name, a.image, a.run_dir or f"{a.bucket}/{a.name}/run", tuple(tuple(pair.split("=", 1)) for pair in a.env),
      tuple(tuple(pair.split("=", 1)) for pair in a.labels.split(",") if pair), a.service_account, a.spot, a.max_hours,
      a.autodelete, a.retries or 20)
  text = gke.text(options, pod, topology, a.train, (a.project, a.zone))
  if a.gke == "-" or a.dry_run:
    print(text, end="")
  else:
    pathlib.Path(a.gke).write_text(text)
    print(f"{a.gke} is written; its head says what comes before `kubectl apply -f {a.gke}`", file=sys.stderr)
  return terminal.FINE


def _ship(cloud: Cloud, code: bytes) -> str:
  """Code, token and job.json into the bucket; the job's number."""
  a, name = cloud.a, cloud.put_code(code)
  number = time.strftime("%Y%m%d-%H%M%S") + f"-{secrets.token_hex(2)}" if not a.dry_run else "NUMBER"
  cloud.put("token", secrets.token_hex(32).encode())
  job = {"number": number, "code": name, "command": command(a), "hosts": hosts(a), "slices": a.num_slices, "setup": a.setup,
         "env": dict(pair.split("=", 1) for pair in a.env), "autodelete": a.autodelete, "max_hours": a.max_hours,
         "resource": resource(a)}
  cloud.put("job.json", json.dumps(job, indent=1).encode())
  return number


def command(a: argparse.Namespace) -> list[str]:
  how = "--supervise" if a.mode == "startup" else "--multihost"
  return [a.python, "-m", "moe.train", how, f"--run_dir={a.run_dir or f'{a.bucket}/{a.name}/run'}", *a.train]


def hosts(a: argparse.Namespace) -> int:
  """Hosts of all slices."""
  return a.num_slices * a.slice.hosts


def _files() -> list[pathlib.Path]:
  """What a VM needs."""
  found = [p for name in SHIPPED for p in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))]
  return sorted(p for p in found if p.is_file() and "__pycache__" not in p.parts)


def archive() -> bytes:
  """The code as .tar.gz; the same bytes for the same files."""
  if not (ROOT / "moe" / "train.py").exists():
    raise LaunchError("the code is shipped from a checkout; run it there with python -m tools.launch_tpu_vm")
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6, dereference=True) as tar:  # a link would lead nowhere there
    for path in _files():
      info = tar.gettarinfo(path, str(path.relative_to(ROOT)))
      info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
      with open(path, "rb") as file:
        tar.addfile(info, file)
  data = bytearray(out.getvalue())
  data[4:8] = bytes(4)  # gzip's own time
  return bytes(data)


def _run_by_ssh(cloud: Cloud, code: bytes) -> int:
  """A quick try: ends with the connection."""
  a, name = cloud.a, cloud.put_code(code)
  exports = "".join(f"export {pair}; " for pair in map(_quoted_pair, a.env))
  line = (f"mkdir -p ~/moe && cd ~/moe && gcloud storage cp {shlex.quote(f'{a.bucket}/{a.name}/{name}')} code.tar.gz && "
          f"tar -xzf code.tar.gz && ( [ -e .ready ] || ( {a.setup} ) ) && touch .ready && {exports}{shlex.join(command(a))}")
  cloud.ssh(0, line)
  return terminal.FINE


def _quoted_pair(pair: str) -> str:
  key, _, value = pair.partition("=")
  return f"{key}={shlex.quote(value)}"


def _stay(cloud: Cloud, number: str, since: float | None) -> int:
  """Shows the output until the job ends; makes the VMs again when they are gone.

  Args:
    since: when the VMs were there, seconds since the epoch; None: they are not of this command.
  """
  a, shown = cloud.a, set()
  left, hours = a.retries, a.max_hours
  while True:
    try:
      code = _look(cloud, number, shown)
      if code is not None:
        return code
      state = cloud.state()
      if state == "ACTIVE" and since is None:
        since = time.time()
      if state in GONE:
        # The VMs may have ended the job, and themselves, since it was looked at: then they are not to be made again.
        code = _look(cloud, number, shown)
        if code is not None:
          return code
        if hours is not None and since is not None:
          hours -= (time.time() - since) / 3600
        since = None
        print(f"{time.strftime('%H:%M:%S')} {a.name}: {state}; {left} more tr{'y' if left == 1 else 'ies'}"
              + (f", {max(hours, 0):.2g} h left" if hours is not None else ""), flush=True)
        if left == 0 or (hours is not None and hours <= 0):
          if a.autodelete or a.max_hours is not None:
            cloud.delete()  # what is suspended still takes up quota
          return 1
        left -= 1
        cloud.delete()
        while cloud.state() != "NOT_FOUND":
          time.sleep(a.poll_seconds)
        _create(cloud, hours)  # the agent of the new VMs finds the same job, and the job its run directory
        since = time.time()
    except LaunchError as error:  # of gcloud, which may answer the next time; or the new VMs did not come
      print(f"{time.strftime('%H:%M:%S')} {error}", flush=True)
    time.sleep(a.poll_seconds)


def _look(cloud: Cloud, number: str, shown: set[str]) -> int | None:
  """Shows what is new; the exit code of the job when it has ended."""
  codes, over = _codes(cloud, number), _over(cloud, number)
  _show_new(cloud, shown)
  if over:
    print(f"job {number} is over: {over['why']}")
  elif len(codes) == hosts(cloud.a):
    print(f"job {number} ended: " + ", ".join(f"host {i}: {code}" for i, code in sorted(codes.items())))
  elif json.loads(cloud.read("job.json") or "{}").get("number") != number:
    print(f"job {number} was stopped, or another took its place")
    return 143
  else:
    return None
  if cloud.a.autodelete:
    cloud.delete()
  return over["code"] if over else max(codes.values(), key=abs)


def _over(cloud: Cloud, number: str) -> dict[str, Any]:
  """The word of a host that the job is over for all: {"why", "code", "host"}; {} while there is none."""
  return json.loads(cloud.read(f"over/{number}.json") or "{}")


def _codes(cloud: Cloud, number: str) -> dict[int, int]:
  """Exit codes of the hosts that have ended; those that were told to end by their machine do not count."""
  found = {}
  for path in cloud.list(f"state/{number}/*.json"):
    text = cloud.read(path)
    if text:
      state = json.loads(text)
      if state["code"] not in (143, -15):
        found[int(pathlib.PurePosixPath(path).stem)] = state["incarnation"], state["code"]
  newest = max((incarnation for incarnation, _ in found.values()), default="")
  return {host: code for host, (incarnation, code) in found.items() if incarnation == newest}


def _show_new(cloud: Cloud, shown: set[str]) -> None:
  for path in sorted(cloud.list("logs/*/*.txt"), key=lambda p: p.rpartition("/")[2]):
    if path not in shown:
      shown.add(path)
      host = path.split("/")[-2]
      if cloud.a.host is None or cloud.a.host == int(host):
        for line in cloud.read(path).splitlines():
          print(f"{host}| {line}", flush=True)


def status(cloud: Cloud) -> int:
  told: dict[str, Any] = {"name": cloud.a.name, "state": cloud.state(), "nodes": {}, "job": None, "ended": {}, "over": {}}
  if told["state"] == "ACTIVE":
    told["nodes"] = {cloud.node(i): cloud.node_state(i) for i in range(cloud.a.num_slices)}
  text = cloud.read("job.json")
  if text:
    told["job"] = json.loads(text)
    told["over"] = _over(cloud, told["job"]["number"])
    told["ended"] = {path.rpartition("/")[2].removesuffix(".json"): json.loads(
        cloud.read(path) or "{}").get("code")
                     for path in cloud.list(f"state/{told['job']['number']}/*.json")}
  if cloud.a.json:
    terminal.as_json(told)
  else:
    print(f"{told['name']}: {told['state']}" + "".join(f"; {node} {state}" for node, state in told["nodes"].items()))
    if told["job"]:
      print(f"job {told['job']['number']}: {shlex.join(told['job']['command'] or ['stopped'])}")
      print("ended: " + (", ".join(f"host {i} with {code}" for i, code in sorted(told["ended"].items())) or "no host"))
    if told["over"]:
      print(f"over: {told['over']['why']}")
  return terminal.FINE if told["state"] == "ACTIVE" else terminal.DIFFERS


def logs(cloud: Cloud) -> int:
  shown: set[str] = set()
  while True:
    _show_new(cloud, shown)
    if not cloud.a.follow or cloud.a.dry_run:
      return terminal.FINE
    time.sleep(cloud.a.poll_seconds)


def stop(cloud: Cloud) -> int:
  job = {"number": f"stop-{secrets.token_hex(4)}", "command": None, "hosts": hosts(cloud.a)}
  cloud.put("job.json", json.dumps(job).encode())
  print(f"{cloud.a.name}: told to stop; a checkpoint is saved within a minute or so, `status` and `logs` show it")
  return terminal.FINE


def down(cloud: Cloud) -> int:
  cloud.delete()  # fails with gcloud's word for it, so that nobody thinks the VMs are gone
  return terminal.FINE


# -------------------------------------------------------------------------------------------------------------------- flags


def parse(argv: list[str]) -> argparse.Namespace:
  at = argv.index("--") if "--" in argv else len(argv)
  ours, train = argv[:at], argv[at + 1 :]
  parser = argparse.ArgumentParser(prog="python -m tools.launch_tpu_vm", description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("verb", choices=("up", "run", "status", "logs", "stop", "down"))
  parser.add_argument("--name", required=True, help="of the queued resource, and of the job's folder in the bucket")
  parser.add_argument("--project", required=True)
  parser.add_argument("--zone", required=True, help="such as us-west4-a")
  parser.add_argument("--bucket", required=True, metavar="gs://BUCKET[/FOLDER]")
  parser.add_argument("--type", default="v5litepod-16", help="accelerator type, such as v5litepod-16, v6e-16, v5p-128")
  parser.add_argument("--num_slices", type=int, default=1)
  parser.add_argument("--runtime_version", help="image (default: by --type)")
  kind = parser.add_mutually_exclusive_group()
  kind.add_argument("--spot", action="store_true", help="cheaper, and may be preempted at any time")
  kind.add_argument("--reserved", action="store_true", help="from a reservation of the project")
  kind.add_argument("--flex_start", action="store_true", help="waits for capacity, runs for --max_hours, at most a week")
  parser.add_argument("--valid_until", metavar="6h", help="give the request up after so long")
  parser.add_argument("--max_hours", type=float, metavar="H",
                      help="the VMs delete themselves after so long at the latest; the job saves before")
  parser.add_argument("--autodelete", action="store_true", help="the VMs delete themselves when the job has ended")
  parser.add_argument("--network", default="")
  parser.add_argument("--subnetwork", default="")
  parser.add_argument("--internal_ips", action="store_true", help="no external addresses (the subnetwork needs Private Google "
                      "Access, and Cloud NAT for the set-up's downloads)")
  parser.add_argument("--service_account", default="", help="e-mail of the VMs' account (default: Compute Engine's); with "
                      "--gke the name of Kubernetes' account")
  parser.add_argument("--labels", default="", metavar="KEY=VALUE,...", help="of the VMs, for the bill")
  parser.add_argument("--mode", choices=("startup", "ssh"), default="startup")
  parser.add_argument("--run_dir", help="default: BUCKET/NAME/run")
  parser.add_argument("--local_paths", action="store_true",
                      help="paths that are not gs:// exist on the VMs: --setup mounts them")
  parser.add_argument("--retries", type=int, default=0, help="times to create the VMs again; stays and shows the output")
  parser.add_argument("--follow", action="store_true", help="stay and show the output")
  parser.add_argument("--host", type=int, help="output of this one only")
  parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="of the job; repeatable")
  parser.add_argument("--gke", nargs="?", const="-", metavar="FILE", help="with run: write the job as a JobSet for GKE instead")
  parser.add_argument("--image", default="", help="with --gke: the container image, made with the Dockerfile")
  parser.add_argument("--python", default=".venv/bin/python", help=argparse.SUPPRESS)
  parser.add_argument("--setup", default=SETUP, help="shell command that prepares a VM, once for each version of the code")
  parser.add_argument("--poll_seconds", type=float, default=POLL_SECONDS, help=argparse.SUPPRESS)
  parser.add_argument("--dry_run", action="store_true", help="check everything, print every command, run none")
  parser.add_argument("--json", action="store_true", help="for status")
  a = parser.parse_args(ours)
  a.train = train
  a.bucket = a.bucket.rstrip("/")
  _check_names(a)
  _check_money(a)
  reserved = [flag for flag in train if flag.partition("=")[0] in _SET_HERE]
  if reserved:
    way_out = "; give --run_dir before the --" if "run_dir" in reserved[0] else ""
    raise LaunchError(f"{reserved[0]} is set by the launcher{way_out}")
  _check_type(a)
  return a


def _check_names(a: argparse.Namespace) -> None:
  if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]*(/[^/*?\[\]]+)*", a.bucket):
    raise LaunchError(f"--bucket={a.bucket} is not gs://BUCKET or gs://BUCKET/FOLDER")
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", a.name):
    raise LaunchError(f"--name={a.name} is no name for a TPU: small letters, digits and dashes, a letter first")
  if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", a.zone):
    raise LaunchError(f"--zone={a.zone} is not a zone such as us-west4-a (a region and a letter)")
  if a.num_slices < 1:
    raise LaunchError(f"--num_slices={a.num_slices} must be at least 1")
  bad = [pair for pair in a.env if not re.fullmatch(r"[A-Za-z_]\w*=.*", pair, re.DOTALL)]
  if bad:
    raise LaunchError(f"--env={bad[0]} is not KEY=VALUE")
  labels = a.labels.split(",") if a.labels else []
  bad = [pair for pair in labels if not re.fullmatch(r"[a-z][-_a-z0-9]{0,62}=[-_a-z0-9]{0,63}", pair)]
  if bad:
    raise LaunchError(f"--labels={bad[0]} is not key=value of small letters, digits, _ and -")
  if a.service_account and a.gke is None and "@" not in a.service_account:
    raise LaunchError(f"--service_account={a.service_account} is not the e-mail of an account, such as "
                      "NAME@PROJECT.iam.gserviceaccount.com")


def _check_money(a: argparse.Namespace) -> None:
  """How long, and how it is paid."""
  if a.valid_until is not None and not re.fullmatch(r"([1-9]\d*[smhdw])+", a.valid_until):
    raise LaunchError(f"--valid_until={a.valid_until} is not a duration such as 6h, 90m or 2d12h")
  if a.max_hours is not None and not 0 < a.max_hours < math.inf:
    raise LaunchError(f"--max_hours={a.max_hours} must be a number of hours above 0")
  if a.flex_start and (a.max_hours is None or a.max_hours > LONGEST_FLEX_START_HOURS):
    raise LaunchError(f"--flex_start needs --max_hours of at most {LONGEST_FLEX_START_HOURS} (a week); it is {a.max_hours}")
  if a.mode == "ssh" and (a.num_slices > 1 or a.autodelete):
    raise LaunchError("--mode=ssh is for one slice, and has no agent that deletes the VMs; leave out --mode, or "
                      + ("--num_slices" if a.num_slices > 1 else "--autodelete"))


def _check_type(a: argparse.Namespace) -> None:
  """Fills in what follows from --type: `slice`, `runtime_version`."""
  a.slice, a.shape_given = tpu_types.parse(a.type), "x" in a.type.partition("-")[2]
  if a.gke is not None:
    _check_gke(a)
  elif not a.slice.generation.image and a.verb in ("up", "run"):
    raise LaunchError(f"--type={a.type}: {NO_TPU7X}; `run --gke=FILE --image=IMAGE` writes this job as a JobSet for it")
  elif a.shape_given:
    raise LaunchError(f"--type={a.type}: the Cloud TPU API chooses the shape of {a.slice.name} itself; write "
                      f"--type={a.slice.name}, or take --gke")
  a.runtime_version = a.runtime_version or a.slice.generation.image


def _check_gke(a: argparse.Namespace) -> None:
  if a.verb != "run":
    raise LaunchError(f"--gke goes with run, not with {a.verb}: kubectl does the rest")
  if not a.image:
    raise LaunchError("--gke needs --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:TAG, made with the Dockerfile "
                      "(docs/gke.md)")
  if len(a.name) > gke.LONGEST_NAME:
    raise LaunchError(f"--name={a.name} has {len(a.name)} letters; with --gke it is part of hostnames: at most "
                      f"{gke.LONGEST_NAME}")
  if a.flex_start or a.reserved:
    raise LaunchError("--flex_start and --reserved are chosen with the node pools of GKE, not with the job; leave them out")


def main(argv: list[str] | None = None) -> int:
  arguments = parse(sys.argv[1:] if argv is None else argv)
  verb = {"up": up, "run": run, "status": status, "logs": logs, "stop": stop, "down": down}[arguments.verb]
  try:
    return verb(Cloud(arguments))
  except KeyboardInterrupt:
    if arguments.verb in ("up", "run"):  # it costs money, and goes on without us
      print(f"\n{arguments.name} is not deleted: `status` shows it, `down` deletes it", file=sys.stderr)
    raise


if __name__ == "__main__":
  terminal.run(main)
