"""Programs; each is `python -m tools.<name> --help`. Exit codes: 0 fine, 1 differs or unhealthy, 2 cannot read."""
