"""The strict layer round gin: every mistake a newcomer makes has one clear line; shipped configs are golden."""

import argparse
import pathlib

import pytest

from moe import config
from moe import gin_config

QUICKSTART = gin_config.CONFIGS / "run" / "quickstart.gin"
GOLDEN = pathlib.Path(__file__).parent / "golden"
RUNS = sorted((gin_config.CONFIGS / "run").glob("*.gin"))
ROUTERS = sorted((gin_config.CONFIGS / "router").glob("*.gin"))


def refusal(files=(QUICKSTART,), flags=()) -> str:
  with pytest.raises(config.ConfigError) as error:
    gin_config.resolve(files, flags)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize("flag, parts", [
    ("Train.stesp=3", ["flag --gin.Train.stesp=3", "no parameter 'stesp'", "did you mean 'steps'?"]),
    ("Trian.steps=3", ["no configurable 'Trian'", "did you mean 'Train'?"]),
    ("Model.router=@Rooter()", ["no configurable 'Rooter'", "did you mean 'Router'?"]),
    ("Train.steps='10'", ["Train.steps wants int, got '10' (str)"]),
    ("Train.steps=1e3", ["Train.steps wants int, got 1000.0 (float)"]),
    ("Train.steps=True", ["Train.steps wants int, got True (bool)"]),
    ("Model.router=@Router", ["write @Router() to build it"]),
    ("Model.router=@Experts()", ["Model.router is a Router, not a Experts"]),
    ("Train.steps=%N", ["macro %N is not defined"]),
    ("N=4", ["nothing reads macro N", "--allow_unused"]),
    ("steps=4", ["nothing reads macro steps", "did you mean Train.steps?"]),
    ("foo/Train.steps=4", ["nothing reads foo/Train.steps, for nothing builds @foo/Train()"]),
    ("pyhton/Domain.weight=4.0", ["nothing reads pyhton/Domain.weight; did you mean 'python'?"]),
    ("Router.num_experts=4", ["Router has no parameter 'num_experts'; did you mean Experts.num_experts?"]),
    ("PreGate.width=4", ["did you mean Recurrent.width?"]),
    ("Train.steps=%gin.REQUIRED", ["Train.steps is required but not set", "--gin.Train.steps=VALUE"]),
    ("Data.tokenizer=/data/x", ["a string needs quotes"]),
    ("Model.compute_dtype=bfloat16", ["a string needs quotes"]),
    ("Model.tie_embeddings=true", ["True and False are capitalised"]),
    ("Train.steps=(1,", ["a quote or bracket is not closed"]),
    ("Train.steps=2*3", ["gin has no arithmetic"]),
    ("Data.domains=[@kjv/Domain()]", ["Data.domains is a tuple"]),
    ("Data.domains=(@kjv/Domain())", ["Data.domains is a tuple", "a comma after one item"]),
    ("Data.domains=(@kjv/Domain,)", ["domains names a class; write @kjv/Domain() to build it"]),
    ("Data.domains=(@Router(), 'x')", ["Data.domains holds a Router; each is a Domain"]),
    ("Router.top_k=20", ["flag --gin.Router.top_k=20: Router.top_k = 20 exceeds Experts.num_experts = 8",
                         "(Experts.num_experts: ", "tiny.gin:10)"]),
    ("Router.gate='sigmod'", ["flag --gin.Router.gate='sigmod': Router.gate = 'sigmod'", "did you mean 'sigmoid'?"]),
    ("Model.compute_dtype='bf16'", ["is not one of 'float32', 'bfloat16'; did you mean 'bfloat16'?"]),
    ("Optimizer.schedule='WSD'", ["did you mean 'wsd'?"]),
    ("Experts.dispatch='all-to-all'", ["did you mean 'all_to_all'?"]),
    ("kjv/Domain.weight=-1.0", ["flag --gin.kjv/Domain.weight=-1.0: Domain.weight = -1.0 of 'kjv'"]),
    ("Mesh.data=0", ["flag --gin.Mesh.data=0: Mesh {"]),
    ("Model.moe_every=3", ["flag --gin.Model.moe_every=3: Model.num_layers = 4 less", "(Model.num_layers: ", "tiny.gin:4)"]),
    ("Attention.head_dim=7", ["flag --gin.Attention.head_dim=7: Attention.head_dim: rotary positions need an even width"]),
    ("Data.domains=(@kjv/Domain(), @kvj/Domain())", ["kvj/Domain.name, kvj/Domain.path must be set; did you mean 'kjv'?"]),
])
def test_flag_mistakes(flag, parts):
  text = refusal(flags=[f"--gin.{flag}"])
  for part in parts:
    assert part in text


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert gin_config.resolve(["configs/run/quickstart.gin"]).run.train.steps > 0
  mine = tmp_path / "mine.gin"
  for name in ("configs/run/quickstart.gin", "./configs/run/quickstart.gin"):
    mine.write_text(f"include '{name}'\nTrain.steps = 7\n")
    assert gin_config.resolve([mine]).run.train.steps == 7
  (tmp_path / "linked").mkdir()
  (tmp_path / "linked" / "mine.gin").symlink_to(mine)
  assert gin_config.resolve(["linked/mine.gin"]).run.train.steps == 7
  monkeypatch.setenv("HOME", str(tmp_path))
  assert gin_config.resolve(["~/mine.gin"]).run.train.steps == 7


@pytest.mark.parametrize("text, parts", [
    ("include 'nope.gin'\n", [":2: included file 'nope.gin' is neither in", "nor in the working directory"]),
    ("include 'base.gin'\n", ["did you mean 'configs/base.gin'?"]),
    ("include 'configs/tiny.gin'\n", ["no such file is shipped; did you mean 'configs/size/tiny.gin'?"]),
    ("include 'mien.gin'\n", ["did you mean 'mine.gin'?"]),
    ("N = %M\nM = %N\nTrain.steps = %N\n", [":2: macro N comes back to itself"]),
    ("N = 'x'\nM = %N\nTrain.steps = %M\n", [":4 (%M, ", ":3 (%N, ", ":2)): Train.steps = 'x' is a str, not an int"]),
    ("Router.gate = 'sigmod'\n", ["mine.gin:2: Router.gate = 'sigmod' is not one of"]),
    ("GATE = 'sigmod'\nRouter.gate = %GATE\n", ["mine.gin:3 (%GATE, ", "mine.gin:2): Router.gate = 'sigmod'"]),
    ("N = 9\nRouter.top_k = %N\nExperts.num_experts = 4\n",
     ["mine.gin:4: Router.top_k = 9 exceeds Experts.num_experts = 4", "(Router.top_k: ", "mine.gin:3 (%N, "]),
    ("import os\n", [":2: import is refused"]),
    ("Train.steps = 3\nTrain.steps = 4\n", [":3: Train.steps is bound twice", "first on line 2"]),
    ("Train:\n  steps = 4\n  stepz = 4\n", [":4: Train has no parameter 'stepz'"]),
    ("a b\n", [":2: not valid gin"]),
    ("x = (1,\n2\n", ["a quote or bracket is not closed"]),
    ("Train.steps = 'x\n", [":2: the value cannot be read"]),
])
def test_file_mistakes(tmp_path, text, parts):
  path = tmp_path / "mine.gin"
  path.write_text(f"include '{QUICKSTART}'\n{text}")
  message = refusal([path])
  for part in [*parts]:
    assert part in message


def test_missing_file_and_field(tmp_path):
  assert f"did you mean '{QUICKSTART}'?" in refusal([QUICKSTART.with_name("quickstrat.gin")])
  assert "did you mean 'configs/run/quickstart.gin'?" in refusal([tmp_path / "quickstart.gin"])
  assert "gin file '' does not exist" in refusal([""])
  assert "is a folder, not a file" in refusal([tmp_path])
  assert "copy it here first" in refusal(["gs://bucket/x.gin"])
  text = refusal([gin_config.CONFIGS / "base.gin"])
  assert "must be set" in text and "--gin." in text
  loop = tmp_path / "loop.gin"
  loop.write_text("include 'loop.gin'\n")
  assert "includes itself" in refusal([loop])
  marked = tmp_path / "marked.gin"
  marked.write_text(f"include '{QUICKSTART}'\r\nTrain.steps = 5\r\n", encoding="utf-8-sig")  # as Windows' Notepad saves it
  assert gin_config.resolve([marked]).run.train.steps == 5
  binary = tmp_path / "binary.gin"
  binary.write_bytes(b"\xff\xfe\x00")
  assert "cannot be read" in refusal([binary])


def test_include_is_relative_to_the_including_file(tmp_path, monkeypatch):
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "steps.gin").write_text("Train.steps = 7\n")
  main = tmp_path / "sub" / "main.gin"
  main.write_text(f"include '{QUICKSTART}'\ninclude 'steps.gin'\n")
  monkeypatch.chdir(tmp_path)
  assert gin_config.resolve([main]).run.train.steps == 7


DOMAINS = """
ROOT = "embedded:"
BOOKS = "embedded:kjv"
Data.domains = (@kjv/Domain(), @books/Domain(), @code/Domain(), @python/Domain())
books/Domain.name = "books"
books/Domain.path = %BOOKS
code/Domain.name = "code"
code/Domain.path = "embedded:python"
code/Domain.weight = 2.0
"""
TWO = "Data.domains = (@kjv/Domain(), @python/Domain())\n"


def written(folder: pathlib.Path, **files: str) -> pathlib.Path:
  """The last of some gin files, which includes what it says itself."""
  for name, text in files.items():
    (folder / f"{name}.gin").write_text(text)
  return folder / f"{name}.gin"


@pytest.mark.parametrize("library", [DOMAINS, "\n".join(line for line in DOMAINS.splitlines() if "Data.domains" not in line)],
                         ids=["all taken", "none taken"])
def test_two_domains_of_an_included_four(tmp_path, library):
  mine = written(tmp_path, four=library, mine=f"include '{QUICKSTART}'\ninclude 'four.gin'\n{TWO}")
  resolved = gin_config.resolve([mine])
  assert [domain.name for domain in resolved.run.data.domains] == ["kjv", "python"]
  assert [note for note in resolved.notes if "books/Domain (" in note and "code/Domain (" in note]
  # A flag overrides as a file does, also what a file of one's own says.
  own = written(tmp_path, own=f"include '{QUICKSTART}'\n" + DOMAINS.replace('ROOT = "embedded:"', ""))
  flag = "--gin." + TWO.strip().replace(" = ", "=")
  assert gin_config.resolve([own], [flag]).run.data.domains == resolved.run.data.domains


@pytest.mark.parametrize("where, text, message", [
    ("mine", "pyhton/Domain.weight = 2.0", "nothing reads pyhton/Domain.weight; did you mean 'python'?"),
    ("mine", "code/Domain.weight = 2.0", "nothing reads code/Domain.weight"),  # of a domain that this file leaves out
    ("mine", "STPES = 3", "nothing reads macro STPES"),
    ("four", "pyhton/Domain.weight = 2.0", "nothing reads pyhton/Domain.weight; did you mean 'python'?"),
    ("four", "steps = 3", "nothing reads macro steps; did you mean Train.steps?"),
    ("four", "PreGate.num_heads = 2", "nothing reads PreGate.num_heads, for nothing builds @PreGate()"),
    ("four", "small/Router.top_k = 1", "nothing reads small/Router.top_k, for nothing builds @small/Router()"),
    ("flag", "code/Domain.weight=2.0", "nothing reads code/Domain.weight"),
])
def test_misspelt_beside_what_is_left_over(tmp_path, where, text, message):
  """Negative controls of the test above: a typo is none of the bindings that may go unread."""
  files = {"four": DOMAINS, "mine": f"include '{QUICKSTART}'\ninclude 'four.gin'\nModel.router = @Router()\n{TWO}"}
  if "PreGate" in text:
    files["mine"] += "Router.pre_gate = %NONE\nNONE = @bare/PreGate()\n"
    text = text.replace("PreGate", "other/PreGate")
    message = message.replace("PreGate", "other/PreGate")
  if where in files:
    files[where] += text + "\n"
  assert message in refusal([written(tmp_path, **files)], [f"--gin.{text}"] if where == "flag" else [])


def test_a_default_that_every_scope_overrides(tmp_path):
  mine = written(tmp_path, defaults="Domain.weight = 2.0\n", mine=f"include '{QUICKSTART}'\ninclude 'defaults.gin'\n")
  assert gin_config.resolve([mine]).run.data.domains[0].weight == 3.0


def test_an_error_of_later_is_located():
  """As moe/train.py does with what a mesh or the data refuse."""
  resolved = gin_config.resolve([QUICKSTART], ["--gin.Data.batch_sequences=6"])
  error = config.ConfigError("Data.batch_sequences = 6 does not split over 4 devices")
  assert resolved.located(error) == f"flag --gin.Data.batch_sequences=6: {error}"
  assert resolved.located(config.ConfigError("no such thing")) == "no such thing"


@pytest.mark.parametrize("rest, words", [
    (["--Train.steps=3"], "did you mean --gin.Train.steps=3?"), (["--gin-file=x.gin"], "did you mean --gin_file?"),
    (["--nothing"], "unknown argument '--nothing'; bindings are written"), (["--gin.Train.steps"], "has no value")])
def test_unknown_arguments(rest, words):
  parser = argparse.ArgumentParser()
  gin_config.add_arguments(parser)
  with pytest.raises(config.ConfigError) as error:
    gin_config.from_arguments(parser.parse_args([]), rest)
  assert words in str(error.value)


def test_a_schedule_longer_than_the_run_is_noted():
  def notes(*flags):
    return gin_config.resolve([QUICKSTART], [f"--gin.{flag}" for flag in flags]).notes

  assert notes() == ()
  assert "warm-up never ends" in notes("Train.steps=10")[0] and "steps = 10 of 4,096" in notes("Train.steps=10")[0]
  assert "decays while it still warms up" in notes("Train.steps=200")[0]
  assert notes("Train.steps=200", "Optimizer.decay_tokens=100_000") == ()
  assert notes("Train.steps=10", "Optimizer.warmup_tokens=0", "Optimizer.schedule='cosine'") == ()


def test_allow_unused_is_noted():
  resolved = gin_config.resolve([QUICKSTART], ["--gin.N=4"], allow_unused=True)
  assert "nothing reads macro N" in resolved.notes[0]


def test_later_wins_and_operative_round_trips(tmp_path):
  resolved = gin_config.resolve([QUICKSTART], ["--gin.Train.steps=5", "--gin.Train.steps=6"])
  assert resolved.run.train.steps == 6
  path = tmp_path / "operative.gin"
  path.write_text(resolved.operative)
  assert gin_config.resolve([path]).run == resolved.run
  assert type(resolved.run) is config.Run


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_golden(path):
  """A changed default shows up here for review; rewrite with tests/golden/update.py."""
  golden = GOLDEN / f"{path.stem}.txt"
  assert gin_config.resolve([path]).operative == golden.read_text(), "run python tests/golden/update.py and review"


@pytest.mark.parametrize("path", ROUTERS, ids=lambda p: p.stem)
def test_router_files_change_the_router_and_nothing_else(path):
  plain, other = (config.to_dict(gin_config.resolve(files).run) for files in ([QUICKSTART], [QUICKSTART, path]))
  changed = config.differences(plain, other)
  assert changed and all(line.startswith("model.router.") for line in changed)
