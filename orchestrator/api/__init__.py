"""What can be asked of a home, as JSON values: here in this process, or of `chorus api` over HTTP."""
