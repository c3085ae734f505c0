"""Balance scopes on the two-domain quickstart model: a document, a data shard, the micro-batch, shuffled.

    python -m tools.experiments.quickstart_scopes --seeds=3 --steps=100

The coefficient is ten times the default, so that the scopes have something to differ in. Prints validation bits per byte,
load, balance and how much the experts tell about the domain.
"""

from __future__ import annotations

from tools.experiments import short_runs

_STRONG = "--gin.Router.balance_coef=0.1"
_SCOPES = ("sequence", "microbatch", "shuffle", "global")
VARIANTS = {scope: [_STRONG, f'--gin.Router.balance_scope="{scope}"'] for scope in _SCOPES}


def main() -> None:
  short_runs.compare("quickstart_scopes", __doc__, VARIANTS, [
      "The paper's claim is that wider scopes let experts specialise by domain, at equal global balance, and lower the loss;",
      "its models train for 60 k steps. Here a micro-batch has 16 sequences, and a data shard half of them."])


if __name__ == "__main__":
  main()
