"""The real scheduler in simulated time: traces in, a table and a picture out. Starts no process."""
