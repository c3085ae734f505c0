"""Writes a model for Hugging Face: `python -m tools.export_hf RUN_DIR --out=HF_DIR [--dtype=bfloat16] [--check]`

The family follows from the model's options (Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 or -V3); a model with an option
that no family has is refused by the option's name. Tensors are read and written one shard at a time.
"""

from __future__ import annotations

import argparse
import json

from etils import epath

from moe import config
from moe import hugging_face
from moe import stored
from moe.errors import UserError
from tools import terminal


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.export_hf", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("path", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--out", required=True, metavar="HF_DIR")
  parser.add_argument("--family", choices=tuple(hugging_face.FAMILIES), help="default: the first that has all options")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the tensors (default: as they are)")
  parser.add_argument("--shard_gb", type=float, default=1.0, help="largest file; about three times as much memory is used")
  parser.add_argument("--max_positions", type=int, help="max_position_embeddings (default: Data.sequence_tokens of the run)")
  parser.add_argument("--check", action="store_true", help="read back, compare every tensor, and the logits with transformers")
  arguments = parser.parse_args(argv)
  found = stored.find(arguments.path)
  if not found.config or "model" not in found.config:
    raise UserError(f"{found.folder} has no config of ours beside it, so what its arrays mean is not known")
  run = config.from_dict(config.Run, found.config)
  family = hugging_face.FAMILIES[arguments.family] if arguments.family else hugging_face.suited(run.model)
  arrays = hugging_face.AsTheirs(found.source, run.model, family, arguments.dtype)
  dtype = arguments.dtype or arrays.leaves["model.embed_tokens.weight"].dtype
  eos = _eos(run.data.tokenizer)
  settings = hugging_face.write_config(run.model, family, max_positions=arguments.max_positions or run.data.sequence_tokens,
                                       eos=eos, dtype=dtype)
  out = epath.Path(arguments.out)
  if out.exists() and any(out.iterdir()):
    raise UserError(f"--out={out} is not empty; nothing is overwritten, choose another directory")
  part = out.parent / f"{out.name}.writing"  # so that a half-written model is not taken for one
  if part.exists():
    part.rmtree()
  part.mkdir(parents=True)
  files = stored.write_shards(arrays, part, int(arguments.shard_gb * 1e9))
  (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
  (part / "generation_config.json").write_text(json.dumps({"bos_token_id": eos, "eos_token_id": eos}, indent=2) + "\n")
  _write_tokenizer(run.data.tokenizer, part)
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


def _eos(tokenizer: str) -> int | None:
  from moe.data import tokenizers

  return tokenizers.load(tokenizer).eos


def _write_tokenizer(tokenizer: str, folder: epath.Path) -> None:
  if tokenizer == "byte":  # ByT5's layout without its extra ids
    told = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
  else:
    (folder / "tokenizer.json").write_bytes(epath.Path(tokenizer).read_bytes())
    from moe.data import tokenizers

    loaded = tokenizers.load(tokenizer)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": loaded.token(loaded.eos)}
  (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
  terminal.run(main)
