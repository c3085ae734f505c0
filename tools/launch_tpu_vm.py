"""Jobs on Cloud TPU VMs: `python -m tools.launch_tpu_vm up|run|status|logs|stop|down --name=NAME ... [-- flags of moe.train]`

    up      creates the VMs as a queued resource and waits until they are there
    run     ships the code and starts the job (and creates the VMs where there are none); with --retries it stays, and
            creates them again after a preemption: the job goes on in the same run directory
    status  what the queued resource, the hosts and the job are doing
    logs    the output of the hosts, from the bucket; --follow goes on
    stop    SIGTERM to the job, which saves a checkpoint; the VMs stay
    down    deletes the VMs; the bucket stays

On every VM a startup script keeps an agent (tools/vm_agent.py), which takes the job from the bucket: it outlives the laptop and
a reboot. `--mode=ssh` runs the command through ssh instead, for a quick try. Nothing of this was run on Google Cloud yet: it is
tested with a stand-in for gcloud. docs/tpu_vm.md starts from an empty project.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
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
from tools import terminal

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHIPPED = ("moe", "configs", "tools", "requirements.txt", "pyproject.toml", "README.md")
# Images of the TPU generations, as Google's list of runtime versions has them.
RUNTIMES = {"v6e": "v2-alpha-tpuv6e", "v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v4": "tpu-ubuntu2204-base",
            "tpu7x": "v2-alpha-tpu7-ubuntu2404"}
CHIPS_PER_HOST = {"v6e": 4, "v5litepod": 4, "v5p": 4, "v4": 4, "tpu7x": 4}
ONE_HOST = ("v6e-8", "v5litepod-8")  # one VM with eight chips
CORES_IN_NAME = ("v4", "v5p")  # whose names count TensorCores, two a chip
# The images have an older Python than we need.
SETUP = ("(python3 -m pip install --quiet --user uv || python3 -m pip install --quiet --user --break-system-packages uv) && "
         "python3 -m uv venv --quiet --clear --python 3.12 .venv && "
         "python3 -m uv pip install --quiet --python .venv/bin/python 'jax[tpu]' -r requirements.txt gcsfs")
GONE = ("FAILED", "SUSPENDED", "SUSPENDING", "PREEMPTED", "TERMINATED", "STOPPED", "NOT_FOUND", "DELETING")
POLL_SECONDS = 30.0


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

  def create(self, script: str, incarnation: str) -> None:
    a = self.a
    with tempfile.NamedTemporaryFile("w", suffix=".sh", prefix="startup-") as file:
      file.write(script)
      file.flush()
      nodes = [f"--node-id={a.name}"] if a.num_slices == 1 else [f"--node-count={a.num_slices}", f"--node-prefix={a.name}"]
      kind = [flag for flag, on in (("--spot", a.spot), ("--reserved", a.reserved)) if on]
      until = [f"--valid-until-duration={a.valid_until}"] if a.valid_until else []
      self.run("compute", "tpus", "queued-resources", "create", a.name, *self._where, *nodes,
               f"--accelerator-type={a.type}", f"--runtime-version={a.runtime_version}", *kind, *until,
               f"--metadata=moe-incarnation={incarnation},moe-slices={a.num_slices}",
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


# ------------------------------------------------------------------------------------------------------------------ verbs


def up(cloud: Cloud) -> int:
  if cloud.state() not in ("NOT_FOUND", "") and not cloud.a.dry_run:
    raise LaunchError(f"{cloud.a.name} exists already ({cloud.state()}); `down` deletes it, or choose another --name")
  _create(cloud)
  return terminal.FINE


def _create(cloud: Cloud) -> None:
  incarnation = time.strftime("%Y%m%d-%H%M%S") if not cloud.a.dry_run else "TIME"
  cloud.create(startup_script(cloud.a), incarnation)
  while not cloud.a.dry_run:
    state = cloud.state()
    print(f"{time.strftime('%H:%M:%S')} {cloud.a.name}: {state}", flush=True)
    if state == "ACTIVE":
      return
    if state in GONE:
      raise LaunchError(f"{cloud.a.name} became {state} before it was there; `down`, then another zone, type or --spot")
    time.sleep(cloud.a.poll_seconds)


def startup_script(a: argparse.Namespace) -> str:
  """The agent, which asks the bucket for the job."""
  agent = (ROOT / "tools" / "vm_agent.py").read_text()
  return ("#!/bin/bash\n# Runs at every boot of every host; written by tools.launch_tpu_vm.\n"
          'home=${MOE_VM_HOME:-/opt/moe}\nmkdir -p "$home"\n'
          f"cat > \"$home/agent.py\" <<'END_OF_AGENT'\n{agent}END_OF_AGENT\n"
          f'exec python3 "$home/agent.py" {shlex.quote(f"{a.bucket}/{a.name}")}\n')


def run(cloud: Cloud) -> int:
  a = cloud.a
  if a.mode == "ssh" and a.num_slices > 1:
    raise LaunchError("--mode=ssh is for one slice; leave it out")
  code = archive()  # an error here comes before anything costs money
  state = cloud.state()
  if state in GONE:
    if state != "NOT_FOUND":
      cloud.delete()
    _create(cloud)
  if a.mode == "ssh":
    return _run_by_ssh(cloud, code)
  number = _ship(cloud, code)
  if a.dry_run or not (a.retries or a.follow):
    print(f"job {number} of {a.name} is on its way; `logs --follow` shows it, and it goes on without this machine")
    return terminal.FINE
  return _stay(cloud, number)


def _ship(cloud: Cloud, code: bytes) -> str:
  """Code, token and job.json into the bucket; the job's number."""
  a, name = cloud.a, cloud.put_code(code)
  number = time.strftime("%Y%m%d-%H%M%S") + f"-{secrets.token_hex(2)}" if not a.dry_run else "NUMBER"
  cloud.put("token", secrets.token_hex(32).encode())
  cloud.put("job.json", json.dumps({"number": number, "code": name, "command": command(a), "hosts": hosts(a),
                                    "slices": a.num_slices, "setup": a.setup,
                                    "env": dict(pair.split("=", 1) for pair in a.env)}, indent=1).encode())
  return number


def command(a: argparse.Namespace) -> list[str]:
  how = "--supervise" if a.mode == "startup" else "--multihost"
  return [a.python, "-m", "moe.train", how, f"--run_dir={a.run_dir or f'{a.bucket}/{a.name}/run'}", *a.train]


def hosts(a: argparse.Namespace) -> int:
  """Hosts of all slices, from the accelerator's name (v5litepod-16: 16 chips, four a host)."""
  if a.hosts:
    return a.hosts
  generation, chips = _parse_type(a.type)
  if a.type in ONE_HOST:
    return a.num_slices
  chips = chips // 2 if generation in CORES_IN_NAME else chips
  return a.num_slices * max(chips // CHIPS_PER_HOST[generation], 1)


def _parse_type(text: str) -> tuple[str, int]:
  found = re.fullmatch(r"(v6e|v5litepod|v5p|v4|tpu7x)-(\d+)", text)
  if not found:
    raise LaunchError(f"--type={text} is none we know: v5litepod-16, v6e-8, v5p-128, v4-32, tpu7x-64 (GENERATION-NUMBER)")
  return found[1], int(found[2])


def archive() -> bytes:
  """What a VM needs, as .tar.gz; the same bytes for the same files."""
  if not (ROOT / "moe" / "train.py").exists():
    raise LaunchError("the code is shipped from a checkout; run it there with python -m tools.launch_tpu_vm")
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as tar:
    for path in sorted(p for name in SHIPPED for p in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"))):
      if path.is_file() and "__pycache__" not in path.parts:
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


def _stay(cloud: Cloud, number: str) -> int:
  """Shows the output until the job ends; makes the VMs again when they are gone."""
  shown: set[str] = set()
  left = cloud.a.retries
  while True:
    try:
      code = _look(cloud, number, shown)
      if code is not None:
        return code
      state = cloud.state()
      if state in GONE:
        print(f"{time.strftime('%H:%M:%S')} {cloud.a.name}: {state}; {left} more tr{'y' if left == 1 else 'ies'}", flush=True)
        if left == 0:
          return 1
        left -= 1
        cloud.delete()
        while cloud.state() != "NOT_FOUND":
          time.sleep(cloud.a.poll_seconds)
        _create(cloud)  # the agent of the new VMs finds the same job, and the job its run directory
    except LaunchError as error:  # of gcloud, which may answer the next time; or the new VMs did not come
      print(f"{time.strftime('%H:%M:%S')} {error}", flush=True)
    time.sleep(cloud.a.poll_seconds)


def _look(cloud: Cloud, number: str, shown: set[str]) -> int | None:
  """Shows what is new; the exit code of the job when it has ended."""
  codes = _codes(cloud, number)
  _show_new(cloud, shown)
  if len(codes) == hosts(cloud.a):
    worst = max(codes.values(), key=abs)
    print(f"job {number} ended: " + ", ".join(f"host {i}: {code}" for i, code in sorted(codes.items())))
    if cloud.a.autodelete:
      cloud.delete()
    return worst
  if json.loads(cloud.read("job.json") or "{}").get("number") != number:
    print(f"job {number} was stopped, or another took its place")
    return 143
  return None


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
  told: dict[str, Any] = {"name": cloud.a.name, "state": cloud.state(), "nodes": {}, "job": None, "ended": {}}
  if told["state"] == "ACTIVE":
    told["nodes"] = {cloud.node(i): cloud.node_state(i) for i in range(cloud.a.num_slices)}
  text = cloud.read("job.json")
  if text:
    told["job"] = json.loads(text)
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
  parser.add_argument("--zone", required=True)
  parser.add_argument("--bucket", required=True, metavar="gs://BUCKET[/FOLDER]")
  parser.add_argument("--type", default="v5litepod-16", help="accelerator type, such as v5litepod-16, v6e-16, v5p-128")
  parser.add_argument("--num_slices", type=int, default=1)
  parser.add_argument("--hosts", type=int, help="of all slices (default: from --type)")
  parser.add_argument("--runtime_version", help="image (default: by --type)")
  kind = parser.add_mutually_exclusive_group()
  kind.add_argument("--spot", action="store_true", help="cheaper, and may be preempted at any time")
  kind.add_argument("--reserved", action="store_true", help="from a reservation of the project")
  parser.add_argument("--valid_until", metavar="6h", help="give the request up after so long")
  parser.add_argument("--mode", choices=("startup", "ssh"), default="startup")
  parser.add_argument("--run_dir", help="default: BUCKET/NAME/run")
  parser.add_argument("--retries", type=int, default=0, help="times to create the VMs again; stays and shows the output")
  parser.add_argument("--follow", action="store_true", help="stay and show the output")
  parser.add_argument("--host", type=int, help="output of this one only")
  parser.add_argument("--autodelete", action="store_true", help="delete the VMs when the job has ended")
  parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="of the job; repeatable")
  parser.add_argument("--python", default=".venv/bin/python", help=argparse.SUPPRESS)
  parser.add_argument("--setup", default=SETUP, help="shell command that prepares a VM, once for each version of the code")
  parser.add_argument("--poll_seconds", type=float, default=POLL_SECONDS, help=argparse.SUPPRESS)
  parser.add_argument("--dry_run", action="store_true", help="print every command, run none")
  parser.add_argument("--json", action="store_true", help="for status")
  a = parser.parse_args(ours)
  a.train = train
  a.bucket = a.bucket.rstrip("/")
  if not a.bucket.startswith("gs://"):
    raise LaunchError(f"--bucket={a.bucket} is not gs://BUCKET")
  if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", a.name):
    raise LaunchError(f"--name={a.name} is no name for a TPU: small letters, digits and dashes, a letter first")
  if a.num_slices < 1:
    raise LaunchError(f"--num_slices={a.num_slices} must be at least 1")
  if any("=" not in pair for pair in a.env):
    raise LaunchError(f"--env={a.env} is not KEY=VALUE")
  reserved = [flag for flag in train if flag.partition("=")[0] in ("--run_dir", "--multihost", "--token_file", "--supervise")]
  if reserved:
    raise LaunchError(f"{reserved[0]} is set by the launcher"
                      + ("; give --run_dir before the --" if "run_dir" in reserved[0] else ""))
  generation, _ = _parse_type(a.type)
  a.runtime_version = a.runtime_version or RUNTIMES[generation]
  return a


def main(argv: list[str] | None = None) -> int:
  arguments = parse(sys.argv[1:] if argv is None else argv)
  return {"up": up, "run": run, "status": status, "logs": logs, "stop": stop, "down": down}[arguments.verb](Cloud(arguments))


if __name__ == "__main__":
  terminal.run(main)
