"""Charts, comparisons, FLOPs."""
