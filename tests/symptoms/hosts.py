"""Two processes of one CPU device, Mesh.tensor = 2 and Mesh.context = 2, against one process: the first step's loss and tokens.

PYTHONPATH=CHECKOUT python tests/symptoms/hosts.py CHECKOUT
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

FLAGS = [
  "--gin.Train.steps=1",
  "--gin.Train.eval_batches=1",
  "--gin.Model.num_layers=2",
  "--gin.Model.d_model=64",
  "--allow_unused",
  "--gin.Attention.head_dim=16",
  "--gin.Experts.d_expert=64",
  "--gin.Data.sequence_tokens=128",
  "--gin.Data.domains=(@kjv/Domain(),)",
]


def first_step(checkout: str, processes: int, mesh: dict[str, int]) -> dict | None:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  with tempfile.TemporaryDirectory() as folder:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    started = []
    for index in range(processes):
      place = [f"--multihost=127.0.0.1:{port},{processes},{index}"] if processes > 1 else []
      sizes = [f"--gin.Mesh.{axis}={size}" for axis, size in {"data": 1, **mesh}.items()]
      command = [sys.executable, "-m", "moe.train", f"--run_dir={folder}/run", *FLAGS, *sizes, *place]
      started.append(
        subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
      )
    records = pathlib.Path(folder, "run", "metrics.jsonl")
    while not (records.exists() and '"kind": "train"' in records.read_text()) and any(p.poll() is None for p in started):
      try:
        started[0].wait(1)
      except subprocess.TimeoutExpired:
        continue
    for process in started:
      process.kill()
    if not records.exists():
      print(started[0].communicate()[1][-500:])
      return None
    return next((r for r in map(json.loads, records.read_text().splitlines()) if r["kind"] == "train"), None)


for processes, mesh in ((1, {}), (2, {"data": 2}), (2, {"tensor": 2}), (2, {"context": 2})):
  record = first_step(sys.argv[1], processes, mesh)
  text = f"loss {record['loss']:.4f}, {record['tokens']} tokens" if record else "nothing recorded"
  print(f"{processes} process(es), mesh {mesh or 'of one device'}: {text}", flush=True)
