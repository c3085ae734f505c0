"""The supervisor, which on host 0 is killed between prepare and commit.

When MOE_TEST_COMMIT=FILE exists, with the numbers of some hosts in it, the next commit is told to those alone; then this
process, the leader within it, and its snapshot process are gone.
"""

import json
import os
import pathlib
import signal
import sys

from moe.snapshot import leader
from moe.snapshot import supervisor

FILE = pathlib.Path(os.environ["MOE_TEST_COMMIT"])


def tell(real):
  def function(self, message, hosts=None):
    if message.get("message", {}).get("do") != "commit" or not FILE.exists():
      return real(self, message, hosts)
    told = json.loads(FILE.read_text())
    FILE.unlink()
    real(self, message, told)
    os.kill(os.getpid(), signal.SIGKILL)

  return function


if __name__ == "__main__":
  leader.Leader._tell = tell(leader.Leader._tell)
  sys.exit(supervisor.main(trainer=("-m", os.environ["MOE_TRAINER"])))
