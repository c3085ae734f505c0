"""What runs on every host of a TPU VM, as root, from boot on: takes the job from the bucket, keeps it going, and ends the bill.

Only the standard library, for the Python of the VM's image (3.8 or later): tools.launch_tpu_vm puts this file into the startup
script. The bucket folder of a job holds

    job.json            what is to run: {"number", "command", "code", "hosts", "setup", "autodelete", "max_hours", "resource"};
                        {"command": null} stops it
    code-<digest>.tar.gz, token
    hosts/<incarnation>/0.json           address of host 0; an incarnation is one creation of the VMs
    state/<number>/<index>.json          how the command ended on a host
    over/<number>.json                   {"why", "code", "host"}: the job is over for all hosts, by one host's word: its set-up
                                         fails, or its hours are up
    logs/<index>/<time>.txt              its output in parts, since objects cannot be appended

A host's index is slice x hosts of a slice + worker, so a VM that is made again has the index of the one it replaces.

The VMs delete themselves, without the laptop: with "autodelete" when the job has ended on every host or is over, and always
when the hours are up ("moe-max-hours" of the VM's metadata counts from its first boot, "max_hours" of a job from when it is
first seen). Host 0 does it; the others do where it has not after ten minutes. A thread of every host does it at the last
minute, whatever the rest of this program is waiting for.
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
import traceback
import urllib.error
import urllib.request

POLL_SECONDS = float(os.environ.get("MOE_VM_POLL_SECONDS", "10"))
PORT = int(os.environ.get("MOE_VM_PORT", "8476"))
HOME = pathlib.Path(os.environ.get("MOE_VM_HOME", "/opt/moe"))
METADATA = os.environ.get("MOE_VM_METADATA_URL", "http://metadata.google.internal/computeMetadata/v1/instance/")
TPU_API = os.environ.get("MOE_VM_TPU_API", "https://tpu.googleapis.com/v2/")
SETUP_TRIES = 5
SETUP_SECONDS = 1800.0  # of one try
DELETE_TRIES = 5  # before this host is powered off instead
OTHERS_WAIT_SECONDS = 60 * POLL_SECONDS  # for host 0 to delete the VMs
STORAGE_SECONDS = 300.0  # of one gcloud storage command
_STOPPED = (143, -15)  # exit codes of a command that its machine, or another host's, told to end


def _get(url):
  asked = urllib.request.Request(METADATA + url, headers={"Metadata-Flavor": "Google"})
  return urllib.request.urlopen(asked, timeout=10).read().decode()


def metadata(name):
  """An attribute of the VM; "" where it has none. MOE_VM_METADATA (JSON) stands in for the server."""
  if "MOE_VM_METADATA" in os.environ:
    return json.loads(os.environ["MOE_VM_METADATA"]).get(name, "")
  while True:  # a host that took itself for another would stop the whole job
    try:
      return _get("attributes/" + name)
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


_first_times = {}


def first_time(name):
  """When this was first asked on this machine, seconds since the epoch; reboots do not change it."""
  if name not in _first_times:
    path = HOME / ("first-" + name)
    try:
      _first_times[name] = float(path.read_text())
    except (OSError, ValueError):
      _first_times[name] = time.time()
      try:
        path.write_text(repr(_first_times[name]))
      except OSError:  # a full disk: this process knows it all the same
        pass
  return _first_times[name]


def this_boot():
  """Other after every boot; "" where the kernel does not say."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return ""


def alive(pid):
  """Whether a process is there and not only waiting to be buried."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (OSError, IndexError):
    return False


def end_orphan():
  """Ends the command that an agent before this one left behind when it was killed: two would write into one run directory."""
  try:
    pid, boot = (HOME / "command").read_text().split()
  except (OSError, ValueError):
    return
  limit = time.time() + 300
  try:
    while boot == this_boot() and alive(pid):
      os.killpg(int(pid), signal.SIGTERM if time.time() < limit else signal.SIGKILL)
      time.sleep(POLL_SECONDS)
  except ProcessLookupError:
    pass
  (HOME / "command").unlink()


def several(text):
  """The JSON documents of a text that has one after the other."""
  decoder, found, at = json.JSONDecoder(), [], 0
  while text[at:].strip():
    at += len(text[at:]) - len(text[at:].lstrip())
    value, at = decoder.raw_decode(text, at)
    found.append(value)
  return found


class Bucket:
  """The folder of the job, through the gcloud that every TPU VM has."""

  def __init__(self, root):
    self.root = root

  def _run(self, *arguments, stdin=None):
    """The finished command; one that hangs counts as failed."""
    command = ["gcloud", "storage", *arguments]
    try:
      return subprocess.run(command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=STORAGE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
      return subprocess.CompletedProcess(command, 1, b"")

  def read(self, name):
    """Its text, or None. A name with * gives those of all that fit, one after the other."""
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


class SetupFailed(Exception):
  """This host cannot run the job, however often it tries."""


class Superseded(Exception):
  """The bucket has another job, or the machine goes down, or the job is over."""


class Deletion:
  """The queued resource deletes itself, by the VM's service account: roles/tpu.editor, scope cloud-platform."""

  def __init__(self, say):
    self.say, self.resource, self.lock = say, metadata("moe-resource"), threading.Lock()
    self.tries, self.next_try = 0, 0.0

  def _ask(self, method, query=""):
    token = json.loads(_get("service-accounts/default/token"))["access_token"]
    asked = urllib.request.Request(TPU_API + self.resource + query, method=method, headers={"Authorization": "Bearer " + token})
    return urllib.request.urlopen(asked, timeout=60).read()

  def rehearse(self):
    """Says at the start, not after hours, that the account lacks what it will need."""
    try:
      self._ask("GET")
    except (OSError, ValueError, KeyError) as error:
      self.say(f"WARNING: this VM cannot read {self.resource}, so it may not be able to delete it: {error}; give its service "
               "account roles/tpu.editor (docs/tpu_vm.md)")

  def now(self):
    """One try, at growing intervals; after the last of them the host is powered off."""
    with self.lock:
      if not self.resource or time.time() < self.next_try:
        return
      self.tries += 1
      self.next_try = time.time() + POLL_SECONDS * min(2**self.tries, 32)
      try:
        self._ask("DELETE", "?force=true")
        self.say(f"deleting {self.resource}")
        self.tries, self.next_try = 0, time.time() + OTHERS_WAIT_SECONDS  # it is a matter of minutes
        return
      except urllib.error.HTTPError as error:
        if error.code == 404:
          return
        problem = str(error)
      except (OSError, ValueError, KeyError) as error:
        problem = str(error)
      self.say(f"ALARM: {self.resource} cannot be deleted (try {self.tries}): {problem}; it is billed until `launch_tpu_vm "
               "down`; the VM's service account needs roles/tpu.editor")
      if self.tries == DELETE_TRIES:
        self.say("powering this host off instead; whether that ends the bill is not documented: see `launch_tpu_vm status`")
        subprocess.run(shlex.split(os.environ.get("MOE_VM_POWER_OFF", "shutdown -h now")), check=False)


class Agent:
  def __init__(self, root):
    self.bucket = Bucket(root)
    self.slice, self.worker, workers = place()
    self.index = self.slice * workers + self.worker
    self.incarnation = metadata("moe-incarnation") or "0"
    self.log = Log(self.bucket, self.index)
    self.process, self.number, self.job = None, None, {}
    self.ending, self.stopping, self.over, self.over_since = False, False, None, 0.0
    self.deletion = Deletion(self.say)
    hours = float(metadata("moe-max-hours") or "inf")
    self.vm_deadline = first_time(f"boot-{self.incarnation}") + 3600 * hours
    self.hours = hours
    signal.signal(signal.SIGTERM, self._end)

  def say(self, text):
    self.log.line(f"[host {self.index}] {text}")

  def _end(self, *_):
    """The VM goes down (preemption, maintenance): the job has what time is left to save."""
    self.ending = True
    if self.process:
      self.process.send_signal(signal.SIGTERM)
    self.say("the machine is going down")

  # ------------------------------------------------------------------------------------------------------------- the hours

  def deadline(self):
    """When the VMs must be gone, seconds since the epoch; infinite without a cap."""
    job = self.job
    hours = job.get("max_hours")
    return min(self.vm_deadline, first_time("job-" + job["number"]) + 3600 * hours if hours else float("inf"))

  def last_call(self):
    """When the job is told to save: five minutes before the deadline, or the last third of a short time."""
    hours = min(self.hours, self.job.get("max_hours") or float("inf"))
    return self.deadline() - min(300.0, 3600 * hours / 3)

  def watch(self):
    """The thread that deletes the VMs at the deadline, whatever the main one is waiting for."""
    while True:
      time.sleep(POLL_SECONDS)
      try:
        if time.time() > self.deadline():
          self.deletion.now()
          self.log.flush()
      except Exception:  # it must outlive every surprise: nothing else ends the bill
        traceback.print_exc()

  # --------------------------------------------------------------------------------------------------------------- the loop

  def run(self):
    threading.Thread(target=self.watch, daemon=True).start()
    end_orphan()
    if self.index == 0:
      self.bucket.keep(f"hosts/{self.incarnation}/0.json", json.dumps({"address": address(self.worker)}))
      if self.deadline() < float("inf"):
        self.deletion.rehearse()
    while not self.ending:
      self._take(self._job())
      self._look()
      self._finish()
      self.log.flush()
      time.sleep(POLL_SECONDS)
    self.stop()
    self.log.flush()

  def _job(self):
    try:
      return json.loads(self.bucket.read("job.json") or "null")
    except ValueError:
      return None

  def _take(self, job):
    """Starts what is new in the bucket, after the end of what runs."""
    if not job or job["number"] == self.number:
      return
    self.stop()
    self.number, self.job, self.over = job["number"], job, None
    self.deletion.resource = self.deletion.resource or job.get("resource", "")
    if not job["command"] or self._ended_well(job["hosts"]) or self._read_over():
      return
    if self.index == 0 and job.get("autodelete") and self.deadline() == float("inf"):
      self.deletion.rehearse()
    try:
      self.start(job)
    except SetupFailed as error:
      self._declare(f"set-up of host {self.index} failed: {error}", 1)
    except Superseded:  # _finish and the next _take see why
      pass

  def _states(self):
    """What the hosts of the job have written about its end."""
    try:
      return several(self.bucket.read(f"state/{self.number}/*.json") or "")
    except ValueError:
      return []

  def _ended_well(self, hosts):
    """Machines that boot again after the end of the job do not do it a second time."""
    return len({state.get("host") for state in self._states() if state["code"] == 0}) == hosts

  def _ended_everywhere(self):
    ended = {state.get("host") for state in self._states()
             if state["code"] not in _STOPPED and state.get("incarnation") == self.incarnation}
    return len(ended) == self.job["hosts"]

  def _read_over(self):
    """The word of any host that the job is over; read once, and kept."""
    if self.over is None:
      try:
        self.over = json.loads(self.bucket.read(f"over/{self.number}.json") or "null")
      except ValueError:
        pass
    return self.over

  def _declare(self, why, code):
    """Ends the job for all hosts."""
    self.say(f"OVER: {why}")
    if not self.job.get("autodelete") and self.deadline() == float("inf"):
      self.say("the VMs stay, and are billed, until `launch_tpu_vm down`")
    self.over = {"why": why, "code": code, "host": self.index}
    self.log.flush()  # before the mark: who waits for it shows the output and goes
    self.bucket.keep(f"over/{self.number}.json", json.dumps(self.over))

  def _finish(self):
    """Ends the job where its time is up or a host has said so, and the VMs where nobody needs them any more."""
    late = time.time() > self.last_call()
    if not self.job.get("command"):
      if late:
        self.say("the hours of these VMs are up")
        self.deletion.now()
      return
    if late and not self._read_over():
      self._declare(f"max_hours: {min(self.hours, self.job.get('max_hours') or float('inf')):g} h are up", 143)
    waiting = self.process is None and self.job.get("autodelete")
    done = self._read_over() or (waiting and self._my_turn() and self._ended_everywhere())
    if not done:
      return
    self.stop()
    self.log.flush()
    self.over_since = self.over_since or time.time()
    if (late or self.job.get("autodelete")) and self._my_turn():
      self.deletion.now()

  def _my_turn(self):
    """Host 0 deletes the VMs; the others look after it from time to time, and do it where it does not."""
    if self.index == 0:
      return True
    self.over_since = self.over_since or time.time()
    return time.time() > self.over_since + OTHERS_WAIT_SECONDS

  # ------------------------------------------------------------------------------------------------------- set-up and start

  def start(self, job):
    code = self._set_up(job)
    leader = self._leader()
    token = HOME / "token"
    command = list(job["command"])
    if job["hosts"] > 1:
      command += [f"--multihost={leader}:{PORT},{job['hosts']},{self.index}", f"--token_file={token}"]
    environment = dict(os.environ, PYTHONUNBUFFERED="1", **job.get("env", {}))
    if job.get("slices", 1) > 1:
      environment.update(MEGASCALE_COORDINATOR_ADDRESS=leader, MEGASCALE_NUM_SLICES=str(job["slices"]),
                         MEGASCALE_SLICE_ID=str(self.slice))
    self.say(" ".join(map(shlex.quote, command)))
    try:
      self.process, self.reader = self._spawn(command, code, environment)
    except OSError as error:  # no such program: the set-up did not make it
      raise SetupFailed(str(error)) from error
    self.over_since = 0.0

  def _spawn(self, command, folder, environment=None):
    """(process, thread that copies its output to the log)."""
    process = subprocess.Popen(command, cwd=str(folder), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               universal_newlines=True, errors="replace", start_new_session=True)
    (HOME / "command").write_text(f"{process.pid} {this_boot()}")
    reader = threading.Thread(target=self._copy, args=(process,), daemon=True)
    reader.start()
    return process, reader

  def _set_up(self, job):
    """The folder with the code and its environment, after a bounded number of tries.

    Raises:
      SetupFailed: the last of them failed.
      Superseded: the job is not wanted any more.
    """
    folder = HOME / job["code"].replace(".tar.gz", "")
    for attempt in range(1, SETUP_TRIES + 1):
      try:
        if not (folder / "ready").exists():
          self._prepare(job, folder)
          (folder / "ready").touch()
        self._fetch_token(HOME / "token")
        return folder
      except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
        self.say(f"set-up failed, try {attempt} of {SETUP_TRIES}: {problem}")
      if attempt < SETUP_TRIES:
        self._wait(POLL_SECONDS * 2 ** (attempt - 1))
    raise SetupFailed(f"{SETUP_TRIES} tries; {problem}")

  def _prepare(self, job, folder):
    """One try: fetches and unpacks the code, and runs the set-up command, whose output goes to the log."""
    folder.mkdir(parents=True, exist_ok=True)
    if not self.bucket.fetch(job["code"], folder / "code.tar.gz"):
      raise OSError(f"{self.bucket.root}/{job['code']} cannot be fetched")
    subprocess.run(["tar", "-xzf", "code.tar.gz"], cwd=str(folder), check=True)
    if not job["setup"]:
      return
    process, reader = self._spawn(["bash", "-c", job["setup"]], folder)
    limit = time.time() + SETUP_SECONDS
    try:
      while process.poll() is None:
        if time.time() > limit:
          raise OSError(f"the set-up command took more than {SETUP_SECONDS:.0f} s")
        self._wait(POLL_SECONDS)
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
      reader.join(10)
    if process.returncode:
      raise OSError(f"the set-up command ended with code {process.returncode}; its output is above")

  def _fetch_token(self, path):
    path.touch(mode=0o600)
    path.chmod(0o600)
    if not self.bucket.fetch("token", path):
      raise OSError("the job's token cannot be fetched")
    path.chmod(0o600)

  def _wait(self, seconds):
    """Sleeps, and ships the log meanwhile.

    Raises:
      Superseded: there is no use in waiting on.
    """
    end = time.time() + seconds
    while True:
      self.log.flush()
      if self.ending or time.time() > self.last_call() or self._read_over():
        raise Superseded
      job = self._job()
      if job and job["number"] != self.number:
        raise Superseded
      if time.time() >= end:
        return
      time.sleep(min(POLL_SECONDS, max(end - time.time(), 0)))

  def _leader(self):
    """Address of host 0, when it has said it."""
    while True:
      told = self.bucket.read(f"hosts/{self.incarnation}/0.json")
      if told:
        return json.loads(told)["address"]
      self._wait(POLL_SECONDS)

  def _copy(self, process):
    for line in process.stdout:
      self.log.line(line.rstrip("\n"))

  # ---------------------------------------------------------------------------------------------------------------- the end

  def _look(self):
    if self.process is not None and self.process.poll() is not None:
      code = self.process.returncode
      self.process = None
      self.reader.join(10)
      self.say(f"ended with code {code}")
      self.log.flush()  # before the state: who waits for that shows the output and goes
      state = {"code": code, "incarnation": self.incarnation, "host": self.index, "time": time.time()}
      self.bucket.keep(f"state/{self.number}/{self.index}.json", json.dumps(state))
      if code in _STOPPED and not self.ending and not self.stopping:
        self.number = None  # another host's machine went down and took the job along: again, when it is back

  def stop(self):
    """SIGTERM, which the trainer answers with a checkpoint, and its end."""
    if self.process is None:
      return
    self.stopping = True
    self.process.send_signal(signal.SIGTERM)
    limit = time.time() + 300
    while self.process.poll() is None and time.time() < limit:
      time.sleep(min(POLL_SECONDS, 1))
      self.log.flush()
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()
    self._look()
    self.stopping = False

  def abandon(self):
    """After a mistake of this program: no command is left running that nobody looks after."""
    if self.process is not None and self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)


def main(root):
  """The agent, again after whatever ends it: without it nothing ends the bill."""
  HOME.mkdir(parents=True, exist_ok=True)
  crashes = 0
  while True:
    agent = None
    try:
      agent = Agent(root)
      return agent.run()
    except Exception as error:
      traceback.print_exc()
      crashes += 1
      if agent is not None:
        agent.abandon()
        if agent.number and crashes >= SETUP_TRIES:
          agent._declare(f"the agent of host {agent.index} failed {crashes} times: {error!r}", 1)
      time.sleep(POLL_SECONDS)


if __name__ == "__main__":
  main(sys.argv[1])
