"""Continues a prompt, and shows which experts each token went through. `python -m tools.sample RUN_DIR --prompt 'In the'`"""

from __future__ import annotations

import argparse
import colorsys
import dataclasses
import sys

import numpy as np
from rich import console as rich_console
from rich import text as rich_text

from moe import generate
from moe import hugging_face_files
from tools import restore
from tools import terminal


def expert_color(expert: int, count: int) -> str:
  """A colour of its own for each expert."""
  red, green, blue = colorsys.hls_to_rgb(expert / count, 0.6, 0.75)
  return f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"


def experts_table(trained: restore.Trained, ids: np.ndarray, experts: np.ndarray, layer: int) -> rich_text.Text:
  """The text coloured by each token's first expert in one layer, with a legend."""
  count = trained.run.model.experts.num_experts
  shown = rich_text.Text()
  for token, chosen in zip(ids, experts[layer]):
    shown.append(trained.tokenizer.decode([token]), style=expert_color(int(chosen[0]), count))
  used = np.bincount(experts[layer][:, 0], minlength=count)
  shown.append(f"\n  layer {layer}, first expert: ")
  for expert in np.argsort(-used):
    if used[expert]:
      shown.append(f" {expert}", style=f"bold {expert_color(int(expert), count)}")
      shown.append(f":{used[expert] / used.sum():.0%}")
  return shown


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tools.sample", description=__doc__.splitlines()[0])
  parser.add_argument("path", help="run directory, or checkpoints/<step> of one")
  parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
  parser.add_argument("--tokens", type=int, default=300, help="at most; fewer where the text ends (default: %(default)s)")
  parser.add_argument("--past_end", action="store_true", help="go on after the end of the text, with the next one")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                      help="to compute in (default: the run's; of an import, its parameters')")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
  parser.add_argument("--top_p", type=float, default=0.95)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--as_trained", action="store_true",
                      help="with a capacity, drop what the rows of training would: reads the whole text again for each token")
  parser.add_argument("--show_experts", action="store_true", help="colour the text by expert, once for each layer")
  arguments = parser.parse_args(argv)
  if arguments.tokens < 1 or not 0 < arguments.top_p <= 1 or arguments.temperature < 0:
    parser.error("--tokens must be at least 1, --top_p in (0, 1], --temperature at least 0")
  trained = restore.load(arguments.path)
  model = trained.run.model
  if arguments.dtype:
    model = dataclasses.replace(model, compute_dtype=arguments.dtype)
  kept = hugging_face_files.of(trained.run, hugging_face_files.run_folder(arguments.path))
  prompt = np.array(kept.encode(arguments.prompt, trained.tokenizer) or [kept.first(trained.tokenizer)], np.int32)
  row_tokens, note = trained.run.data.sequence_tokens, generate.capacity_note(trained.run)
  if note and not arguments.as_trained:
    print(f"note: {note}; --as_trained decodes with the slots of a row of {row_tokens} tokens", file=sys.stderr)
  made = generate.sample(model, trained.params, prompt, arguments.tokens, seed=arguments.seed,
                         vocab_size=trained.tokenizer.vocab_size, temperature=arguments.temperature, top_p=arguments.top_p,
                         row_tokens=row_tokens if arguments.as_trained else 0,
                         stops=() if arguments.past_end else kept.stops(trained.tokenizer))
  console = rich_console.Console(highlight=False, soft_wrap=True)
  console.print(rich_text.Text(arguments.prompt, style="bold") + rich_text.Text(trained.tokenizer.decode(made.ids)))
  if arguments.show_experts:
    read = np.concatenate([prompt, made.ids])[: made.experts.shape[1]]
    for layer in range(len(made.experts)):
      console.print()
      console.print(experts_table(trained, read, made.experts, layer))
  return 0


if __name__ == "__main__":
  terminal.run(main)
