"""The flags of `python -m moe.train`, read by the trainer and by its supervisor; no JAX."""

from __future__ import annotations

import argparse

from moe import config
from moe import gin_config
from moe.config import ConfigError

SUPERVISED = "MOE_SUPERVISED"  # environment of a trainer that a supervisor started: JSON

_KNOBS = {  # for --help, by what they change
    "length and batch": (
        "Train.steps", "Data.batch_sequences", "Data.sequence_tokens", "Train.micro_batches", "Train.seed"),
    "optimizer": (
        "Optimizer.learning_rate", "Optimizer.schedule", "Optimizer.warmup_tokens", "Optimizer.decay_tokens",
        "Optimizer.weight_decay"),
    "model": ("Model.num_layers", "Model.d_model", "Attention.num_heads", "Model.compute_dtype", "Model.remat"),
    "experts": (
        "Experts.num_experts", "Experts.d_expert", "Experts.d_shared", "Experts.capacity_factor"),
    "router": (
        "Router.gate", "Router.top_k", "Router.balance_scope", "Router.balance_coef", "Router.z_loss_coef",
        "Router.bias_update_rate"),
    "mesh (the product is the number of devices)": ("Mesh.data", "Mesh.fsdp", "Mesh.expert", "Mesh.context", "Mesh.tensor"),
    "evaluation, checkpoints, snapshots": (
        "Train.eval_every_steps", "Train.eval_batches", "Train.final_eval_batches", "Checkpoint.every_steps",
        "Checkpoint.keep_last", "Snapshot.every_steps"),
}
_ROLES = {"Attention": "model", "Experts": "model", "Router": "model"}  # where a Run has what is not its own field


def knobs() -> str:
  """The main fields with their values in the quickstart, which is what runs without --gin_file.

  Raises:
    ConfigError: the shipped quickstart is damaged.
  """
  run = gin_config.resolve([gin_config.QUICKSTART]).run
  lines = ["the main knobs, with the values of configs/run/quickstart.gin, the default of --gin_file:"]
  for title, names in _KNOBS.items():
    lines.append(f"  {title}")
    for name in names:
      owner, field = name.split(".")
      holder = getattr(run, _ROLES[owner]) if owner in _ROLES else run
      value = getattr(getattr(holder, owner.lower()), field)
      shown = f"'\"{value}\"'" if isinstance(value, str) else value
      meaning = config.meanings().get(name, "")
      lines.append(f"    {f'--gin.{name}={shown}':42s}" + (f"  {meaning}" if meaning else ""))
  lines += ["  another router (docs/routing.md), after the run's file", "    --gin_file=configs/router/rmoe.gin",
            "every field with type, default and meaning: python -m tools.config list; as resolved here: --print_config"]
  return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
  """Looks up the values of the knobs when --help asks for them."""

  def format_help(self) -> str:
    self.epilog = knobs()
    return super().format_help()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(the flags, what is left: the `--gin.X=v` bindings)."""
  parser = _Parser(prog="python -m moe.train", allow_abbrev=False,
                   description="Trains a run: --gin_file=configs/run/x.gin --gin.Train.steps=100 --run_dir=...",
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  gin_config.add_arguments(parser)
  parser.add_argument("--run_dir", help="where the run is kept (default: runs/<date-time>)")
  parser.add_argument("--resume", choices=("auto", "never", "must"), default="auto",
                      help="from the newest checkpoint of --run_dir: if there is one (default), never, or it must be there")
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
  parser.add_argument("--again", action="store_true", help="evaluate and report a run again that is finished")
  parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
  return parser.parse_known_args(argv)


def profile_window(text: str | None) -> tuple[int, int] | None:
  """The first and last step of --profile_steps; None without it."""
  if text is None:
    return None
  begin, _, end = text.partition(":")
  if not (begin.isdigit() and end.isdigit() and int(begin) < int(end)):
    raise ConfigError(f"--profile_steps={text} is not A:B with A < B, such as 10:13")
  return int(begin), int(end)


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
