"""Looks over this machine: `python -m tools.doctor [--run_dir=PLACE] [--json]`; the first thing to send with a question.

Versions, devices, distributed start, a write in the run directory, memory, libtpu's lock and the clock. Exit code 0: fine, or
nothing worse than a warning; 1: something is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import secrets
import subprocess
import sys
import time
from typing import NamedTuple

from etils import epath

from moe import config
from moe.snapshot import memory
from tools import terminal
from tools.local_job import free_port

ROOT = pathlib.Path(__file__).resolve().parents[1]
_IMPORTS = pathlib.Path(config.__file__).resolve().parents[1]  # where another process finds `moe`
_LOCK = pathlib.Path("/tmp/libtpu_lockfile")
# As training makes them: one CPU device a core where there is nothing else (moe/hardware.py).
_DEVICES = """
import json, os, time
begin = time.time()
import jax
from moe import config, hardware
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  jax.config.update("jax_num_cpu_devices", hardware.cpu_devices(config.Mesh(data=-1)))
devices = jax.devices()
stats = devices[0].memory_stats() or {}
print(json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
                  "hosts": jax.process_count(), "seconds": time.time() - begin, "memory": stats.get("bytes_limit")}))
"""
_DISTRIBUTED = """
import jax, sys
jax.distributed.initialize(sys.argv[1], 1, 0)
print(jax.process_count())
"""


# What is needed for some things only, and for what. Imported where it is used.
_OPTIONAL = {
    "libtpu": "TPUs, tools.compile_check, tools.overlap --compile", "gcsfs": "gs://", "pyarrow": "parquet in tools.build_data",
"torch": "tools.export_hf --check", "transformers": "tools.export_hf --check",
    **({} if sys.version_info >= (3, 14) else {"backports.zstd": ".zst in tools.build_data"}),  # later Pythons bring it
    "lm_eval": "tools.lm_harness", "shtab": "tools.completion", "xprof": "reading profiles (docs/profiles.md)"}


class Finding(NamedTuple):
  what: str
  state: str  # ok | absent (and rarely needed) | warning | wrong
  told: str
  remedy: str = ""


def python() -> Finding:
  version = platform.python_version()
  state = "ok" if sys.version_info >= (3, 11) else "wrong"
  return Finding("python", state, f"{version} on {platform.platform()}", "" if state == "ok" else "3.11 or later is needed")


def packages() -> list[Finding]:
  """Those of requirements.txt, against their bounds."""
  path = ROOT / "requirements.txt"
  if path.exists():
    lines = path.read_text().splitlines()
  else:  # an installation knows its own
    lines = [text for text in importlib.metadata.requires("moe-pretrain") or [] if "extra ==" not in text]
  found = []
  for line in lines:
    wanted = re.match(r"([A-Za-z0-9_-]+)(?:\[\w+\])?([<>=!~.,0-9]*)", line.partition("#")[0].strip())
    if not wanted:
      continue
    name, bounds = wanted[1], wanted[2]
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found.append(Finding(name, "wrong", "not installed", f"pip install '{name}{bounds}'"))
      continue
    fits = all(_fits(version, bound) for bound in bounds.split(",") if bound)
    found.append(Finding(name, "ok" if fits else "wrong", version, "" if fits else f"pip install '{name}{bounds}'"))
  return found


def _fits(version: str, bound: str) -> bool:
  operator, limit = re.match(r"(>=|==|<=|<|>|!=)(.*)", bound).groups()
  a, b = ([int(n) for n in re.findall(r"\d+", text)[:4]] for text in (version, limit))
  a, b = a + [0] * (4 - len(a)), b + [0] * (4 - len(b))
  return {">=": a >= b, "==": a == b, "<=": a <= b, "<": a < b, ">": a > b, "!=": a != b}[operator]


def optional_packages() -> list[Finding]:
  """Those without which training runs: there or not, and what needs them."""
  found = []
  for module, use in _OPTIONAL.items():
    name = module.replace("_", "-")
    try:
      found.append(Finding(name, "ok", f"{importlib.metadata.version(name)}, for {use}"))
    except importlib.metadata.PackageNotFoundError:
      install = "jax[tpu]" if name == "libtpu" else name
      found.append(Finding(name, "absent", f"only for {use}: pip install '{install}'"))
  return found


def devices(seconds: float = 120.0) -> Finding:
  try:
    done = subprocess.run([sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=seconds, cwd=_IMPORTS)
  except subprocess.TimeoutExpired:
    return Finding("devices", "wrong", f"jax.devices() did not answer within {seconds:.0f} s",
                   "on a TPU pod all hosts must start together; another process may hold the chips")
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding("devices", "wrong", last[:200], "see the libtpu lock below, and whether jax[tpu] is installed")
  told = json.loads(done.stdout.splitlines()[-1])
  memory_text = f", {terminal.size(told['memory'])} each" if told["memory"] else ""
  return Finding("devices", "ok", f"{told['count']} x {told['kind']} ({told['platform']}){memory_text}, {told['hosts']} host, "
                                  f"there after {told['seconds']:.1f} s")


def distributed() -> Finding:
  place = f"127.0.0.1:{free_port()}"
  try:
    done = subprocess.run([sys.executable, "-c", _DISTRIBUTED, place], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"})
  except subprocess.TimeoutExpired:
    return Finding("jax.distributed", "wrong", f"no answer on {place} within 60 s", "a firewall on loopback, or a proxy for it")
  if done.returncode or done.stdout.strip() != "1":
    return Finding("jax.distributed", "wrong", (done.stderr.strip().splitlines() or ["no message"])[-1][:200], "")
  return Finding("jax.distributed", "ok", f"starts on {place}")


def writing(run_dir: str) -> Finding:
  """Writes, reads and removes 16 MB."""
  folder, data = epath.Path(run_dir), secrets.token_bytes(16 << 20)
  path = folder / f".doctor-{secrets.token_hex(4)}"
  begin = time.monotonic()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    same = path.read_bytes() == data
    path.unlink()
  except Exception as error:  # the object stores' libraries have their own kinds
    return Finding("write test", "wrong", f"{run_dir}: {error}"[:200],
                   "another --run_dir, or rights to write there; gs:// needs gcsfs (pip install gcsfs)")
  seconds = time.monotonic() - begin
  if not same:
    return Finding("write test", "wrong", f"{run_dir}: what was read is not what was written", "do not keep a run there")
  free = ""
  if "://" not in run_dir:
    left = os.statvfs(run_dir)
    free = f", {terminal.size(left.f_bavail * left.f_frsize)} free"
  return Finding("write test", "ok", f"{run_dir}: 16 MB written and read in {seconds:.2f} s{free}")


def host_memory() -> list[Finding]:
  left = memory.available_bytes()
  found = [Finding("memory", "ok" if left > 4e9 else "warning", f"{terminal.size(left)} available, {os.cpu_count()} cores",
                   "" if left > 4e9 else "little for snapshots; Snapshot.slots = 1 halves their need")]
  try:
    os.close(os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    found.append(Finding("memfd", "ok", "the snapshots' memory can be made and sealed"))
  except (OSError, AttributeError) as error:
    found.append(Finding("memfd", "warning", str(error), "no snapshots here (--supervise); checkpoints work"))
  return found


def libtpu_lock() -> Finding:
  if not _LOCK.exists():
    return Finding("libtpu lock", "ok", "none")
  holders = []
  for path in pathlib.Path("/proc").glob("[0-9]*/fd/*"):
    try:
      if os.readlink(path) in (str(_LOCK), "/dev/accel0", "/dev/vfio/0"):
        holders.append(path.parts[2])
    except OSError:
      continue
  if holders:
    return Finding("libtpu lock", "warning", f"held by process {', '.join(sorted(set(holders)))}", "end it before a new run")
  return Finding("libtpu lock", "warning", f"{_LOCK} lies there and nobody holds it", f"rm {_LOCK} if libtpu refuses to start")


def clock() -> Finding:
  """Whether the kernel counts it as synchronised."""
  try:
    buffer = (ctypes.c_byte * 512)()
    state = ctypes.CDLL(None).adjtimex(buffer)
  except (OSError, AttributeError):
    return Finding("clock", "warning", "cannot be asked here")
  now = time.strftime("%Y-%m-%d %H:%M:%S %z")
  if state == 5:  # TIME_ERROR
    return Finding("clock", "warning", f"{now}, not synchronised", "start an NTP service: hosts' events are ordered by time")
  return Finding("clock", "ok" if state >= 0 else "warning", now)


def examine(run_dir: str) -> list[Finding]:
  installed = [python(), *packages(), *optional_packages()]
  return [*installed, devices(), distributed(), writing(run_dir), *host_memory(), libtpu_lock(), clock()]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.doctor", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run_dir", default="runs", help="where runs are to be kept, for the write test; may be gs://")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args(argv)
  found = examine(arguments.run_dir)
  if arguments.json:
    terminal.as_json([finding._asdict() for finding in found])
  else:
    terminal.table(("what", "state", "told"), [finding[:3] for finding in found], left=("what", "state", "told"))
    for finding in found:
      if finding.state in ("warning", "wrong"):
        print(f"{finding.state}: {finding.what}: {finding.told}" + (f". {finding.remedy}" if finding.remedy else ""))
  return terminal.DIFFERS if any(finding.state == "wrong" for finding in found) else terminal.FINE


if __name__ == "__main__":
  terminal.run(main)
