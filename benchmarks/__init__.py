"""Benchmarks: everstep and its peer side by side in one run, with what the machine could do at best beside them."""
