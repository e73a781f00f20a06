"""The staleness study: the same data, the same tuning, every method (docs/staleness.md)."""
