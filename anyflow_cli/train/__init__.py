"""Training: one loop (``trainer``), what differs between stages (``objectives``), and the state of a run."""
