"""What may change when an existing run is resumed: how it runs may, what it computes may not."""

from __future__ import annotations

import msgspec

from configs.schema import JobConfig


class Change(msgspec.Struct, frozen=True):
    """One `section.key` that differs; why says what the change means, and what to do where it is refused."""

    key: str
    old: object
    new: object
    allowed: bool
    why: str


_NEW_RUN = "to try it, start another run under another run.name"
_ALLOWED = {
    "parallelism": "the snapshot is resharded; sums are taken in another order, so losses agree within tolerance",
    "cluster": "the machines are no part of the run",
    "checkpoint": "how often state is saved does not change the training",
    "validation": "measuring does not change the training; losses on other samples do not compare with earlier ones",
    "evaluation": "evaluating does not change the training",
    "s3": "where snapshots are also kept does not change the training",
    "health": "how failures are noticed does not change the training",
    "integrity": "how often numbers are checked does not change them",
    "numbers": "later steps are judged by it; what was skipped or left out stays so",
    "telemetry": "what is logged does not change the training",
    "alerts": "who is told does not change the training",
    "run.dir": "the run may have been moved",
    "training.steps": "the run ends at another step; a decaying learning rate follows the new total from here on",
    "training.microbatch_size": "the global batch stays; sums are taken in another order, within tolerance",
    "training.compile": "the same computation, compiled or not, within tolerance",
    "training.activation_checkpoint": "activations are recomputed instead of kept; the result stays",
    "precision.reuse_weights": "a weight is rounded once or several times, to the same numbers",
    "data.prefetch_steps": "reading ahead does not change what is read",
}
_REFUSED = {
    "run.name": "the name is the run's identity",
    "run.seed": "the seed fixes the order of the data",
    "model": "the saved weights belong to the old model",
    "data.sets": "step s must read the same samples after a restart as before it",
    "data.leave_out": "step s must read the same samples after a restart as before it",
    "data.tokenizer": "the model has learnt the old token ids",
    "training.seq_len": "samples are cut to this length, so every later step would read other data",
    "training.global_batch_size": "it decides which samples step s reads",
    "training.max_grad_norm": "it changes the updates",
    "training.z_loss": "it changes the updates",
    "optimizer": "it changes the updates",
    "ema": "the average is one over the whole run",
    "precision": "it changes the arithmetic",
}


def describe_changes(old: JobConfig, new: JobConfig) -> list[Change]:
    """Every key in which two configurations differ, with a verdict for resuming the run of old with new."""
    changes = []
    for section in msgspec.structs.fields(JobConfig):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for field in msgspec.structs.fields(section.type):
            was, becomes = getattr(before, field.name), getattr(after, field.name)
            if was != becomes:
                key = f"{section.name}.{field.name}"
                changes.append(Change(key, was, becomes, *resume_rule(key)))
    return changes


def resume_rule(key: str) -> tuple[bool, str]:
    """Whether `section.key` may change on a resume, and why."""
    section = key.partition(".")[0]
    for name in (key, section):
        if name in _ALLOWED:
            return True, _ALLOWED[name]
        if name in _REFUSED:
            return False, f"{_REFUSED[name]}; {_NEW_RUN}"
    raise AssertionError(f"configs.changes has no rule for {key}")
