"""Real long text out of source packages: `python -m experiments.corpus` (docs/data.md)."""
