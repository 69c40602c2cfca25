"""Supervisor, agents, schedulers and the command line."""
