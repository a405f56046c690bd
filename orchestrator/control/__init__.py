"""The controller: the loop that moves every job on."""
