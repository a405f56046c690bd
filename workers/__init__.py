"""Workers compute: one frozen base, many adapters, one tick at a time."""
