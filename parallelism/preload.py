"""Importing this loads all that a worker needs; for a forkserver's preload list."""

import atexit
import gc

from parallelism.warm import warm_imports

warm_imports()
# A child that collects garbage would walk, and so copy, every object that was loaded here.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
