"""The strict layer round gin: every mistake a newcomer makes has one clear line; shipped configs are golden."""

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
    ("foo/Train.steps=4", ["nothing reads foo/Train.steps"]),
    ("Train.steps=%gin.REQUIRED", ["Train.steps is required but not set", "--gin.Train.steps=VALUE"]),
    ("Data.tokenizer=/data/x", ["a string needs quotes"]),
    ("Model.compute_dtype=bfloat16", ["a string needs quotes"]),
    ("Model.tie_embeddings=true", ["True and False are capitalised"]),
    ("Train.steps=(1,", ["a quote or bracket is not closed"]),
    ("Train.steps=2*3", ["gin has no arithmetic"]),
    ("Data.domains=[@kjv/Domain()]", ["Data.domains is a tuple"]),
    ("Router.top_k=20", ["Router.top_k = 20 exceeds Experts.num_experts = 8"]),
])
def test_flag_mistakes(flag, parts):
  text = refusal(flags=[f"--gin.{flag}"])
  for part in parts:
    assert part in text


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert gin_config.resolve(["configs/run/quickstart.gin"]).run.train.steps > 0
  assert "gin file . does not exist" in refusal([""])


@pytest.mark.parametrize("text, parts", [
    ("include 'nope.gin'\n", ["nope.gin does not exist"]),
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
  assert "did you mean 'quickstart.gin'?" in refusal([QUICKSTART.with_name("quickstrat.gin")])
  text = refusal([gin_config.CONFIGS / "base.gin"])
  assert "must be set" in text and "--gin." in text
  loop = tmp_path / "loop.gin"
  loop.write_text("include 'loop.gin'\n")
  assert "includes itself" in refusal([loop])
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
