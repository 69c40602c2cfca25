"""Meshes, sharded models and pipeline schedules, on torchtitan."""
