"""A stand-in for gcloud and the TPU API: queued resources whose hosts are processes here, and buckets that are folders.

`install(folder)` puts a `gcloud` into a folder for PATH. FAKE_CLOUD is where its state lives: every command is noted in
`commands.jsonl`; hosts run the startup script they were created with. `serve(cloud)` is the metadata server and the TPU API
that hosts speak to; what they ask of it is noted in `api.jsonl`.
"""

import contextlib
import fnmatch
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

CLOUD = pathlib.Path(os.environ.get("FAKE_CLOUD", "/nonexistent"))
BEFORE_ACTIVE = ("ACCEPTED", "PROVISIONING")


def install(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "gcloud"
  path.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S {pathlib.Path(__file__).resolve()} \"$@\"\n")
  path.chmod(0o755)
  return folder


def flags(arguments) -> dict[str, str]:
  return dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))


def file_of(url: str) -> pathlib.Path:
  return CLOUD / "buckets" / url.removeprefix("gs://")


def resource(name: str) -> pathlib.Path:
  return CLOUD / "resources" / f"{name}.json"


def hosts_of(accelerator: str) -> int:
  kind, number = accelerator.rsplit("-", 1)
  return max(int(number) // (8 if kind in ("v4", "v5p") else 4), 1)


def create(name: str, f: dict[str, str]) -> int:
  if resource(name).exists():
    print("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS", file=sys.stderr)
    return 1
  script = pathlib.Path(f["metadata-from-file"].partition("=")[2]).read_text()
  slices = int(f.get("node-count", 1))
  told = {"asked": 0, "state": "ACCEPTED", "nodes": [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)],
          "type": f["accelerator-type"], "script": script, "metadata": dict(p.split("=", 1) for p in f["metadata"].split(",")),
          "pids": [], "node_state": "READY"}
  save(name, told)
  return 0


def save(name: str, told: dict) -> None:
  resource(name).parent.mkdir(parents=True, exist_ok=True)
  resource(name).write_text(json.dumps(told))


def boot(name: str, told: dict) -> None:
  """Starts the hosts."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  count = hosts_of(told["type"])
  for s, node in enumerate(told["nodes"]):
    for w in range(count):
      home = CLOUD / "vm" / f"{node}-{w}-{time.time_ns()}"  # a new machine: nothing is left of an earlier one
      home.mkdir(parents=True)
      (home / "startup.sh").write_text(told["script"])
      attributes = {**told["metadata"], "agent-worker-number": str(w),
                    "worker-network-endpoints": ",".join(f"x:{i}:127.0.0.1" for i in range(count)),
                    "tpu-env": f"NODE_ID: '{node}'\nWORKER_ID: '{w}'\n" + (
                        f"MEGASCALE_SLICE_ID: '{s}'\n" if len(told["nodes"]) > 1 else "")}
      kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS",)}
      with open(home / "console.txt", "w") as console:
        told_by_us = {"MOE_VM_METADATA": json.dumps(attributes), "MOE_VM_HOME": str(home), "MOE_VM_PORT": str(port),
                      "MOE_VM_POLL_SECONDS": os.environ.get("FAKE_POLL", "0.3"), "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(["bash", "startup.sh"], cwd=home, stdout=console, stderr=console, start_new_session=True,
                                   env={**kept, **told_by_us})
      told["pids"].append(process.pid)


def descendants(pid: int) -> list[int]:
  children: dict[int, list[int]] = {}
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      children.setdefault(int((path / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(path.name))
    except (OSError, ValueError, IndexError):
      continue
  found, todo = [], [pid]
  while todo:
    found.append(todo.pop())
    todo += children.get(found[-1], [])
  return found


def power_off(told: dict) -> None:
  """All processes of all hosts at once, and so all their memory."""
  for pid in told["pids"]:
    for one in descendants(pid):
      try:
        os.kill(one, signal.SIGKILL)
      except ProcessLookupError:
        pass
  told["pids"] = []


def preempt(cloud: pathlib.Path, name: str, state: str) -> None:
  """Takes the machines away; `state` is what is reported, of the queued resource (SUSPENDED) or of the node (PREEMPTED)."""
  global CLOUD
  CLOUD = cloud
  told = json.loads(resource(name).read_text())
  power_off(told)
  told.update({"node_state": state} if state in ("PREEMPTED", "TERMINATED") else {"state": state})
  save(name, told)


def describe(name: str) -> int:
  if not resource(name).exists():
    return missing()
  told = json.loads(resource(name).read_text())
  if told["state"] in BEFORE_ACTIVE:
    told["asked"] += 1
    told["state"] = BEFORE_ACTIVE[1]
    if told["asked"] > 2:
      told["state"] = "ACTIVE"
      boot(name, told)
    save(name, told)
  print(json.dumps({"name": name, "state": {"state": told["state"]}}))
  return 0


def missing() -> int:
  print("ERROR: NOT_FOUND", file=sys.stderr)
  return 1


def delete(name: str) -> int:
  if not resource(name).exists():
    return missing()
  power_off(json.loads(resource(name).read_text()))
  resource(name).unlink(missing_ok=True)  # the API and gcloud may be asked at once
  return 0


def describe_node(node: str) -> int:
  for path in (CLOUD / "resources").glob("*.json"):
    told = json.loads(path.read_text())
    if node in told["nodes"]:
      print(json.dumps({"name": node, "state": told["node_state"]}))
      return 0
  return missing()


def storage(verb: str, arguments: list[str]) -> int:
  if verb == "cp":
    source, target = arguments
    if target.startswith("gs://"):
      path = file_of(target)
      path.parent.mkdir(parents=True, exist_ok=True)
      data = sys.stdin.buffer.read() if source == "-" else pathlib.Path(source).read_bytes()
      part = path.parent / f".{path.name}.{os.getpid()}"
      part.write_bytes(data)
      part.rename(path)
      return 0
    if not file_of(source).exists():
      return missing()
    shutil.copyfile(file_of(source), target)
    return 0
  if verb == "cat":
    pattern = file_of(arguments[0])
    found = sorted(pattern.parent.glob(pattern.name)) if pattern.parent.exists() else []
    for path in found:
      sys.stdout.buffer.write(path.read_bytes())
    return 0 if found else missing()
  if verb == "ls":
    root = CLOUD / "buckets"
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
      url = f"gs://{path.relative_to(root)}"
      if fnmatch.fnmatch(url, arguments[0]) and url.count("/") == arguments[0].count("/"):
        print(url)
    return 0
  return 1


# ----------------------------------------------------------------------------------------------------- what VMs speak to


@contextlib.contextmanager
def serve(cloud: pathlib.Path):
  """A context whose value are the environment variables that point hosts here. A file `forbidden` in the cloud's folder takes
  the service account's rights away."""

  import http.server  # not for every command of gcloud

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      if self.path.endswith("/default/token"):
        self._answer(200 if self.headers["Metadata-Flavor"] == "Google" else 403, {"access_token": "secret"})
      else:
        self._asked(delete_it=False)

    def do_DELETE(self):
      self._asked(delete_it=True)

    def _asked(self, delete_it: bool):
      global CLOUD
      CLOUD = cloud
      cloud.mkdir(parents=True, exist_ok=True)
      with open(cloud / "api.jsonl", "a") as file:
        file.write(json.dumps([self.command, self.path]) + "\n")
      name, _, query = self.path.rpartition("/")[2].partition("?")
      if self.headers["Authorization"] != "Bearer secret" or (cloud / "forbidden").exists():
        self._answer(403, {})
      elif not resource(name).exists():
        self._answer(404, {})
      else:
        self._answer(200, {})
        if delete_it and query == "force=true":  # without it the API refuses a resource with nodes
          threading.Timer(0.2, delete, [name]).start()

    def _answer(self, code: int, value: dict):
      self.send_response(code)
      self.end_headers()
      self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
  root = f"http://127.0.0.1:{server.server_port}"
  try:
    yield {"MOE_VM_METADATA_URL": f"{root}/computeMetadata/v1/instance/", "MOE_VM_TPU_API": f"{root}/v2/",
           "MOE_VM_POWER_OFF": f"touch {cloud}/powered-off"}
  finally:
    server.shutdown()
    server.server_close()


def main(argv: list[str]) -> int:
  CLOUD.mkdir(parents=True, exist_ok=True)
  with open(CLOUD / "commands.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")
  if (CLOUD / "unavailable").exists():  # as long as a test leaves that file there
    print("ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable.", file=sys.stderr)
    return 1
  plain, f = [a for a in argv if not a.startswith("--") and a != "alpha"], flags(argv)
  if plain[:3] == ["compute", "tpus", "queued-resources"]:
    verb, name = plain[3:5]
    return create(name, f) if verb == "create" else describe(name) if verb == "describe" else delete(name)
  if plain[:4] == ["compute", "tpus", "tpu-vm", "describe"]:
    return describe_node(plain[4])
  if plain[:4] == ["compute", "tpus", "tpu-vm", "ssh"]:  # what a login shell of the first worker would do
    home = CLOUD / "ssh-home"
    home.mkdir(exist_ok=True)
    return subprocess.run(["bash", "-c", f["command"]], cwd=home, env={**os.environ, "HOME": str(home)}).returncode
  if plain[0] == "storage":
    return storage(plain[1], plain[2:])
  print(f"ERROR: unknown command {argv}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
