"""All tests run on eight CPU devices, so that meshes are real, and compile without optimisation, which is five times
quicker; programs started by a test (train_test.py) are optimised as usual."""

import logging
import os

import pytest

_FLAGS = {"xla_force_host_platform_device_count": "8", "xla_backend_optimization_level": "0",
          "xla_llvm_disable_expensive_passes": "true"}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_given] + [f"--{name}={value}" for name, value in _FLAGS.items() if name not in _given])

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")

# A failed save (checkpoint_test.py) leaves exceptions that asyncio logs when they are freed, in whichever test then runs.
# Formatting a traceback parses Python, and within another parse that is a SystemError there (Python 3.11).
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

# The files that take minutes go first, so that no worker is left with one of them at the end.
_LONG = ("train_test", "router_test", "step_test", "model_test", "fused_experts_test", "mesh_test", "checkpoint_test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
  """MOE_TURN=n/k leaves every k-th of the chosen tests from the n-th on."""
  items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))
  if "MOE_TURN" in os.environ:
    turn, of = map(int, os.environ["MOE_TURN"].split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % of != turn % of])
    items[:] = items[turn % of :: of]


def pytest_terminal_summary(terminalreporter):
  """What tests record with record_property, such as the seconds of a compile, which no bound is set on."""
  for reports in terminalreporter.stats.values():
    for report in reports:
      if getattr(report, "when", "") == "call":
        for name, value in report.user_properties:
          terminalreporter.write_line(f"recorded: {report.nodeid}: {name} {value}")
