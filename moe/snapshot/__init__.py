"""Snapshots of the training state in the memory of hosts, outside the trainer, coded across hosts (REFT, arXiv 2310.12670 v1).

    supervisor  one a host: starts and watches the other two, no JAX
    keeper      one a host: owns the memory, digests and parity; starts before the trainer and outlives it, no JAX
    leader      a thread of host 0's supervisor: generations, commits, the choice of what to restore
    client      in the trainer: copies the state into the keeper's memory and back; the only file here that knows JAX

docs/faults.md says what is promised.
"""
