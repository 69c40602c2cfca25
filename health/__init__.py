"""From facts to verdicts: what failed, where, and on what evidence."""
