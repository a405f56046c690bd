"""Processes killed at random moments, over and over: long runs by hand, short ones in the suite."""
