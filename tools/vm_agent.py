"""What runs on every host of a TPU VM, as root, from boot on: takes the job from the bucket and keeps it going.

Only the standard library, for the Python of the VM's image (3.8 or later): tools.launch_tpu_vm puts this file into the startup
script. The bucket folder of a job holds

    job.json            what is to run: {"number", "command", "code", "hosts", "setup"}; {"command": null} stops it
    code-<digest>.tar.gz, token
    hosts/<incarnation>/0.json           address of host 0; an incarnation is one creation of the VMs
    state/<number>/<index>.json          how the command ended on a host
    logs/<index>/<time>.txt              its output in parts, since objects cannot be appended

A host's index is slice x hosts of a slice + worker, so a VM that is made again has the index of the one it replaces.
"""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

POLL_SECONDS = float(os.environ.get("MOE_VM_POLL_SECONDS", "10"))
PORT = int(os.environ.get("MOE_VM_PORT", "8476"))
HOME = pathlib.Path(os.environ.get("MOE_VM_HOME", "/opt/moe"))
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def metadata(name):
  """An attribute of the VM; "" where it has none. MOE_VM_METADATA (JSON) stands in for the server."""
  if "MOE_VM_METADATA" in os.environ:
    return json.loads(os.environ["MOE_VM_METADATA"]).get(name, "")
  while True:  # a host that took itself for another would stop the whole job
    try:
      asked = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
      return urllib.request.urlopen(asked, timeout=10).read().decode()
    except urllib.error.HTTPError as error:
      if error.code == 404:
        return ""
    except OSError:
      pass
    time.sleep(POLL_SECONDS)


def place():
  """(slice, worker, workers of a slice) of this host, from the attributes that TPU VMs have."""
  told = dict(line.split(":", 1) for line in metadata("tpu-env").splitlines() if ":" in line)
  told = {key.strip(): value.strip().strip("'\"") for key, value in told.items()}
  worker = int(metadata("agent-worker-number") or told.get("WORKER_ID", "0"))
  workers = len([e for e in metadata("worker-network-endpoints").split(",") if e]) or 1
  tail = told.get("NODE_ID", "").rpartition("-")[2]  # slices of one request are called NAME-0, NAME-1, ...
  by_name = int(tail) if tail.isdigit() and metadata("moe-slices") not in ("", "1") else 0
  slice_number = int(told.get("MEGASCALE_SLICE_ID", by_name))
  return slice_number, worker, workers


def address(worker):
  """This host's own address: its entry of the endpoints, `id:port:address`."""
  endpoints = [e for e in metadata("worker-network-endpoints").split(",") if e]
  return endpoints[worker].split(":")[-1] if endpoints else "127.0.0.1"


class Bucket:
  """The folder of the job, through the gcloud that every TPU VM has."""

  def __init__(self, root):
    self.root = root

  def _run(self, *arguments, stdin=None):
    return subprocess.run(["gcloud", "storage", *arguments], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

  def read(self, name):
    """Its text, or None."""
    done = self._run("cat", f"{self.root}/{name}")
    return done.stdout.decode() if done.returncode == 0 else None

  def keep(self, name, text):
    """Until it is written."""
    while not self.write(name, text):
      time.sleep(POLL_SECONDS)

  def write(self, name, text):
    return self._run("cp", "-", f"{self.root}/{name}", stdin=text.encode()).returncode == 0

  def fetch(self, name, path):
    return self._run("cp", f"{self.root}/{name}", str(path)).returncode == 0


class Log:
  """Output of the job: to the console, and in parts to the bucket."""

  def __init__(self, bucket, index):
    self.bucket, self.index, self.pending, self.lock = bucket, index, [], threading.RLock()

  def line(self, text):
    print(text, flush=True)
    with self.lock:
      self.pending.append(text)

  def flush(self):
    with self.lock:
      text, self.pending = self.pending, []
    if text and not self.bucket.write(f"logs/{self.index}/{time.time_ns():020}.txt", "\n".join(text) + "\n"):
      with self.lock:
        self.pending = text + self.pending


class Agent:
  def __init__(self, root):
    self.bucket = Bucket(root)
    self.slice, self.worker, workers = place()
    self.index = self.slice * workers + self.worker
    self.incarnation = metadata("moe-incarnation") or "0"
    self.log = Log(self.bucket, self.index)
    self.process, self.number, self.ending, self.stopping = None, None, False, False
    signal.signal(signal.SIGTERM, self._end)

  def _end(self, *_):
    """The VM goes down (preemption, maintenance): the job has what time is left to save."""
    self.ending = True
    if self.process:
      self.process.send_signal(signal.SIGTERM)
    self.log.line(f"[host {self.index}] the machine is going down")

  def run(self):
    if self.index == 0:
      self.bucket.keep(f"hosts/{self.incarnation}/0.json", json.dumps({"address": address(self.worker)}))
    while not self.ending:
      job = self._job()
      if job and job["number"] != self.number:
        self.stop()
        self.number = job["number"]
        if job["command"] and not self._ended_well(job["hosts"]):
          self.start(job)
      self._look()
      self.log.flush()
      time.sleep(POLL_SECONDS)
    self.stop()
    self.log.flush()

  def _job(self):
    try:
      return json.loads(self.bucket.read("job.json") or "null")
    except ValueError:
      return None

  def _ended_well(self, hosts):
    """Machines that boot again after the end of the job do not do it a second time."""
    for index in range(hosts):
      state = self.bucket.read(f"state/{self.number}/{index}.json")
      if state is None or json.loads(state)["code"] != 0:
        return False
    return True

  def start(self, job):
    code = HOME / job["code"].replace(".tar.gz", "")
    try:
      if not (code / "ready").exists():
        code.mkdir(parents=True, exist_ok=True)
        if not self.bucket.fetch(job["code"], code / "code.tar.gz"):
          raise OSError(f"{self.bucket.root}/{job['code']} cannot be fetched")
        subprocess.run(["tar", "-xzf", "code.tar.gz"], cwd=code, check=True)
        if job["setup"]:
          subprocess.run(["bash", "-c", job["setup"]], cwd=code, check=True)
        (code / "ready").touch()
      leader = self._leader()
      token = HOME / "token"
      token.touch(mode=0o600)
      token.chmod(0o600)
      if not self.bucket.fetch("token", token):
        raise OSError("the job's token cannot be fetched")
      token.chmod(0o600)
    except (OSError, subprocess.SubprocessError) as error:
      self.log.line(f"[host {self.index}] cannot start: {error}")
      self.number = None  # again at the next look
      return
    command = list(job["command"])
    if job["hosts"] > 1:
      command += [f"--multihost={leader}:{PORT},{job['hosts']},{self.index}", f"--token_file={token}"]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", **job.get("env", {}))
    if job.get("slices", 1) > 1:
      environment.update(MEGASCALE_COORDINATOR_ADDRESS=leader, MEGASCALE_NUM_SLICES=str(job["slices"]),
                         MEGASCALE_SLICE_ID=str(self.slice))
    self.log.line(f"[host {self.index}] " + " ".join(map(shlex.quote, command)))
    self.process = subprocess.Popen(command, cwd=code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    text=True, errors="replace", start_new_session=True)
    self.reader = threading.Thread(target=self._copy, args=(self.process,), daemon=True)
    self.reader.start()

  def _leader(self):
    """Address of host 0, when it has said it."""
    while not self.ending:
      told = self.bucket.read(f"hosts/{self.incarnation}/0.json")
      if told:
        return json.loads(told)["address"]
      time.sleep(POLL_SECONDS)
    raise OSError("the machine is going down")

  def _copy(self, process):
    for line in process.stdout:
      self.log.line(line.rstrip("\n"))

  def _look(self):
    if self.process is not None and self.process.poll() is not None:
      code = self.process.returncode
      self.process = None
      self.reader.join(10)
      self.log.line(f"[host {self.index}] ended with code {code}")
      self.log.flush()  # before the state: who waits for that shows the output and goes
      state = json.dumps({"code": code, "incarnation": self.incarnation, "time": time.time()})
      self.bucket.keep(f"state/{self.number}/{self.index}.json", state)
      if code in (143, -15) and not self.ending and not self.stopping:
        self.number = None  # another host's machine went down and took the job along: again, when it is back

  def stop(self):
    """SIGTERM, which the trainer answers with a checkpoint, and its end."""
    if self.process is None:
      return
    self.stopping = True
    self.process.send_signal(signal.SIGTERM)
    try:
      self.process.wait(300)
    except subprocess.TimeoutExpired:
      os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()
    self._look()
    self.stopping = False


if __name__ == "__main__":
  Agent(sys.argv[1]).run()
