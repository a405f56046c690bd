"""The SQL store: the only writer of status."""
