"""Snapshots: staged to shared memory, persisted in the background, verified before they are loaded."""
