"""The closed forms against drawn failures, and the programs' exit codes."""

import json

import pytest

from tools import plan_snapshots
from tools import snapshot_status


@pytest.mark.parametrize("groups, tolerated, p", [([8] * 64, 1, 0.02), ([4] * 10, 2, 0.2), ([3, 5], 1, 0.3), ([1] * 5, 0, 0.1)])
def test_closed_form_and_simulation_agree(groups, tolerated, p):
  found, error = plan_snapshots.simulated_survival(groups, tolerated, p, 40_000)
  assert abs(found - plan_snapshots.survival(groups, tolerated, p)) < 5 * error  # five standard errors


def test_the_papers_numbers():
  """The notes on REFT: 64 groups of 8, p = 0.02: none 3.2e-5, one parity host 0.51, two copies 0.90."""
  assert plan_snapshots.survival([1] * 512, 0, 0.02) == pytest.approx(3.2e-5, rel=0.02)
  assert plan_snapshots.survival([8] * 64, 1, 0.02) == pytest.approx(0.514, abs=0.001)
  assert plan_snapshots.survival([2] * 256, 1, 0.02) == pytest.approx(0.90, abs=0.005)


def test_the_interval_is_where_least_is_lost():
  best = plan_snapshots.interval(3.0, 10_000.0)
  losses = [plan_snapshots.lost_share(3.0, best * f, 10_000.0, 60.0) for f in (0.8, 1.0, 1.25)]
  assert losses[1] == min(losses)


def test_the_program(capsys):
  assert plan_snapshots.main(["--hosts=64", "--state_gb=100", "--trials=100", "--json"]) == 0
  rows = json.loads(capsys.readouterr().out)["rows"]
  assert [r["scheme"] for r in rows] == ["7+1 code", "2 copies", "one copy", "checkpoints"]
  assert rows[0]["host_memory_gb"] == pytest.approx(2 * 100 / 64 * 8 / 7)
  assert plan_snapshots.main(["--hosts=2", "--state_gb=1", "--parity_hosts=2"]) == 2
  assert "cannot have 2 parity hosts" in capsys.readouterr().out


def test_status_of_a_run_and_of_none(tmp_path, capsys):
  assert snapshot_status.main([str(tmp_path / "none")]) == 2
  events = [{"event": "trainers", "time": 0.0}, {"event": "first_step", "time": 10.0}, {"event": "commit", "time": 20.0},
            {"event": "failure", "time": 25.0, "host": 1, "kind": "signal 9", "step": 7, "phase": "step"},
            {"event": "recovery", "time": 25.1, "tier": "memory", "step": 6}, {"event": "first_step", "time": 31.0},
            {"event": "commit", "time": 40.0}]
  (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
  live = {"generation": 3, "committed": 9, "time": 0.0, "parity_hosts": 1, "hosts": 2,
          "groups": [{"hosts": [0, 1], "holding": [0]}]}
  (tmp_path / "snapshots.json").write_text(json.dumps(live))
  assert snapshot_status.main([str(tmp_path), "--json"]) == 1
  found = json.loads(capsys.readouterr().out)
  assert found["protection"] == "degraded" and found["goodput"]["lost work"] == 5.0 and found["goodput"]["restart"] == 6.0
  live["groups"][0]["holding"] = [0, 1]
  (tmp_path / "snapshots.json").write_text(json.dumps(live))
  assert snapshot_status.main([str(tmp_path)]) == 0
  assert "protected" in capsys.readouterr().out
