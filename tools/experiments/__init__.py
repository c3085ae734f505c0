"""Experiments: each file is one command that prints a table; minutes on two cores."""
