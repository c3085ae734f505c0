"""The flags of `python -m moe.train`, read by the trainer and by its supervisor; no JAX."""

from __future__ import annotations

import argparse

from moe import gin_config
from moe.config import ConfigError

SUPERVISED = "MOE_SUPERVISED"  # environment of a trainer that a supervisor started: JSON

_KNOBS = """
the main knobs (any field of moe/config.py can be set; --print_config shows all):
  --gin.Train.steps=600                 optimizer steps
  --gin.Data.batch_sequences=16         sequences of a step, --gin.Data.sequence_tokens=256 their length
  --gin.Train.micro_batches=1           gradient accumulation
  --gin.Optimizer.learning_rate=3e-3    peak; .schedule='"cosine"' or '"wsd"', .warmup_tokens, .decay_tokens
  --gin.Experts.num_experts=8           .d_expert, .d_shared, .capacity_factor (0: dropless)
  --gin.Router.top_k=2                  .gate='"softmax"' .balance_scope='"global"' .balance_coef .z_loss_coef .bias_update_rate
  --gin_file=configs/router/rmoe.gin    after the run's file: another router (docs/routing.md)
  --gin.Mesh.expert=4                   .data .fsdp .tensor; their product is the number of devices
  --gin.Checkpoint.every_steps=200      .keep_last .keep_every_steps
  --gin.Snapshot.every_steps=10         with --supervise: .group_hosts .parity_hosts (docs/faults.md)
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(the flags, what is left: the `--gin.X=v` bindings)."""
  parser = argparse.ArgumentParser(prog="python -m moe.train", epilog=_KNOBS, allow_abbrev=False,
                                   description="Trains a run: --gin_file=configs/run/x.gin --gin.Train.steps=100 --run_dir=...",
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  gin_config.add_arguments(parser)
  parser.add_argument("--run_dir", help="where the run is kept (default: runs/<date-time>)")
  parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto",
                      help="from the newest checkpoint of --run_dir: if there is one, never, or it must be there")
  parser.add_argument("--init_from", metavar="PATH", help="run or checkpoint to take the parameters from, nothing else")
  parser.add_argument("--profile_steps", metavar="A:B", help="trace steps A to B with jax.profiler into <run_dir>/profile")
  parser.add_argument("--multihost", nargs="?", const="auto", metavar="ADDRESS:PORT,HOSTS,INDEX",
                      help="join the other hosts; without a value JAX asks the cluster (TPU pods, Slurm, ...)")
  parser.add_argument("--supervise", action="store_true",
                      help="train under a supervisor, with snapshots in the hosts' memory (docs/faults.md)")
  parser.add_argument("--token_file", metavar="FILE", help="with --supervise on several hosts: the job's secret, mode 600")
  parser.add_argument("--tls", metavar="CERTIFICATE,KEY,AUTHORITY",
                      help="mutual TLS between the hosts of --multihost (jax >= 0.12)")
  parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
  parser.add_argument("--dry_run", action="store_true", help="check config, mesh and data, print the sizes, and stop")
  parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
  return parser.parse_known_args(argv)


def tls(text: str | None) -> list[str]:
  """Files of the certificate, its key and the authority of --tls; three times "" without it."""
  files = text.split(",") if text else ["", "", ""]
  if len(files) != 3:
    raise ConfigError(f"--tls={text} is not CERTIFICATE,KEY,AUTHORITY")
  return files


def hosts(text: str) -> tuple:
  """The arguments of jax.distributed.initialize: none for `auto`, else (address, hosts, index)."""
  if text == "auto":
    return ()
  parts = text.split(",")
  if len(parts) != 3 or not (parts[1].isdigit() and parts[2].isdigit() and int(parts[2]) < int(parts[1])):
    raise ConfigError(f"--multihost={text} is not ADDRESS:PORT,HOSTS,INDEX with INDEX < HOSTS, such as 10.0.0.1:8476,2,0")
  return parts[0], int(parts[1]), int(parts[2])
