"""Writes a model for Hugging Face: `python -m tools.export_hf RUN_DIR --out=HF_DIR [--dtype=bfloat16] [--check]`

The family follows from the model's options (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or -V3); a model with an option
that no family has is refused by the option's name. Tensors are read and written one shard at a time.

The files beside the tensors (tokenizer, chat template, settings of generation, what config.json says besides the model) come
from `hf/` of the run, or from the folder of its tokenizer.json, where tools.import_hf put them; or from --hf_from. A tokenizer
of bytes becomes a tokenizer.json, and one without such files gets them.
"""

from __future__ import annotations

import argparse
import json

from etils import epath

from moe import config
from moe import hugging_face
from moe import hugging_face_files
from moe import stored
from moe.data import tokenizers
from moe.errors import UserError
from tools import conversion
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.export_hf", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--out", required=True, metavar="HF_DIR")
  parser.add_argument("--family", choices=tuple(hugging_face.FAMILIES), help="default: the first that has all options")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: as they are)")
  parser.add_argument("--shard_gb", type=float, default=1.0, help="largest file; about three times as much memory is used")
  parser.add_argument("--max_positions", type=int, help="max_position_embeddings (default: Data.sequence_tokens of the run, or "
                      "what an imported model had where that is more)")
  parser.add_argument("--hf_from", metavar="HF_DIR", help="take the files beside the tensors from there")
  parser.add_argument("--check", action="store_true", help="read back, compare every tensor, and the logits with transformers")
  arguments = parser.parse_args(argv)
  found = stored.find(arguments.path)
  if not found.config or "model" not in found.config:
    raise UserError(f"{found.folder} has no config of ours beside it, so what its arrays mean is not known")
  run = config.from_dict(config.Run, found.config)
  folder = hugging_face_files.run_folder(arguments.path)
  kept = hugging_face_files.of(run, folder, arguments.hf_from)
  if kept.note:
    print(f"note: {kept.note}")
  family = _family(run.model, kept, arguments.family)
  arrays = hugging_face.AsTheirs(found.source, run.model, family, arguments.dtype)
  dtype = arguments.dtype or arrays.leaves["model.embed_tokens.weight"].dtype
  tokenizer = tokenizers.load(hugging_face_files.tokenizer_of(run, folder), run.data.bos)
  settings = _settings(run, kept, family, tokenizer, arguments.max_positions, dtype)
  out = epath.Path(arguments.out)
  if out.exists() and any(out.iterdir()):
    raise UserError(f"--out={out} is not empty; nothing is overwritten, choose another directory")
  part = out.parent / f"{out.name}.writing"  # so that a half-written model is not taken for one
  if part.exists():
    part.rmtree()
  part.mkdir(parents=True)
  with terminal.progress("written", sum(leaf.bytes for leaf in arrays.leaves.values()), "B") as work:
    files = stored.write_shards(conversion.Watched(arrays, work.advance), part, int(arguments.shard_gb * 1e9))
  (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
  hugging_face_files.write_beside(run, kept, tokenizer, part)
  if out.exists():
    out.rmdir()
  part.rename(out)
  print(f"{out}: {family.architecture}, {terminal.count(sum(leaf.size for leaf in arrays.leaves.values()))} parameters in "
        f"{len(arrays.leaves)} tensors, {files} file{'s' if files > 1 else ''}, {dtype}")
  if not arguments.check:
    return terminal.FINE
  from tools import hf_logits

  written = stored.find(out).source  # rounded, perhaps: its logits are compared, not those of the run
  return hf_logits.check(arrays, written, out, hugging_face.AsOurs(written, run.model, family), run.model)


def _family(model: config.Model, kept: hugging_face_files.Kept, wanted: str | None) -> hugging_face.Family:
  """The one asked for, else the one that the model came from where it still has all options, else the first that has."""
  if wanted:
    return hugging_face.FAMILIES[wanted]
  return hugging_face.family_of(kept.config) if kept.same else hugging_face.suited(model)


def _settings(run: config.Run, kept: hugging_face_files.Kept, family: hugging_face.Family, tokenizer, positions: int | None,
              dtype: str) -> dict:
  """config.json: the one that an import had where it still describes the model, else written from the model."""
  before = kept.config.get("max_position_embeddings") if kept.descended else None
  positions = positions or max(run.data.sequence_tokens, before or 0)
  if not kept.same or kept.config["model_type"] != family.model_type:
    return hugging_face.write_config(run.model, family, max_positions=positions, dtype=dtype, **_named(kept.ids(tokenizer)))
  settings = {key: value for key, value in kept.config.items() if key not in ("auto_map", "_name_or_path")}
  settings["architectures"] = [family.architecture]
  settings["max_position_embeddings"] = positions
  for key in ("torch_dtype", "dtype"):  # of transformers 4 and 5
    settings[key] = dtype
  if "num_nextn_predict_layers" in settings:
    settings["num_nextn_predict_layers"] = 0  # its tensors are left out by the import
  return settings


def _named(ids: dict) -> dict:
  """bos_token_id= ... as write_config names them."""
  return {name.removesuffix("_token_id"): value for name, value in ids.items()}


if __name__ == "__main__":
  terminal.run(main)
