"""Snapshots without a trainer: the code's arithmetic, the wire, and keepers of several hosts in this process."""

import itertools
import json
import os
import pathlib
import queue
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from moe import config
from moe.snapshot import client
from moe.snapshot import decoding
from moe.snapshot import leader as leader_lib
from moe.snapshot import memory
from moe.snapshot import parity
from moe.snapshot import supervisor
from moe.snapshot import wire
from moe.snapshot.wire import WireError
from tools import local_keeper

TOKEN = local_keeper.TOKEN


# ------------------------------------------------------------------------------------------------------------- parity


def slow_product(a: int, b: int) -> int:
  """In GF(2^8) by the definition: polynomials over GF(2), modulo x^8 + x^4 + x^3 + x^2 + 1."""
  product = 0
  for i in range(8):
    if b >> i & 1:
      product ^= a << i
  for i in range(15, 7, -1):
    if product >> i & 1:
      product ^= 0x11D << (i - 8)
  return product


def test_products_by_definition():
  for a, b in itertools.product(range(0, 256, 7), range(256)):
    assert parity.multiply(a, b) == slow_product(a, b)
  assert all(parity.multiply(a, parity.power(a, 254)) == 1 for a in range(1, 256))


@pytest.mark.parametrize("how", ["isal", "numpy"])
@pytest.mark.parametrize("size", [1, 31, 64, 4097])
def test_accumulate(how, size):
  if how == "isal" and parity.backend() != "isal":
    pytest.skip("pyeclib's wheel brings no ISA-L here")
  rng = np.random.default_rng(size)
  out, data = rng.integers(0, 256, (2, size), np.uint8)
  for coefficient in (0, 1, 2, 143, 255):
    expected = np.array([o ^ slow_product(coefficient, int(d)) for o, d in zip(out, data)], np.uint8)
    found = out.copy()
    parity.accumulate(found, coefficient, data, how)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("n, m", [(n, m) for n in range(2, 10) for m in (1, 2) if n > m])
def test_any_m_hosts_may_be_lost(n, m):
  """Round trip for every set of m lost hosts, by the placement that the keepers use."""
  code, rng = parity.Code(n, m), np.random.default_rng(n)
  data = rng.integers(0, 256, (n, code.k, 33), np.uint8)  # host, segment
  held = {}
  for stripe in range(n):
    assert sorted(code.members(stripe) + code.holders(stripe)) == list(range(n))
    for row, holder in enumerate(code.holders(stripe)):
      assert code.rows(holder)[row] == (stripe, row)
      total = np.zeros(33, np.uint8)
      for host in code.members(stripe):
        parity.accumulate(total, code.coefficient(row, stripe, host), data[host][code.stripes(host).index(stripe)])
      held[stripe, row] = total
  for lost in itertools.combinations(range(n), m):
    for victim in lost:
      for segment, stripe in enumerate(code.stripes(victim)):
        blocks = [("data", h, data[h][code.stripes(h).index(stripe)]) for h in code.members(stripe) if h not in lost]
        blocks += [("parity", r, held[stripe, r]) for r, h in enumerate(code.holders(stripe)) if h not in lost]
        found = decoding.decoded(code, stripe, victim, blocks[: code.k])
        np.testing.assert_array_equal(found, data[victim][segment])


def test_one_more_loss_raises():
  with pytest.raises(ValueError, match="needs 3 blocks and has 2"):
    parity.Code(4, 1).recovery(0, 1, [("data", 2), ("parity", 0)])


def test_the_fold_of_a_sum_is_the_sum_of_folds():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, (2, 8192), np.uint8)
  total, folds = a.copy(), parity.fold(a)
  parity.accumulate(total, 29, b)
  parity.accumulate(folds, 29, parity.fold(b))
  np.testing.assert_array_equal(parity.fold(total), folds)
  total[77] ^= 4
  assert (parity.fold(total) != folds).any()


def test_groups_span_slices_and_refuse_what_cannot_be():
  assert leader_lib.groups(16, 8, 1) == [list(range(0, 16, 2)), list(range(1, 16, 2))]
  assert leader_lib.groups(10, 4, 1) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
  assert leader_lib.groups(1, 8, 1) == [[0]]
  with pytest.raises(ValueError, match="a group of 2, which cannot have 2"):
    leader_lib.groups(4, 2, 2)


# --------------------------------------------------------------------------------------------------------------- wire


class Echo:
  def __init__(self, admit=lambda hello: None):
    self.logs = []
    self.listener = wire.Listener("127.0.0.1", 0, TOKEN, self.serve, admit, log=self.logs.append)
    self.address = self.listener.address

  def serve(self, link, hello):
    while True:
      message, payload = link.receive()
      link.send({"was": message}, payload)


def test_a_message_and_its_bytes_arrive():
  link = wire.connect(Echo().address, TOKEN, {"host": 1})
  answer, payload = link.ask({"x": [1, "y"]}, np.arange(70000, dtype=np.uint8))
  assert answer == {"was": {"x": [1, "y"]}}
  np.testing.assert_array_equal(payload, np.arange(70000, dtype=np.uint8))


def test_without_the_token_nothing_is_served():
  echo = Echo(lambda hello: "generation 3 is over" if hello.get("generation") == 3 else None)
  with pytest.raises(WireError, match="does not have this job's token"):
    wire.connect(echo.address, b"x" * 32, {"host": 1})
  with pytest.raises(WireError, match="generation 3 is over"):
    wire.connect(echo.address, TOKEN, {"host": 1, "generation": 3})
  raw = socket.create_connection(echo.address)
  raw.sendall(struct.pack("<4sIIQ", b"MOE1", 10, 0xFFFFFFFF, 0))  # 4 GiB announced
  raw.settimeout(5)
  assert raw.recv(1) == b""  # closed, nothing allocated
  wire.connect(echo.address, TOKEN, {"host": 1}).ask({"still": "there"})
  deadline = time.monotonic() + 5
  while not any("none of ours" in line for line in echo.logs):
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_recorded_handshake_is_of_no_use():
  """The server's nonce is new each time, so the proof of another conversation does not hold."""
  echo, recorded = Echo(), []

  class Recording(wire.Link):
    def send(self, message, payload=b""):
      recorded.append(message)
      super().send(message, payload)

  original, wire.Link = wire.Link, Recording
  try:
    wire.connect(echo.address, TOKEN, {"host": 1})
  finally:
    wire.Link = original
  time.sleep(0.1)
  mine = [m for m in recorded if "hello" in m or ("proof" in m and "nonce" not in m)]
  assert len(mine) == 2
  thief = wire.Link(socket.create_connection(echo.address), 5)
  thief.send(mine[0])
  thief.receive()
  thief.send(mine[1])
  with pytest.raises(WireError):
    thief.receive()


def test_a_flood_of_strangers_leaves_the_job_alone():
  echo = Echo()
  strangers, before = [], threading.active_count()
  for _ in range(200):
    with_timeout = socket.create_connection(echo.address, 5)
    strangers.append(with_timeout)
  assert threading.active_count() <= before + wire._MAX_PENDING + 2
  for sock in strangers:
    sock.close()
  deadline = time.monotonic() + 10
  while True:
    try:
      assert wire.connect(echo.address, TOKEN, {"host": 1}).ask({"a": 1})[0] == {"was": {"a": 1}}
      break
    except WireError:  # while the flood lasts
      assert time.monotonic() < deadline


def test_every_flipped_bit_on_the_wire_is_noticed():
  sent, rng = [], np.random.default_rng(0)

  class Recorder:
    family = socket.AF_UNIX

    def settimeout(self, _):
      pass

    def sendall(self, data):
      sent.append(bytes(data))

  wire.Link(Recorder()).send({"do": "chunk", "chunk": 3}, rng.integers(0, 256, 500, np.uint8))
  whole = bytearray(b"".join(sent))
  for place in rng.permutation(len(whole) * 8)[:200]:
    a, b = socket.socketpair()
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    a.sendall(damaged)
    a.close()
    with pytest.raises(WireError):
      wire.Link(b, 5).receive()
    b.close()
  a, b = socket.socketpair()
  a.sendall(whole)
  assert wire.Link(b, 5).receive()[0] == {"do": "chunk", "chunk": 3}


def test_the_token_file(tmp_path):
  path = tmp_path / "token"
  path.write_text("short")
  path.chmod(0o600)
  with pytest.raises(WireError, match="5 bytes; at least 32"):
    wire.read_token(str(path))
  path.write_text("x" * 40)
  path.chmod(0o644)
  with pytest.raises(WireError, match="chmod 600"):
    wire.read_token(str(path))
  with pytest.raises(WireError, match="No such file"):
    wire.read_token(str(tmp_path / "none"))


# ------------------------------------------------------------------------------------------------------------- keepers


class Host(local_keeper.Host):
  def write(self, step, data):
    """As a trainer does; False when the keeper is busy."""
    copied = self.copied(step, data)
    if copied:
      self.ready(step)
    return copied

  def copy(self, step):
    return next(c for c in self.keeper.copies if c.step == step)


class Cluster:
  def __init__(self, folder, n, m, size=20000, seed=0):
    self.folder, self.n, self.m, self.generation = folder, n, m, 1
    rng = np.random.default_rng(seed)
    self.sizes = [size + 700 * h for h in range(n)]  # ragged
    self.data = {step: [rng.integers(0, 256, s, np.uint8) for s in self.sizes] for step in range(1, 12)}
    self.hosts = [Host(h, folder) for h in range(n)]
    self.configure()
    for host in self.hosts:
      host.attach(self.generation, self.sizes)

  def configure(self):
    return local_keeper.configure(self.hosts, self.m, self.generation)

  def snapshot(self, step, commit=True, hosts=None):
    """Messages of the hosts: prepared or skipped."""
    for host in hosts or self.hosts:
      assert host.write(step, self.data[step][host.number])
    said, waiting = {}, list(hosts or self.hosts)
    while waiting:
      host = waiting.pop(0)
      given_up = any("skipped" in m for m in said.values())
      try:
        message = host.hear("prepared", "skipped", seconds=0.2)
      except queue.Empty:
        message = {"skipped": step, "reason": "given up"} if given_up else {}
      if step not in message.values():
        waiting.append(host)
        continue
      said[host.number] = message
      if "skipped" in message and not given_up:  # as the leader does then
        self.tell({"do": "abandon", "step": step})
    said = list(said.values())
    if commit and all("prepared" in s for s in said):
      self.tell({"do": "commit", "step": step})
      deadline = time.monotonic() + 10
      while any(h.keeper.committed != step for h in self.hosts) and time.monotonic() < deadline:
        time.sleep(0.002)
    return said

  def wait_for_the_end_of(self, step):
    """Until all hosts know that a step was given up."""
    deadline = time.monotonic() + 10
    while any(step not in host.keeper.abandoned for host in self.hosts):
      assert time.monotonic() < deadline, [host.keeper.abandoned for host in self.hosts]
      time.sleep(0.005)

  def tell(self, message):
    for host in self.hosts:
      host.control.send(message)

  def lose(self, *numbers):
    for number in numbers:
      self.hosts[number].close()
      self.hosts[number] = Host(number, self.folder)

  def recover(self, step):
    """A new generation on which all prove the step; their answers."""
    self.generation += 1
    self.inventories = self.configure()
    self.tell({"do": "verify", "step": step})
    return [host.hear("verified", "unverified") for host in self.hosts]

  def is_whole(self, step):
    return all((host.copy(step).data.bytes[: len(self.data[step][i])] == self.data[step][i]).all()
               for i, host in enumerate(self.hosts))

  def close(self):
    for host in self.hosts:
      host.close()


@pytest.fixture
def cluster():
  made, folder = [], pathlib.Path(wire.socket_folder())

  def make(n, m, **options):
    made.append(Cluster(folder, n, m, **options))
    return made[-1]

  yield make
  for one in made:
    one.close()
  shutil.rmtree(folder)


@pytest.mark.parametrize("n, m, lost", [(2, 1, (0,)), (4, 1, (2,)), (4, 2, (0, 3)), (5, 2, (1, 2)), (3, 2, (0, 1))])
def test_lost_hosts_are_decoded(cluster, n, m, lost):
  c = cluster(n, m)
  for step in (1, 2, 3):
    assert all("prepared" in said for said in c.snapshot(step))
  c.lose(*lost)
  answers = c.recover(3)
  assert leader_lib.candidates(dict(enumerate(c.inventories)), [list(range(n))], m) == [3]
  assert all(a.get("verified") == 3 for a in answers), answers
  assert [a["repaired"] > 0 for a in answers] == [h in lost for h in range(n)]
  assert c.is_whole(3)
  for host in lost:
    assert json.loads(c.hosts[host].copy(3).header) == {"step": 3, "host": host}


def test_one_host_too_many_is_refused(cluster):
  c = cluster(4, 1)
  c.snapshot(1)
  c.lose(1, 2)
  answers = c.recover(1)
  assert leader_lib.candidates(dict(enumerate(c.inventories)), [[0, 1, 2, 3]], 1) == []
  assert "unverified" in answers[1] and "blocks of stripe" in answers[1]["reason"]


@pytest.mark.parametrize("n, m", [(3, 1), (4, 2)])
def test_a_decoded_host_holds_parity_again(cluster, n, m):
  """So another host may be lost before the next snapshot; without it not."""
  for protected in (True, False):
    c = cluster(n, m)
    c.snapshot(1)
    c.lose(*range(m))
    assert all("verified" in a for a in c.recover(1))
    for host in c.hosts[: m if protected else 0]:
      host.control.send({"do": "protect", "step": 1})
    assert all(host.hear("protected", "log", "error").get("protected") == 1 for host in c.hosts[: m if protected else 0])
    c.lose(*range(m, 2 * m))
    answers = c.recover(1)
    assert all("verified" in a for a in answers) == protected, answers
    if protected:
      assert c.is_whole(1)
      assert c.hosts[m].copy(1).header == json.dumps({"step": 1, "host": m})


def test_one_host_alone(cluster):
  c = cluster(1, 0)
  c.snapshot(1)
  c.snapshot(2)
  assert c.recover(2) == [{"generation": 2, "verified": 2, "repaired": 0, "chunks": 1, "seconds": pytest.approx(0, abs=5)}]
  assert c.is_whole(2)


def test_the_committed_copy_is_never_written_to(cluster):
  """While a step is not committed the next one is refused, and the copy before it stays whole."""
  c = cluster(3, 1)
  c.snapshot(1)
  c.snapshot(2, commit=False)
  assert not c.hosts[0].write(3, c.data[3][0])  # 1 is committed, 2 may be any moment
  assert c.hosts[0].hear("skipped")["skipped"] == 3
  assert c.is_whole(1) and c.is_whole(2)
  assert leader_lib.candidates(dict(enumerate(c.configure())), [[0, 1, 2]], 1) == [2, 1]


def test_a_kill_between_prepare_and_commit_in_all_orders(cluster, tmp_path):
  """Whoever heard of the commit, all choose the same step."""
  for heard in itertools.product([False, True], repeat=3):
    c = cluster(3, 1)
    c.snapshot(1)
    c.snapshot(2, commit=False)
    for host, knows in zip(c.hosts, heard):
      if knows:
        host.control.send({"do": "commit", "step": 2})
    answers = c.recover(2)
    assert leader_lib.candidates(dict(enumerate(c.inventories)), [[0, 1, 2]], 1)[0] == 2
    assert all("verified" in a for a in answers) and c.is_whole(2)


def test_a_host_that_did_not_prepare_is_as_lost(cluster):
  """Two of three are prepared for 2: within the parity's reach, but its own parity part is not there: 1 it is."""
  c = cluster(3, 1)
  c.snapshot(1)
  for host in c.hosts[:2]:
    assert host.write(2, c.data[2][host.number])
  time.sleep(0.3)
  c.generation += 1
  inventories = c.configure()
  assert leader_lib.candidates(dict(enumerate(inventories)), [[0, 1, 2]], 1) == [1]


@pytest.mark.parametrize("where", ["data", "parity", "table", "header"])
def test_flipped_bits_are_found_and_mended(cluster, where):
  """30 each at random places; the parity's when it is used, the others before anything is restored."""
  rng = np.random.default_rng(len(where))
  c = cluster(4, 1)
  c.snapshot(1)
  for _ in range(30):
    host = c.hosts[rng.integers(4)]
    copy = host.copy(1)
    if where == "header":
      place = rng.integers(len(copy.header))
      copy.header = copy.header[:place] + chr(ord(copy.header[place]) ^ 1 << rng.integers(7)) + copy.header[place + 1 :]
    else:
      target = {"data": copy.data.bytes[: copy.shape.data_bytes], "parity": copy.parity.bytes[: copy.shape.parity_bytes],
                "table": copy.table.view(np.uint8)}[where]
      if where == "table":
        copy.table = copy.table.copy()
        target = copy.table.view(np.uint8)
      target[rng.integers(len(target))] ^= 1 << rng.integers(8)
    if where == "parity":  # a loss that needs it is refused there, not decoded wrongly
      victim = next(h for h in c.hosts if h is not host)
      stripe, row = c.hosts[0].keeper.code.rows(host.number)[0]
      with pytest.raises(WireError, match="damaged"):
        victim.keeper._ask(host.number, {"do": "get", "step": 1, "kind": "parity", "stripe": stripe, "row": row, "chunk": 0})
        victim.keeper._ask(host.number, {"do": "get", "step": 1, "kind": "parity", "stripe": stripe, "row": row, "chunk": 1})
      return_to = c.recover(1)
      assert all("verified" in a for a in return_to)
      c.close()
      c = cluster(4, 1)
      c.snapshot(1)
      continue
    answers = c.recover(1)
    assert all("verified" in a for a in answers), answers
    assert sum(a["repaired"] for a in answers) == (1 if where == "data" else 0)
    assert c.is_whole(1)
    assert json.loads(host.copy(1).header) == {"step": 1, "host": host.number}


def test_flips_beyond_the_parity_are_refused(cluster):
  """The negative control: two damaged blocks of one stripe and m = 1."""
  c = cluster(3, 1)
  c.snapshot(1)
  a, b = c.hosts[0].copy(1), c.hosts[1].copy(1)
  code = c.hosts[0].keeper.code
  stripe = next(s for s in code.stripes(0) if s in code.stripes(1))
  a.chunk(code.stripes(0).index(stripe), 0)[5] ^= 1
  b.chunk(code.stripes(1).index(stripe), 0)[9] ^= 1
  answers = c.recover(1)
  assert sum("unverified" in x for x in answers) >= 1


def test_a_holder_that_writes_wrong_parity_is_caught(cluster, monkeypatch):
  """What is acknowledged is not what is stored: a wrong byte in every write, and one in a single chunk."""
  c = cluster(4, 1, size=200000)
  c.snapshot(1)
  real, count = parity.accumulate, itertools.count()

  def corrupt(out, coefficient, data, how=None):
    real(out, coefficient, data, how)
    if len(out) > 64 and next(count) == 7:
      out[1234] ^= 1

  monkeypatch.setattr(parity, "accumulate", corrupt)
  said = c.snapshot(2)
  assert any("skipped" in s and "is wrong" in s["reason"] for s in said), said
  monkeypatch.setattr(parity, "accumulate", real)
  assert all(1 in inventory["steps"] and inventory["committed"] == 1 for inventory in c.configure())
  c.tell({"do": "abandon", "step": 2})
  time.sleep(0.1)
  assert all("prepared" in s for s in c.snapshot(3))


def test_without_the_fold_the_decoded_share_alone_would_miss_it(cluster, monkeypatch):
  """The control of the test above: with folds that agree with anything only a random chunk is looked at."""
  c = cluster(4, 1, size=200000)
  real, folds = parity.accumulate, parity.fold
  count = itertools.count()

  def corrupt(out, coefficient, data, how=None):
    real(out, coefficient, data, how)
    if len(out) > 64 and next(count) == 7:
      out[1234] ^= 1

  monkeypatch.setattr(parity, "accumulate", corrupt)
  monkeypatch.setattr(parity, "fold", lambda data: np.zeros(64, np.uint8))
  monkeypatch.setattr(decoding.Members, "check", lambda *_: None)
  assert all("prepared" in s for s in c.snapshot(1))
  monkeypatch.setattr(parity, "fold", folds)


def test_the_decoded_share_catches_it_alone(cluster, monkeypatch):
  c = cluster(3, 1)
  real, check = parity.accumulate, decoding.Members.check

  def corrupt(out, coefficient, data, how=None):
    real(out, coefficient, data, how)
    out[10] ^= len(out) > 64 and data[20]  # in every chunk

  def honest(*arguments):
    monkeypatch.setattr(parity, "accumulate", real)
    check(*arguments)

  monkeypatch.setattr(parity, "accumulate", corrupt)
  monkeypatch.setattr(parity, "fold", lambda data: np.zeros(64, np.uint8))
  monkeypatch.setattr(decoding.Members, "check", honest)
  said = c.snapshot(1)
  assert any("does not decode" in s.get("reason", "") for s in said), said


def test_an_old_generation_is_refused(cluster):
  c = cluster(2, 1)
  c.snapshot(1)
  old = wire.connect(c.hosts[0].keeper.listener.address, TOKEN, {"role": "keeper", "host": 1, "generation": 1})
  trainer = c.hosts[0].trainer
  c.recover(1)
  old.send({"do": "get", "step": 1, "kind": "data", "segment": 0, "chunk": 0})
  with pytest.raises(WireError):
    old.receive()
  with pytest.raises(WireError, match="generation 1 is not 2"):
    wire.connect(c.hosts[0].keeper.listener.address, TOKEN, {"role": "keeper", "host": 1, "generation": 1})
  with pytest.raises(WireError):  # the old trainer's link is closed
    trainer.send({"do": "begin", "step": 5, "generation": 1})
    trainer.receive()


def test_a_step_that_somebody_skips_is_given_up_by_all(cluster):
  c = cluster(3, 1)
  c.snapshot(1)
  for host in c.hosts[:2]:
    host.write(2, c.data[2][host.number])
  c.tell({"do": "abandon", "step": 2})
  c.wait_for_the_end_of(2)
  assert all("prepared" in s for s in c.snapshot(3))
  assert c.recover(3)[0].get("verified") == 3 and c.is_whole(3)


def test_a_peer_that_says_nothing_costs_a_snapshot_and_no_more(cluster):
  """Half-open: the address accepts connections and is silent. The step is given up in seconds, and the one before it stays."""
  c = cluster(2, 1)
  c.snapshot(1)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    c.hosts[0].keeper.peers[1] = silent.getsockname()
    begin = time.monotonic()
    said = c.snapshot(2)
    assert "timed out" in next(s["reason"] for s in said if s.get("reason") != "given up")
    assert time.monotonic() - begin < 2 * wire._HANDSHAKE_SECONDS + 5
  assert all(1 in inventory["steps"] for inventory in c.configure())
  c.wait_for_the_end_of(2)
  assert all("prepared" in s for s in c.snapshot(3))


def test_a_link_that_breaks_in_the_middle_is_the_same(cluster, monkeypatch):
  c = cluster(3, 1)
  c.snapshot(1)
  real, count = wire.Link.send, itertools.count()

  def send(self, message, payload=b""):
    if message.get("do") == "chunk" and next(count) == 2:
      self.close()
    real(self, message, payload)

  monkeypatch.setattr(wire.Link, "send", send)
  assert any("skipped" in s for s in c.snapshot(2))
  c.wait_for_the_end_of(2)
  assert all("prepared" in s for s in c.snapshot(3))
  assert c.recover(3)[0].get("verified") == 3 and c.is_whole(3)


def test_bytes_of_another_host_for_the_trainer(cluster):
  c = cluster(3, 1)
  c.snapshot(1)
  c.recover(1)
  host = c.hosts[0]
  host.attach(c.generation, c.sizes)
  host.ask({"do": "read", "host": 2, "step": 1, "offset": 100, "length": 900})
  np.testing.assert_array_equal(host.payload, c.data[1][2][100:1000])
  assert "refused" in host.ask({"do": "read", "host": 2, "step": 1, "offset": 100, "length": 1 << 30})
  assert "refused" in host.ask({"do": "read", "host": 2, "step": 1, "offset": -100, "length": 50})
  assert "refused" in host.ask({"do": "read", "host": 2, "step": 7, "offset": 0, "length": 50})


def test_one_slot_has_the_weaker_promise(cluster):
  c = cluster(2, 1)
  for host in c.hosts:
    host.attach(c.generation, c.sizes, slots=1)
  c.snapshot(1)
  assert c.recover(1)[0].get("verified") == 1
  for host in c.hosts:
    host.attach(c.generation, c.sizes, slots=1)
  answer = c.hosts[0].ask({"do": "begin", "step": 2})
  assert answer["slot"] == 0
  c.generation += 1
  assert leader_lib.candidates(dict(enumerate(c.configure())), [[0, 1]], 1) == [1]  # of the other host and parity: decoded
  assert c.hosts[0].keeper.inventory()["steps"] == []


def test_memory_is_flat_over_many_snapshots(cluster):
  c = cluster(3, 1, size=400000)
  c.data = {step: c.data[1] for step in range(1, 200)}
  c.snapshot(1)

  def resident():
    return int(open("/proc/self/statm").read().split()[1]) * memory.PAGE

  for step in range(2, 20):
    c.snapshot(step)
  before = resident()
  for step in range(20, 120):
    c.snapshot(step)
  assert resident() - before < 8 << 20  # one copy is 1.2 MB; 100 that stayed would be 120


def test_memory_that_is_given_up_is_free(cluster):
  """No thread that waits for its next message keeps a copy mapped."""
  def mapped():
    return sum("memfd:moe-" in line for line in pathlib.Path("/proc/self/maps").read_text().splitlines())

  before = mapped()
  c = cluster(3, 1)
  c.snapshot(1)
  assert mapped() > before
  for host in c.hosts:
    host.slots = []
    host.keeper._forget()
  deadline = time.monotonic() + 5
  while mapped() > before:
    assert time.monotonic() < deadline, mapped() - before
    time.sleep(0.01)


def test_the_memory_outlives_its_writer():
  """A writer killed with SIGKILL leaves the region as it was; its size is sealed."""
  region = memory.Region("test", 10000)
  code = ("import numpy as np, os, signal; from moe.snapshot import memory; m = memory.mapped(int(__import__('sys').argv[1])); "
          "m[:] = 7; os.kill(os.getpid(), signal.SIGKILL)")
  subprocess.run([sys.executable, "-c", code, str(region.fd)], pass_fds=[region.fd], cwd=wire.__file__.rpartition("/moe/")[0])
  assert (region.bytes == 7).all() and len(region.bytes) == 12288
  with pytest.raises(OSError):
    os.ftruncate(region.fd, 100)


@pytest.mark.parametrize("flags, message", [
    (["--multihost=auto"], "written out"), (["--multihost=127.0.0.1:1,2,0"], "needs --run_dir"),
    (["--multihost=127.0.0.1:1,2,0", "--run_dir=/tmp/x"], "needs --token_file"),
    (["--tls=a,b"], "is not CERTIFICATE,KEY,AUTHORITY"), (["--gin.Snapshot.parity_hosts=3"], "at most 2"),
    (["--token_file=/nowhere"], "No such file"), (["--gin.Nonsense.x=1"], "Nonsense")])
def test_a_users_mistake_is_one_line(flags, message, capsys, tmp_path):
  assert supervisor.main(["--supervise", f"--run_dir={tmp_path}", *flags] if "--multihost=127.0.0.1:1,2,0" not in flags
                         else ["--supervise", *flags]) == 2
  said = capsys.readouterr().err
  assert message in said and said.count("\n") == 1


def test_a_state_that_does_not_fit_is_refused_with_the_sum():
  limits = config.Snapshot()
  lines = client.budget([1_000_000], limits)
  assert "2 x (1.0 MB of state" in lines[0] and "falls back to the checkpoints" in lines[-1]
  with pytest.raises(config.ConfigError, match=r"2 x \(900,000.0 GB of state .* set Snapshot.slots = 1"):
    client.budget([int(9e14)], limits)
  assert any("one slot" in line for line in client.budget([1000], config.Snapshot(slots=1)))


def test_the_layout_stores_each_shard_once():
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
  def leaf(shape, *spec):
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

  tree = {"split": leaf((8, 6), "a", "b"), "copied": leaf((5,)), "half": leaf((4, 3), "b"), "empty": leaf((0, 2))}
  found = client.layout(tree, 1)
  assert sum(p.size for p in found.pieces) == 4 * (48 + 5 + 12)
  assert [len([p for p in found.pieces if p.name == name]) for name in ("split", "copied", "half", "empty")] == [8, 1, 2, 1]
  ends = [p.offset + p.size for p in found.pieces]
  assert all(p.offset % 64 == 0 for p in found.pieces) and max(ends) <= found.sizes[0]
  assert found.digest != client.layout(tree, 1, "another model").digest


def test_a_long_temporary_folder_is_no_problem(tmp_path, monkeypatch):
  long = tmp_path / ("x" * 100)
  long.mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(long))
  folder = wire.socket_folder()
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(f"{folder}/keeper")
  shutil.rmtree(folder)


def test_too_much_memory_is_an_error_and_not_a_crash():
  with pytest.raises(memory.MemoryRefused, match="GB for test"):
    memory.Region("test", 1 << 50)
