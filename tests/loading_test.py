"""What a host loads follows from the batch's sharding: on any mesh every device has the rows and columns of one process."""

import json
import math
import re
import socket
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from moe import config
from moe import gin_config
from moe import sharding
from moe.data import pipeline
from tests import loading_hosts
from tests import small


class Device(NamedTuple):
  id: int
  process_index: int


class OnHosts:
  """A sharding whose devices belong to other processes than they do, for what asks it about its devices only."""

  def __init__(self, real, process_of):
    self._real, self._process_of = real, process_of

  def devices_indices_map(self, shape):
    real = self._real.devices_indices_map(shape)
    return {Device(device.id, self._process_of(device)): index for device, index in real.items()}


# How eight devices belong to hosts: in a row, one in turn, in pairs that lie apart, each by itself.
HOSTS = {"row of 4": lambda d: d.id // 4, "row of 2": lambda d: d.id // 2, "in turn": lambda d: d.id % 2,
         "pairs apart": lambda d: d.id % 4, "each": lambda d: d.id}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return str(small.write_corpus(tmp_path_factory.mktemp("corpus") / "tiny"))


@pytest.mark.parametrize("hosts", HOSTS)
def test_every_device_finds_its_part_in_what_its_host_loads(hosts, corpus):
  """On every factorisation of eight devices: no host lacks a row or column, and none loads a row that no device of it has."""
  shape = (loading_hosts.BATCH, loading_hosts.LENGTH)
  whole = np.arange(np.prod(shape)).reshape(shape)
  for sizes in loading_hosts.meshes(8):
    real = sharding.batch_sharding(sharding.make_mesh(config.Mesh(**sizes)))
    shards = OnHosts(real, HOSTS[hosts])
    for process in {HOSTS[hosts](device) for device in jax.devices()}:
      part = sharding.host_part(shards, shape, process)
      local = whole[part.rows, part.columns]
      needed = np.zeros(shape, bool)
      for device, index in shards.devices_indices_map(shape).items():
        if device.process_index == process:
          np.testing.assert_array_equal(sharding.cut(local, part, index, shape), whole[index])
          needed[index] = True
      assert needed[part.rows].any(1).all() and not needed.any(1)[np.setdiff1d(np.arange(shape[0]), part.rows)].any()
      columns = np.flatnonzero(needed.any(0))
      assert (part.columns.start, part.columns.stop) == (columns[0], columns[-1] + 1)


def test_a_host_without_a_device_is_refused():
  rows = sharding.batch_sharding(sharding.make_mesh(config.Mesh(fsdp=2, tensor=2), jax.devices()[:4]))
  with pytest.raises(config.ConfigError, match="host 3 has no device in the mesh fsdp=2 x tensor=2 of 4 devices"):
    sharding.host_part(rows, (8, 16), 3)


@pytest.mark.parametrize("path", sorted((gin_config.CONFIGS / "run").glob("*.gin")), ids=lambda path: path.stem)
def test_every_run_config_loads_on_its_pod(path):
  """The first, a middle and the last host of the pod that the config names, four chips a host, as a run of rows for each host
  (tpu_compile_test has the real rows of every host): each gets a batch, and opens no more shards than it has rows."""
  run = gin_config.resolve([path]).run
  found = re.search(r"^# For (\w+):([\dx]+)(?:, (\d+) slices)?", path.read_text(), re.MULTILINE)
  hosts = max(math.prod(map(int, found[2].split("x"))) * int(found[3] or 1) // 4, 1) if found else 1
  each = run.data.batch_sequences // hosts
  assert each * hosts == run.data.batch_sequences
  for host in {0, hosts // 2, hosts - 1}:
    loader = pipeline.Loader(run.data, run.train.seed, range(host * each, (host + 1) * each))
    assert next(loader)[0].shape == (each, run.data.sequence_tokens)
    assert len(loader.state()["shards"]) == each
    loader.close()


def test_an_array_of_a_host_s_part():
  mesh = sharding.make_mesh(config.Mesh(fsdp=2, context=2, tensor=2))
  rows, x = sharding.batch_sharding(mesh), np.arange(8 * 16).reshape(8, 16)
  part = sharding.host_part(rows, x.shape)
  assert part.rows.tolist() == list(range(8)) and part.columns == slice(0, 16)
  array = sharding.global_array(x, part, rows, x.shape)
  assert array.shape == x.shape and array.sharding == rows
  np.testing.assert_array_equal(array, x)


def run_together(hosts: int, devices: int, corpus: str, out) -> list[dict]:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  commands = [[sys.executable, "-m", "tests.loading_hosts", str(port), str(hosts), str(i), str(devices), corpus, str(out)]
              for i in range(hosts)]
  processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
  texts = [process.communicate(timeout=800)[0] for process in processes]
  assert [process.returncode for process in processes] == [0] * hosts, "\n".join(text[-3000:] for text in texts)
  return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("hosts, devices", [(2, 1), (2, 2), (4, 1)])
def test_processes_load_and_score_what_one_does(hosts, devices, corpus, tmp_path):
  """Each axis and each pair of them, inside and across hosts: rows, tokens, losses and scores are those of one device. Loading
  by the process number, the negative control, gives other rows wherever a tensor or context axis crosses hosts."""
  run = loading_hosts.run_of(corpus, {})
  mesh = sharding.make_mesh(run.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    loss, tokens = loading_hosts.loss_of(run, mesh, loading_hosts.load(run, mesh))
    score = loading_hosts.score(run, mesh)
  results = run_together(hosts, devices, corpus, tmp_path / "results.json")
  assert len(results) >= 2 * 5
  wrong_before = [r for r in results if not r["old_rows"]]
  assert wrong_before and all({"tensor", "context"} & r["mesh"].keys() for r in results if not r["old_rows"] and not r["far"])
  for result in results:
    assert result["rows"], result
    if "loss" in result:
      assert result["tokens"] == tokens == run.tokens_per_step, result
      np.testing.assert_allclose(result["loss"], loss, rtol=1e-5, err_msg=str(result))  # as in mesh_test: reassociation
      for name, value in score.items():
        np.testing.assert_allclose(result["score"][name], value, rtol=1e-5, err_msg=str(result))
  assert sum("loss" in result for result in results) >= 4
