"""Mutual TLS between the hosts: the snapshot processes and supervisors, and JAX's coordination service (jax >= 0.12)."""

import inspect
import os
import shutil
import subprocess
import sys

import jax
import pytest

from moe import command_line
from moe import train
from moe.config import ConfigError
from moe.snapshot import wire
from moe.snapshot.wire import WireError
from tests import small
from tools import local_job

TOKEN = b"t" * 32
HAS_TLS = "mtls_cert_file" in inspect.signature(jax.distributed.initialize).parameters
needs_tls = pytest.mark.skipif(not HAS_TLS, reason=f"jax {jax.__version__} has no TLS for its coordination service")

# A process of a job of two, or a stranger who would be its second one; JAX aborts it where it is kept out.
MEMBER = """
import os, sys, jax
from moe import command_line, train
address, index, patience, *tls = sys.argv[1:]
arguments, _ = command_line.parse([f"--multihost={address},2,{index}", *tls])
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(*command_line.hosts(arguments.multihost), **train._coordination(arguments),
                           initialization_timeout=int(patience))
print(jax.process_index(), "of", jax.process_count(), len(jax.devices()))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
  """certificates(authority): --tls's value, of a host of 127.0.0.1 that this authority knows."""
  if not shutil.which("openssl"):
    pytest.skip("no openssl program to make certificates with")
  made = {}

  def make(authority="ours"):
    if authority in made:
      return made[authority]
    folder = tmp_path_factory.mktemp(authority)

    def openssl(*arguments):
      subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "ca.key", "-out",
            "ca.pem", "-subj", "/CN=job", "-days", "1")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "host.key", "-out", "host.csr",
            "-subj", "/CN=host", "-addext", "subjectAltName=IP:127.0.0.1")
    openssl("x509", "-req", "-in", "host.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-out", "host.pem",
            "-days", "1", "-copy_extensions", "copy")
    made[authority] = ",".join(str(folder / name) for name in ("host.pem", "host.key", "ca.pem"))
    return made[authority]

  return make


def test_tls_keeps_strangers_with_the_token_out(certificates):
  server, client = wire.tls_contexts(*command_line.tls(certificates()))

  def serve(link, hello):
    link.send({"hello": link.receive()[0]})

  listener = wire.Listener("127.0.0.1", 0, TOKEN, serve, tls=server)
  assert wire.connect(listener.address, TOKEN, {"host": 1}, client).ask({"a": 1})[0] == {"hello": {"a": 1}}
  with pytest.raises(WireError):
    wire.connect(listener.address, TOKEN, {"host": 1})
  with pytest.raises(WireError):
    wire.connect(listener.address, TOKEN, {"host": 1}, wire.tls_contexts(*command_line.tls(certificates("theirs")))[1])


def test_a_jax_without_it_says_so(monkeypatch):
  arguments, _ = command_line.parse(["--multihost=127.0.0.1:1,2,0", "--tls=a,b,c"])
  monkeypatch.setattr(jax.distributed, "initialize", lambda coordinator_address=None: None)
  with pytest.raises(ConfigError, match=f"jax {jax.__version__} has no TLS for its coordination service, jax >= 0.12 has"):
    train._coordination(arguments)
  monkeypatch.setattr(jax.distributed, "initialize", lambda mtls_cert_file=None: None)
  assert train._coordination(arguments) == {"mtls_cert_file": "a", "mtls_key_file": "b", "mtls_ca_file": "c",
                                            "verify_secure_credentials": True}
  assert train._coordination(command_line.parse(["--multihost=127.0.0.1:1,2,0"])[0]) == {}


def member(address, index, patience, tls):
  command = [sys.executable, "-c", MEMBER, address, str(index), str(patience), *([f"--tls={tls}"] if tls else [])]
  return subprocess.Popen(command, cwd=local_job.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("stranger", ["none", "theirs", "of a job without TLS"])
@pytest.mark.tpu
@pytest.mark.slow
@needs_tls
def test_the_coordination_service_keeps_strangers_out(certificates, stranger):
  """One without a certificate and one with another authority's are refused, and the job then begins as if nobody had
  called. The control: without TLS the stranger is taken for the second process."""
  address = f"127.0.0.1:{local_job.free_port()}"
  ours = certificates() if stranger != "of a job without TLS" else None
  first = member(address, 0, 90, ours)
  other = member(address, 1, 8 if ours else 90, certificates("theirs") if stranger == "theirs" else None)
  said = other.communicate(timeout=120)[0]
  if ours:
    assert other.returncode and "1 of 2" not in said
    assert first.poll() is None, first.communicate()[0]
    other = member(address, 1, 60, ours)
    said = other.communicate(timeout=120)[0]
  assert "1 of 2" in said and "0 of 2" in first.communicate(timeout=60)[0]


@pytest.mark.tpu
@pytest.mark.slow
@needs_tls
def test_a_job_under_tls_recovers(certificates, tmp_path):
  """Supervisors, snapshot processes and trainers of two hosts, one of which is lost."""
  folder = small.write_corpus(tmp_path / "tiny")
  changes = {"Data.domains": "(@tiny/Domain(),)", "tiny/Domain.name": '"tiny"', "tiny/Domain.path": f'"{folder}"'}
  with local_job.Job(tmp_path / "run", 2, changes, flags=[f"--tls={certificates()}"]) as job:
    job.wait_for_step(8)
    assert job.kill(1, "host")
    job.start(1)
    job.finish()
    assert job.events("recovery")[-1]["tier"] == "decoded" and job.events("recovery")[-1]["step"] >= 6
