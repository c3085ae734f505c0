"""build_data: what people have is read as it is, every fault names its place, and neither workers nor kills change a byte."""

import bz2
import fcntl
import functools
import gzip
import json
import lzma
import os
import pathlib
import re
import signal
import subprocess
import sys
import tarfile
import time
import types

import pytest

from moe.config import ConfigError
from moe.data import building
from moe.data import records
from moe.data import text_files
from moe.data import tokenizers
from moe.data.records import DataError
from tools import build_data

zstd = text_files._zstd("the tests")
ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXTS = [f"document {i}: Ünïcode \U0001f642 {'word ' * (i % 37)}" for i in range(150)]


def built(folder, *arguments, name="out", **flags) -> dict[str, list[str]]:
  """The texts of each split of a domain that is built of some inputs."""
  out = folder / name
  words = [f"--{flag}={value}" for flag, value in {"domain": "d", "output": out, **flags}.items()]
  assert build_data.main([*words, *map(os.fspath, arguments)]) == 0
  manifest = records.read_manifest(out)
  return {split: [d.text for d in records.read_documents(out, split)] if manifest["splits"][split]["documents"] else []
          for split in records.SPLITS}


def texts(folder, *arguments, **flags) -> list[str]:
  """All of them are training documents."""
  return built(folder, *arguments, held_out=0, **flags)["train"]


def lines(values, field="text") -> bytes:
  return "".join(json.dumps({field: value}) + "\n" for value in values).encode()


def parquet(path, values, field="text", **options):
  from pyarrow import parquet, table
  parquet.write_table(table({field: values}), path, **options)
  return path


def read(path, form="auto", field="text", task_bytes=1 << 20):
  """(texts, faults) of one file."""
  reader = text_files.Reader([str(path)], form, field, task_bytes)
  found = [text for task in reader.tasks(text_files.Position()) for block in task.blocks
           for text in text_files.texts(block, field)]
  return ([text.text for text in found if isinstance(text, text_files.Text)],
          [text.message for text in found if isinstance(text, text_files.Fault)])


# ------------------------------------------------------------------------------------------------------------ formats


def test_formats_are_told_by_content(tmp_path, capsys):
  """The same documents in all forms, none named by a flag, fall into the same splits."""
  array = json.dumps([{"text": text} for text in TEXTS])
  printed = "\n".join(json.dumps({"text": text}, indent=2) for text in TEXTS)  # as jq prints
  frames = zstd.compress(lines(TEXTS[:70])) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstd.compress(lines(TEXTS[70:]))
  files = {
      "a.jsonl": lines(TEXTS), "b": lines(TEXTS), "c.txt": lines(TEXTS), "d.json": array.encode(), "e.json": printed.encode(),
      "f.jsonl": array.encode(), "g.jsonl.gz": gzip.compress(lines(TEXTS[:70])) + gzip.compress(lines(TEXTS[70:])),
      "h.jsonl.zst": frames, "i.bz2": bz2.compress(lines(TEXTS)), "j.jsonl": lzma.compress(lines(TEXTS)),
      "k.gz": zstd.compress(array.encode()), "l.jsonl": lines(TEXTS).replace(b"\n", b"\r\n\n"), "m.ndjson": lines(TEXTS)[:-1],
      "n.zst": lines(TEXTS), "o.jsonl": "\ufeff".encode() + lines(TEXTS[:70]) + "\ufeff".encode() + lines(TEXTS[70:])}
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  parquet(tmp_path / "p.parquet", TEXTS)
  parquet(tmp_path / "q", TEXTS, row_group_size=40)
  (tmp_path / "r.parquet.gz").write_bytes(gzip.compress((tmp_path / "q").read_bytes()))
  (tmp_path / "s").mkdir()
  for i, text in enumerate(TEXTS):
    (tmp_path / "s" / f"{i:03}.txt").write_text(text)
  for name in (*files, "p.parquet", "q", "r.parquet.gz"):
    assert read(tmp_path / name) == (TEXTS, []), name
  built_of = ("s", "c.txt", "h.jsonl.zst", "q")
  want, *others = [built(tmp_path, tmp_path / name, held_out=0.1, name=f"out-{name}") for name in built_of]
  assert others == [want] * 3
  assert sorted(text for split in want.values() for text in split) == sorted(TEXTS)
  assert 5 < len(want["validation"]) < 30 and 5 < len(want["test"]) < 30
  assert "c.txt is read as jsonl, by its content" in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    '{"a": 1} is how an object looks\nand that was it', "[1] a note\n", "{}\n{}\n", '{"x": 1}\n{"y": 2}\n',
    "[section]\nkey = 1\n", '{"text": "one"}\nand prose\n', "", "\n\n", "word"])
def test_prose_is_text(tmp_path, content):
  (tmp_path / "a.txt").write_text(content)
  assert read(tmp_path / "a.txt") == ([content], [])


def test_lines_of_objects_in_a_text_are_mentioned(tmp_path, capsys):
  (tmp_path / "a.log").write_text('{"body": "x"}\n{"body": "y"}\n')
  assert len(texts(tmp_path, tmp_path / "a.log")) == 1
  assert "a.log is read as one document, though its lines are JSON objects, without a field 'text' (they have body)" in (
      capsys.readouterr().out)
  assert texts(tmp_path, tmp_path / "a.log", field="body", name="body") == ["x", "y"]


def test_a_format_that_is_named_is_taken(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
  assert texts(tmp_path, tmp_path / "a.jsonl", format="text") == [lines(TEXTS).decode()]
  (tmp_path / "b.txt").write_text('{"t": 1}\n{"text": "x"}\n')
  assert read(tmp_path / "b.txt", "jsonl")[0] == ["x"]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfmark", b"cr\rcr\r", b"crlf\r\n\r\n", b"nul\0\0", b"line\xe2\x80\xa8separator\x0b", b"\n\n lead and trail \n"])
def test_a_text_keeps_its_bytes(tmp_path, content):
  (tmp_path / "a.txt").write_bytes(content)
  (tmp_path / "b.jsonl").write_bytes(lines([content.decode().removeprefix("\ufeff")]))
  want = [content.decode().removeprefix("\ufeff")]
  assert texts(tmp_path, tmp_path / "a.txt") == want
  splits = built(tmp_path, tmp_path / "a.txt", tmp_path / "b.jsonl", name="both", held_out=0.3)
  assert sorted(map(len, splits.values())) == [0, 0, 2]  # equal texts never straddle


@pytest.mark.parametrize("row, field", [
    ({"meta": {"text": "x"}}, "meta.text"), ({"meta.text": "x", "meta": {"text": "y"}}, "meta.text"),
    ({"a": {"b": {"c": "x"}}}, "a.b.c"), ({"n": 10**4999, "text": "x", "inf": float("inf")}, "text")])
def test_fields(tmp_path, row, field):
  sys.set_int_max_str_digits(0)
  (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
  sys.set_int_max_str_digits(4300)
  assert read(tmp_path / "a.jsonl", field=field) == (["x"], [])


@pytest.mark.parametrize("kind", ["dictionary", "large", "binary", "nested", "dotted"])
def test_columns_of_parquet(tmp_path, kind):
  import pyarrow
  column = {"dictionary": pyarrow.array(TEXTS).dictionary_encode(), "large": pyarrow.array(TEXTS, pyarrow.large_string()),
            "binary": pyarrow.array([text.encode() for text in TEXTS]),
            "nested": pyarrow.array([{"id": 1, "body": {"text": text}} for text in TEXTS])}.get(kind, pyarrow.array(TEXTS))
  name, field = {"nested": ("page", "page.body.text"), "dotted": ("page.text", "page.text")}.get(kind, ("text", "text"))
  parquet(tmp_path / "a.parquet", column, name, row_group_size=64)
  assert read(tmp_path / "a.parquet", field=field, task_bytes=500) == (TEXTS, [])


# ------------------------------------------------------------------------------------------------------------- faults


ROW = b'{"text": "fine"}\n'


@pytest.mark.parametrize("name, content, fault, rest", [
    ("a.jsonl", ROW + b'{"text": "cut\n' + ROW, ":2: is not JSON: Unterminated string", 2),
    ("a.jsonl", ROW * 3 + b"word\n", ":4: is not JSON: Expecting value", 3),
    ("a.jsonl", ROW + b'\n\n{"txt": "x", "meta": {"body": "y"}}\n', r":4: has no text field 'text' \(it has txt, meta.body",
     1),
    ("a.jsonl", ROW + b'{"text": null}\n' + ROW, ":2: field 'text' is null", 2),
    ("a.jsonl", ROW + b'{"text": ["x"]}\n', ":2: field 'text' is a list", 1),
    ("a.jsonl", ROW + b'{"text": 7}\n', ":2: field 'text' is a number", 1),
    ("a.jsonl", ROW + b'["x"]\n', ":2: holds a list, not an object", 1),
    ("a.jsonl", ROW + b'{"text": "caf\xe9"}\n', ":2: byte 0xe9 at 13 is not UTF-8.*LATIN1", 1),
    ("a.jsonl", ROW + b'{"text": "x", "deep": ' + b"[" * 99_999 + b"]" * 99_999 + b"}\n" + ROW, ":2: is nested too deeply", 2),
    ("a.jsonl", ROW + b"\0" * 50 + b"\n", ":2: is not JSON", 1),
    ("a.json", b'[\n{"text": "x"},\n{"text": "y"\n', ":4: is not JSON", 1),
    ("a.json", b'[{"text": "x"},\n{"text": "y"}\n', ":3: is not JSON: the array ends without", 2),
    ("a.json", b'[{"text": "x"}\n{"text": "y"}]', ":1: is not JSON: there is no comma", 1),
    ("a.json", b'[{"text": "x"}, {"text": 1}]', ":1: field 'text' is a number", 1),
    ("a.json", b'[{"text": "x"},' + b"[" * 200_000, ":1: is nested too deeply", 1),
    ("a.txt", b"one\ntwo\ncaf\xe9", ":3: byte 0xe9 at 11 is not UTF-8", 0),
    ("a.txt", "word".encode("utf-16"), ": is UTF-16 .*iconv", 0),
    ("a.jsonl", ROW.decode().encode("utf-16"), ": is UTF-16", 0),
    ("a.txt", "word".encode("utf-32"), ": is UTF-32 ", 0),
    ("a.parquet", b"PAR1 and no more", ": cannot be read as parquet", 0),
    ("a.parquet", ROW, ": has the name of a parquet file but", 0),
    ("a.zip", b"PK\x03\x04" + bytes(99), ": is a zip archive", 0),
    ("a.pdf", b"%PDF-1.7", ": is a PDF", 0),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ": is a pointer of Git LFS", 0),
    ("a.jsonl.zst", b"", ": is empty, which no compressed file is", 0),
    ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-200], ": is cut off: its compressed data ends too early", None),
    ("a.jsonl.zst", zstd.compress(lines(TEXTS)) + zstd.compress(lines(TEXTS))[:-50], ": is cut off", len(TEXTS)),
    ("a.jsonl.xz", lzma.compress(lines(TEXTS))[:-20], ": is cut off", None),
    ("a.jsonl.gz", gzip.compress(ROW * 9) + b"rubbish", ": is damaged: Not a gzipped file", 9),
    ("a.txt.gz", gzip.compress(b"a text " * 999)[:-9], ": is cut off", 0),
    ("a.json.gz", gzip.compress(json.dumps([{"text": t} for t in TEXTS]).encode())[:-9], ": is cut off", None),
])
def test_a_fault_names_its_place(tmp_path, name, content, fault, rest):
  (tmp_path / name).write_bytes(content)
  found, faults = read(tmp_path / name)
  assert len(faults) == 1 and "\n" not in faults[0]
  with pytest.raises(DataError, match=f"{name}{fault}.*--on_bad=skip"):
    texts(tmp_path, tmp_path / name)
  assert list(tmp_path.glob(".*")) == [] and not (tmp_path / "out").exists()
  assert len(found) == rest if rest is not None else 0 < len(found) <= len(TEXTS)
  if rest is None:
    assert found == TEXTS[: len(found)]


def test_parquet_that_is_damaged(tmp_path):
  path = parquet(tmp_path / "a.parquet", ["x", None, "y"])
  assert read(path)[1] == [f"{path} row 1: field 'text' is null, not text"]
  assert "has no column 'words'; it has text" in read(path, field="words.text")[1][0]
  content = path.read_bytes()
  path.write_bytes(content[:-20])
  assert "cannot be read as parquet" in read(path)[1][0]
  import pyarrow
  latin = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\7\0\0\0"), pyarrow.py_buffer(b"caf\xe9abc"))
  found, faults = read(parquet(tmp_path / "b.parquet", latin))
  assert found == ["abc"] and "row 0: field 'text' is no text: byte 0xe9" in faults[0]


def test_a_tar_archive_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("x")
  with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.USTAR_FORMAT) as file:
    file.add(tmp_path / "a.txt")
  assert "is a tar archive" in read(tmp_path / "a.tar.gz")[1][0]


def test_faults_are_left_out_counted_and_limited(tmp_path, capsys):
  (tmp_path / "a.jsonl").write_bytes((ROW + b"bad\n" + lines(["t\ud83d", ""])) * 5)
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 999)[:-9])
  found = texts(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt.gz", on_bad="skip", max_bad=6)
  assert found == ["fine", "t\ufffd"] * 5
  said = capsys.readouterr().out
  assert "6 places could not be read" in said and "a.jsonl:2: is not JSON" in said
  assert "5 documents without text" in said and "U+FFFD in 5 documents" in said
  skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
  assert len(skipped) == 6 and "a.jsonl:18: " in skipped[4] and "b.txt.gz: is cut off" in skipped[5]
  with pytest.raises(DataError, match=r"more than --max_bad=5 places cannot be read: .*a.jsonl:2.*; ...; .*b.txt.gz"):
    texts(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt.gz", on_bad="skip", max_bad=5, name="more")


def test_surrogates(tmp_path):
  """Halves alone become U+FFFD; pairs are a character."""
  (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42 \\ude42\\ud83d x"}\n')
  block = next(text_files.Reader([str(tmp_path / "a.jsonl")]).tasks(text_files.Position())).blocks[0]
  assert list(text_files.texts(block)) == [text_files.Text("\U0001f642 \ufffd\ufffd x", f"{tmp_path}/a.jsonl:1", 2)]


def test_nothing_and_nearly_nothing(tmp_path, capsys):
  (tmp_path / "empty.txt").write_text("")
  (tmp_path / "blank.jsonl").write_text("\n\n")
  with pytest.raises(DataError, match="no document in 2 file.*all 1 are empty"):
    texts(tmp_path, tmp_path / "empty.txt", tmp_path / "blank.jsonl")
  (tmp_path / "folder" / ".git").mkdir(parents=True)
  (tmp_path / "folder" / ".git" / "x").write_text("hidden")
  with pytest.raises(DataError, match="folder .*folder holds no file"):
    texts(tmp_path, tmp_path / "folder")
  with pytest.raises(DataError, match=r"no file matches .*none\*.txt"):
    texts(tmp_path, tmp_path / "blank.jsonl", tmp_path / "none*.txt")
  assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))
  (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:4]))
  built(tmp_path, tmp_path / "a.jsonl")
  said = capsys.readouterr().out
  assert "validation is empty: --held_out=0.01 of 4 documents; give more, or remove the folder and try --held_out=0.4" in said
  with pytest.raises(DataError, match="exists already"):
    built(tmp_path, tmp_path / "a.jsonl")
  (tmp_path / "secret.txt").write_text("x")
  (tmp_path / "secret.txt").chmod(0)
  if os.geteuid():
    assert "cannot be read: Permission denied" in read(tmp_path / "secret.txt")[1][0]


# -------------------------------------------------------------------------------------------------------- which files


def test_names(tmp_path, monkeypatch):
  """A path that exists is no pattern; folders, patterns in folders with brackets, ~, names that are not UTF-8."""
  names = ["[1] a.txt", "b*.txt", "b2.txt", "c[x]/d.txt", "c[x]/e/f.txt", "c[x]/.hidden", "cx/g.txt"]
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  latin = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
  pathlib.Path(latin).write_text("latin")

  def found(*inputs):
    return [os.path.relpath(path, tmp_path) for path in text_files.find([str(tmp_path / text) for text in inputs])]

  assert found("[1] a.txt") == ["[1] a.txt"] and found("b*.txt") == ["b*.txt"] and found("b?.txt") == ["b*.txt", "b2.txt"]
  assert found("c[x]") == ["c[x]/d.txt", "c[x]/e/f.txt"] and found("c[x]/*.txt") == ["c[x]/d.txt"]
  assert found("c[wx]/*") == ["cx/g.txt"]
  assert found("c[x]", "c[x]/d.txt", "./c[x]/*/f.txt") == ["c[x]/d.txt", "c[x]/e/f.txt"]
  assert found("c[x]/**/*.txt") == ["c[x]/d.txt", "c[x]/e/f.txt"]
  monkeypatch.setenv("HOME", str(tmp_path))
  assert text_files.find(["~/b2.txt"]) == [str(tmp_path / "b2.txt")]
  assert len(texts(tmp_path, "~", name="~out")) == 7
  sources = {d.text: d.source for d in records.read_documents(tmp_path / "~out", "train")}
  assert sources["latin"] == f"{tmp_path}/caf\\xe9.txt" and sources["b2.txt"] == f"{tmp_path}/b2.txt"
  pathlib.Path(latin).write_bytes(b"\xff\xfa")
  with pytest.raises(DataError, match=r"caf\\xe9.txt:1: byte 0xff"):
    texts(tmp_path, latin, name="other")
  with pytest.raises(DataError, match=r"--output=.*\\xe9 is not UTF-8"):
    texts(tmp_path, tmp_path / "b2.txt", output=os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))


def test_links_and_what_is_no_file(tmp_path):
  """Links are followed, also to folders, but not in circles; a pipe in a folder is not waited for; a dead link is a fault."""
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "a.txt").write_text("a")
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "b.txt").write_text("b")
  (folder / "linked").symlink_to(tmp_path / "elsewhere")
  (folder / "c.txt").symlink_to(tmp_path / "elsewhere" / "a.txt")
  (folder / "circle").symlink_to(folder)
  os.mkfifo(folder / "fifo")
  assert texts(tmp_path, folder) == ["b", "a", "a"]
  (folder / "d.txt").symlink_to(tmp_path / "gone")
  with pytest.raises(DataError, match="d.txt: cannot be read: No such file"):
    texts(tmp_path, folder, name="dead")


@pytest.mark.parametrize("content, form", [
    (lines(TEXTS), "auto"), (zstd.compress(lines(TEXTS)), "auto"), (b"one text\n", "auto"),
    (json.dumps([{"text": text} for text in TEXTS]).encode(), "json")])
def test_a_pipe_gives_what_the_file_gives(tmp_path, content, form):
  """It is read once, so that no split is lost, however slowly it comes."""
  want = built(tmp_path, write(tmp_path / "file", content), held_out=0.2, name="file-out", format=form)
  os.mkfifo(tmp_path / "fifo")
  writer = subprocess.Popen([sys.executable, "-c", f"""
import time
content = open({str(tmp_path / 'file')!r}, 'rb').read()
with open({str(tmp_path / 'fifo')!r}, 'wb', buffering=0) as file:
  for begin, end in ((0, 1), (1, 3), (3, 700), (700, None)):
    file.write(content[begin:end])
    time.sleep(0.05)
"""])
  assert built(tmp_path, tmp_path / "fifo", held_out=0.2, format=form) == want
  assert writer.wait(10) == 0
  command = [sys.executable, "-m", "tools.build_data", "--domain=d", f"--output={tmp_path / 'stdin'}", "--held_out=0.2",
             f"--format={form}", "-"]
  done = subprocess.run(command, input=content, cwd=ROOT, capture_output=True, check=True)
  assert done.stderr == b""
  for split, found in want.items():
    if found:
      assert [d.text for d in records.read_documents(tmp_path / "stdin", split)] == found


def write(path, content):
  path.write_bytes(content)
  return path


def test_parquet_and_zstandard_name_what_is_lacking(tmp_path, monkeypatch):
  path = parquet(tmp_path / "a.parquet", TEXTS)
  frame = write(tmp_path / "a.jsonl.zst", zstd.compress(ROW))
  for module in ("pyarrow", "backports", "compression"):
    monkeypatch.setitem(sys.modules, module, None)
  for file, package in ((path, "pyarrow"), (frame, "backports.zstd")):
    with pytest.raises(DataError, match=f"pip install {package}"):
      texts(tmp_path, file, on_bad="skip")  # not a fault of the file
  assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- tasks, workers, interruptions


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
  """Files of every kind."""
  folder = tmp_path_factory.mktemp("corpus")
  (folder / "a.jsonl").write_bytes(lines(TEXTS))
  (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines([text * 3 for text in TEXTS])))
  (folder / "c.json").write_text(json.dumps([{"text": "c" + text} for text in TEXTS]))
  parquet(folder / "d.parquet", ["d" + text for text in TEXTS], row_group_size=60)
  for i in range(40):
    (folder / f"e{i:02}.txt").write_text(f"text {i}\n" * (i + 1))
  (folder / "f.jsonl").write_bytes(lines(["x" * 9000, "short"]) + ROW[:-1])
  return text_files.find([str(folder)])


def of_tasks(tasks):
  return [text for task in tasks for block in task.blocks for text in text_files.texts(block)]


@pytest.mark.parametrize("size", [1000, 3001, 1 << 20])
def test_tasks_are_all_of_the_files_and_go_on_from_any_end(corpus, size):
  whole = of_tasks(text_files.Reader(corpus).tasks(text_files.Position()))
  assert len(whole) == 4 * 150 + 40 + 3 and all(isinstance(text, text_files.Text) for text in whole)
  reader = text_files.Reader(corpus, task_bytes=size)
  tasks = list(reader.tasks(text_files.Position()))
  assert of_tasks(tasks) == whole  # with their lines and numbers
  assert len(tasks) > 20 if size < 4000 else len(tasks) < 8
  for i in range(0, len(tasks), 3):
    later = list(reader.tasks(tasks[i].after))
    assert [task.after for task in later] == [task.after for task in tasks[i + 1 :]]
    assert of_tasks(later) == of_tasks(tasks[i + 1 :])
  assert sorted(task.read_bytes for task in tasks) == [task.read_bytes for task in tasks]
  assert tasks[-1].read_bytes <= reader.total_bytes


def run_build(corpus, folder, report="pass", **options) -> subprocess.CompletedProcess:
  """A build by a process of its own, with small tasks and parts. `report`: a statement run after each task, with its number."""
  code = f"""
import os, resource, signal
from moe.data import building, text_files
count = 0
def report(progress):
  global count
  count += 1
  {report}
if __name__ == "__main__":
  reader = text_files.Reader({corpus!r}, task_bytes=3000)
  state = building.build(reader, building.pathlib.Path({str(folder)!r}),
                         building.Options("d", held_out=0.1, part_bytes=20_000, **{options!r}), report)
  print(count)
"""
  script = folder.with_name("build.py")
  script.write_text(code)
  # Ends only when every process that holds the pipes has ended, workers too.
  return subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                        timeout=60)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
  """(manifest, tasks) of a build by one process."""
  folder = tmp_path_factory.mktemp("undisturbed") / "out"
  done = run_build(corpus, folder)
  assert done.returncode == 0, done.stderr
  manifest = records.read_manifest(folder)
  files = manifest["splits"]["train"]["files"]
  assert len(files) >= 5 and files[0]["name"] == f"train-00000-of-{len(files):05}.arrayrecord"
  return manifest, int(done.stdout)


def test_a_build_that_is_killed_goes_on(corpus, undisturbed, tmp_path):
  """Killed again and again, by one process or two, until it is through: the same bytes, and nothing is left beside it."""
  folder = tmp_path / "out"
  for workers, after in ((1, 9), (2, 14), (1, 1)):
    done = run_build(corpus, folder, f"if count == {after}: os.kill(os.getpid(), signal.SIGKILL)", workers=workers)
    assert done.returncode == -signal.SIGKILL and not folder.exists()
  done = run_build(corpus, folder, workers=2)
  assert done.returncode == 0, done.stderr
  assert 0 < int(done.stdout) < undisturbed[1] - 5  # tasks that were left
  assert records.read_manifest(folder) == undisturbed[0]
  assert build_data.verify(folder) == 0
  assert sorted(path.name for path in tmp_path.iterdir()) == ["build.py", "out"]
  assert {path.name for path in folder.iterdir()} == {"manifest.json"} | {
      entry["name"] for split in undisturbed[0]["splits"].values() for entry in split["files"]}


@pytest.mark.parametrize("when", ["state", "renamed"])
def test_a_kill_while_it_is_completed(corpus, undisturbed, tmp_path, when, monkeypatch):
  """After the last part, and between two files' new names."""
  replaced = []

  def replace(source, target):
    if when == "renamed" and str(target).endswith("arrayrecord"):
      replaced.append(target)
      if len(replaced) == 3:
        raise KeyboardInterrupt
    os.rename(source, target)

  def complete(*arguments):
    raise KeyboardInterrupt

  def build():
    reader = text_files.Reader(corpus, task_bytes=3000)
    return building.build(reader, tmp_path / "out", building.Options("d", held_out=0.1, part_bytes=20_000))

  with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
    patched.setattr(building.os, "replace", replace)
    if when == "state":
      patched.setattr(building, "_complete", complete)
    build()
  assert not (tmp_path / "out").exists()
  build()
  assert records.read_manifest(tmp_path / "out") == undisturbed[0] and build_data.verify(tmp_path / "out") == 0


def test_a_full_disk_is_said_and_gone_on_from(corpus, undisturbed, tmp_path):
  """The limit on a file's size stands in for it: the write of a file fails in the same way."""
  limit = "if count == 12: signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))"
  done = run_build(corpus, tmp_path / "out", limit)
  assert done.returncode == 1
  assert "DataError: cannot write" in done.stderr and "it goes on after what is done" in done.stderr
  done = run_build(corpus, tmp_path / "out")
  assert done.returncode == 0 and int(done.stdout) < undisturbed[1]
  assert records.read_manifest(tmp_path / "out") == undisturbed[0]


def test_a_build_of_other_inputs_begins_anew(tmp_path):
  path = write(tmp_path / "a.jsonl", lines(TEXTS))

  def build(texts_wanted, stop=None, **changes):
    def report(progress):
      if stop and progress.documents >= stop:
        raise KeyboardInterrupt

    reader = text_files.Reader([str(path)], task_bytes=1000)
    options = building.Options(**{"domain": "d", "held_out": 0, "part_bytes": 2000, **changes})
    building.build(reader, tmp_path / "out", options, report)
    assert [d.text for d in records.read_documents(tmp_path / "out", "train")] == texts_wanted
    assert {d.domain for d in records.read_documents(tmp_path / "out", "train")} == {options.domain}

  for change in ("file", "options"):
    with pytest.raises(KeyboardInterrupt):
      build(TEXTS, stop=60)
    assert json.loads((tmp_path / ".out.build" / "state.json").read_text())["parts"] >= 2
    if change == "file":
      write(path, lines(TEXTS[::-1]))
      build(TEXTS[::-1])
    else:
      build(TEXTS[::-1], domain="other")
    records.shutil.rmtree(tmp_path / "out")
  # A build under way is left alone.
  (tmp_path / ".out.build").mkdir()
  with open(tmp_path / ".out.build" / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process builds"):
      build(TEXTS)


def test_records_are_those_of_json(tmp_path):
  for text in (*TEXTS[:3], '"\\/\b\f\n\r\t\x00\x1f\x7f\u2028\U0001f642'):
    document = records.Document(text, "d\u00e9", "s")
    plain = {"text": text, "domain": "d\u00e9", "source": "s", "bytes": len(text.encode())}
    assert document.encode() == json.dumps(plain, ensure_ascii=False).encode() == document.encode(len(text.encode()))
    assert records.Document.decode(document.encode()) == document


# --------------------------------------------------------------------------------------------------- tokenizers, flags


def test_a_tokenizer_of_several_domains(tmp_path, capsys):
  for name, letters in (("a", "ab "), ("b", "xy ")):
    built(tmp_path, write(tmp_path / f"{name}.jsonl", lines([letters * i for i in range(1, 40)])), name=name, held_out=0.05)
  out = tmp_path / "new" / "bpe.json"
  assert build_data.main([f"--train_tokenizer={out}", "--vocab_size=280", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  assert " ids, documents end with '</s>'" in capsys.readouterr().out
  learnt = tokenizers.load(str(out))
  assert len(learnt.encode("ab ab xy xy")) < len("ab ab xy xy") / 2
  for size in (10, 257):
    with pytest.raises(DataError, match=f"--vocab_size={size} is below 258"):
      build_data.main([f"--train_tokenizer={out}", f"--vocab_size={size}", str(tmp_path / "a")])
  assert build_data.main(["--verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  file = tmp_path / "b" / records.read_manifest(tmp_path / "b")["splits"]["train"]["files"][0]["name"]
  write(file, file.read_bytes()[:-1] + b"x")
  assert build_data.main(["--verify", str(tmp_path / "a"), str(tmp_path / "b")]) == 1


@pytest.mark.parametrize("flags, message", [
    (["--held_out=0.5"], r"--held_out=0.5 must be in \[0, 0.5\)"), (["--shards=0"], "--shards=0 at least 1"),
    (["--workers=-1"], "--workers=-1"), (["--part_mb=0"], "--part_mb=0.0 above 0"), (["--max_bad=-1"], "--max_bad=-1"),
    (["--output=gs://bucket/x"], "must be a local folder"), (["--domain="], "--domain and --output are needed")])
def test_flags(tmp_path, flags, message):
  with pytest.raises(ConfigError, match=message):
    build_data.main(["--domain=d", f"--output={tmp_path / 'out'}", *flags, str(tmp_path)])


def test_shards_are_dealt_in_turn(tmp_path):
  path = write(tmp_path / "a.jsonl", lines(TEXTS))
  texts(tmp_path, path, shards=3)
  files = records.read_manifest(tmp_path / "out")["splits"]["train"]["files"]
  assert [entry["documents"] for entry in files] == [50, 50, 50]


def test_progress_is_shown(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(build_data.terminal, "progress", functools.partial(build_data.terminal.progress, seconds=0.01))
  path = write(tmp_path / "a.jsonl", lines(["word " * 100_000] * 30))
  assert build_data.main(["--domain=d", f"--output={tmp_path / 'out'}", "--workers=1", str(path)]) == 0
  said = [line for line in capsys.readouterr().err.splitlines() if "/s of text" in line]
  assert said and re.match(r"\d+ documents, .*B/s of text: .* of 15.0 MB, \d+%, ", said[-1])


def test_progress_of_a_build_that_goes_on():
  """What was read before counts in what is done, not in the rate."""
  work = types.SimpleNamespace(done=0, start=time.monotonic() - 10)
  build_data._show(work, building.Progress(100, 5_000_000, 4_000_000, 10_000_000))
  build_data._show(work, building.Progress(200, 25_000_000, 9_000_000, 10_000_000))
  assert (work.first_done, work.done) == (4_000_000, 9_000_000)
  assert work.what == "200 documents, 2.0 MB/s of text"
