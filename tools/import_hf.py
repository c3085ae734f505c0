"""Takes a Hugging Face model: `python -m tools.import_hf HF_DIR --out=RUN_DIR [--dtype=bfloat16] [--check]`

Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and -V3. RUN_DIR then holds a checkpoint of step 0 that every tool reads,
`model.gin` with the model's options, and `hf/` with the files beside the tensors as they were: tokenizer, chat template,
settings of generation. Training goes on from it with

    python -m moe.train --gin_file=configs/run/quickstart.gin --gin_file=RUN_DIR/model.gin --init_from=RUN_DIR
"""

from __future__ import annotations

import argparse
import dataclasses

from etils import epath

from moe import checkpoint
from moe import config
from moe import gin_config
from moe import hugging_face
from moe import hugging_face_files
from moe import stored
from moe.data import tokenizers
from moe.errors import UserError
from tools import conversion
from tools import terminal

_SEQUENCE = 4096  # tokens of a sequence in the config kept beside it, at most


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.import_hf", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("hf_dir", help="config.json and safetensors")
  parser.add_argument("--out", required=True, metavar="RUN_DIR")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the parameters (default: as they are)")
  parser.add_argument("--check", action="store_true", help="read back, compare every tensor, and the logits with transformers")
  arguments = parser.parse_args(argv)
  found = stored.find(arguments.hf_dir)
  if found.source.kind != "safetensors" or not isinstance(found.config, dict):
    raise UserError(f"{arguments.hf_dir} is no Hugging Face directory: it needs config.json and .safetensors")
  family, model = hugging_face.family_of(found.config), hugging_face.read_config(found.config)
  arrays = hugging_face.AsOurs(found.source, model, family, arguments.dtype)
  out = epath.Path(arguments.out)
  if stored.steps(out):
    raise UserError(f"--out={out} holds checkpoints already; choose another directory")
  beside = out / hugging_face_files.FOLDER
  if beside.exists():
    beside.rmtree()  # of an import that was cut off
  carried = hugging_face_files.carry(found.folder, beside)
  tokenizer = "byte"  # stays so where there is none; the vocabulary then decides whether bytes fit
  if "tokenizer.json" in carried:
    tokenizer = str(stored.absolute(beside) / "tokenizer.json")
    ids = tokenizers.load(tokenizer).vocab_size  # what is wrong with it is said before the tensors are copied
    if ids > model.vocab_size:
      print(f"note: the tokenizer has {ids} ids, the model {model.vocab_size}: texts with an id beyond them cannot be read")
  else:
    print(f"{arguments.hf_dir} has no tokenizer.json: the tokenizer is set to bytes, which is not the model's own; "
          "transformers writes one (AutoTokenizer.from_pretrained(HF_DIR).save_pretrained(HF_DIR))")
  for note in hugging_face.notes(found.config):
    print(f"note: {note}")
  dtype = arrays.leaves["params.embedding"].dtype
  model = dataclasses.replace(model, compute_dtype=dtype if dtype in ("float32", "bfloat16") else "float32")
  run = _run(model, tokenizer, found.config.get("max_position_embeddings"))
  (out / "model.gin").write_text(_gin(model, tokenizer, arguments.hf_dir))
  with terminal.progress("read", sum(leaf.bytes for leaf in arrays.leaves.values()), "B") as work:
    checkpoint.write(out / "checkpoints" / "0", conversion.Watched(arrays, work.advance), run)
  size = terminal.count(sum(leaf.size for leaf in arrays.leaves.values()))
  print(f"{out}/checkpoints/0: {family.model_type}, {size} parameters in {len(found.source.leaves)} tensors, "
        f"{len(arrays.leaves)} arrays here, computed in {model.compute_dtype}; options in {out}/model.gin, "
        f"{len(carried)} files as they were in {beside}")
  if arrays.left_out:
    print(f"left out: {len(arrays.left_out)} tensors of multi-token prediction, which there is none of here")
  if not arguments.check:
    return terminal.FINE
  from tools import hf_logits

  written = stored.find(out).source
  unrounded = hugging_face.AsOurs(found.source, model, family) if arguments.dtype else written  # theirs are not rounded either
  return hf_logits.check(arrays, written, arguments.hf_dir, unrounded, model)


def _run(model: config.Model, tokenizer: str, positions: int | None) -> config.Run:
  run = gin_config.resolve([gin_config.CONFIGS / "run" / "quickstart.gin"]).run
  length = min(positions or _SEQUENCE, _SEQUENCE)
  data = dataclasses.replace(run.data, tokenizer=tokenizer, sequence_tokens=length)
  return dataclasses.replace(run, model=model, data=data)


def _gin(model: config.Model, tokenizer: str, source: str) -> str:
  """What the arrays depend on, as gin bindings."""
  lines = [f"# Written by tools.import_hf from {source}.", f"Data.tokenizer = {tokenizer!r}"]

  def walk(part, prefix=""):
    for field in dataclasses.fields(part):
      value, path = getattr(part, field.name), prefix + field.name
      if dataclasses.is_dataclass(value):
        walk(value, f"{path}.")
      elif path not in hugging_face.FREE or path == "router.bias_update_rate":  # how it is computed is the run's matter
        lines.append(f"{type(part).__name__}.{field.name} = {value!r}")

  walk(model)
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  terminal.run(main)
