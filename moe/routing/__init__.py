"""Scores to assignment, and what is measured of it. Functions on arrays; no parameters, no collectives."""
