"""A local object store that speaks Google Cloud Storage's JSON API: `python tests/object_store.py` prints its address and
serves until its input is closed. Library: gcp-storage-emulator, with what TensorStore asks beyond it: ranges of names,
generations, preconditions, several callers at once.

Objects are in memory. As in the real store nothing can be appended to or renamed. While the file given as its argument exists
every request is answered with 503.
"""

from __future__ import annotations

import contextlib
import http
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

BUCKET = "bucket"


def environment(address: str) -> dict[str, str]:
  """For processes whose gs:// is the store at that address ("http://host:port"): TensorStore's variables and fsspec's."""
  return {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
          "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # it would look for credentials


@contextlib.contextmanager
def serving(outage: str = "") -> Iterator[str]:
  """The address of a store in a process of its own, with an empty bucket called BUCKET."""
  with subprocess.Popen([sys.executable, os.path.abspath(__file__), str(outage)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                        text=True) as process:
    try:
      yield process.stdout.readline().strip()
    finally:
      process.stdin.close()


def _main(outage: str) -> None:
  from gcp_storage_emulator import server as emulator
  from gcp_storage_emulator import storage as stored
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import buckets
  from gcp_storage_emulator.handlers import objects

  logging.disable(logging.ERROR)
  lock = threading.RLock()

  def current(request, store, name=None) -> str:
    """Generation of the object a request is about; "0" where there is none."""
    try:
      found = store.get_file_obj(request.params["bucket_name"], name or request.params["object_id"])
      return found["generation"]
    except NotFound:
      return "0"

  def guarded(handler):
    """With preconditions, one request at a time."""

    def handle(request, response, store, *rest, **named):
      with lock:
        there = current(request, store, request.query.get("name", [None])[0] or request.params.get("object_id", "-"))
        if request.query.get("ifGenerationMatch", [there])[0] != there:
          response.status = http.HTTPStatus.PRECONDITION_FAILED
          _ = request.data  # the body is read all the same: the connection goes on
        elif request.query.get("ifGenerationNotMatch", [""])[0] == there != "0":
          response.status = http.HTTPStatus.NOT_MODIFIED
        else:
          response["x-goog-generation"] = there
          handler(request, response, store, *rest, **named)

    return handle

  def listed(request, response, store, *rest, **named):
    with lock:
      objects.ls(request, response, store)
    if response.status == http.HTTPStatus.OK:
      found = json.loads(response._content)
      begin, end = request.query.get("startOffset", [""])[0], request.query.get("endOffset", [None])[0]
      found["items"] = [one for one in found["items"] if begin <= one["name"] and (end is None or one["name"] < end)]
      response.json(found)

  def moved(request, response, store, *rest, **named):
    with lock:
      source, target = request.params["object_id"], request.params["to"]
      request._parsed_params = {**request.params, "dest_bucket_name": request.params["bucket_name"], "dest_object_id": target}
      objects.copy(request, response, store)
      if response.status == http.HTTPStatus.OK:
        store.delete_file(request.params["bucket_name"], source)

  for _, handlers in emulator.HANDLERS:
    for method, handler in handlers.items():
      if handler.__module__ == objects.__name__:
        handlers[method] = listed if handler is objects.ls else guarded(handler)

  emulator.HANDLERS = ((r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<to>.*[^/]+)$",
                        {"POST": moved}), *emulator.HANDLERS)
  store = stored.Storage(use_memory_fs=True)
  buckets.create_bucket(BUCKET, store)

  class Handler(emulator.RequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments):
      super().__init__(store, *arguments)

    def parse_request(self):
      if not super().parse_request():
        return False
      if os.path.exists(outage):
        self.send_error(503)
        return False
      return True

  class Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, request, client_address):
      """Somebody hung up."""

  with Server(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("http://{}:{}".format(*server.server_address), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
  _main(*sys.argv[1:])
