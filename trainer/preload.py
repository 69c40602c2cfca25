"""Imported by the fork server before it forks ranks, so that a rank starts with everything loaded."""

import trainer.build
import trainer.loop  # noqa: F401  both are wanted for what they load
from trainer.indexed import preload

preload()
