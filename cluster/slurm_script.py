"""The script that is handed to sbatch: a pure function of the request, written to be read by an administrator.

Whatever a user or a site names is quoted where it stands; the shell code itself is constant.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from cluster.backend import JobRequest
from cluster.rundir import safe_name
from cluster.slurm_exclude import EXCLUDE_FILE

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")

_BEGIN = """\
asked=0 told=0 cancelled=0
child=
say() {
  echo "$(date '+%F %T') everstep: $1"
  scontrol update JobId="$SLURM_JOB_ID" Comment="everstep run $run: $1" 2>/dev/null || true
}
pass_on() {
  if [ -n "$child" ] && [ "$told" -lt "$asked" ]; then
    told=$((told + 1))
    kill -TERM "$child"
  fi
}
# SLURM wants the machines back: the run saves its state and leaves. It is told once; a second signal would not wait.
trap 'asked=$((asked > 1 ? asked : 1)); pass_on' TERM USR1
# `everstep cancel`: the same, and it does not come back. Said twice, it does not wait either.
trap 'cancelled=$((cancelled + 1)); asked=$((cancelled > asked ? cancelled : asked)); pass_on' USR2

# The last supervisor's hold on the run ends with its host; a file server may need minutes to see that.
for minute in 1 2 3 4 5 6 7 8 9 10; do
  if [ "$asked" != 0 ] || flock -w 60 "$run_dir/supervisor.lock" true; then break; fi
done

# The supervisor. One that fails by itself is started again: training went on, and the next one takes over.
code=75
for attempt in 1 2 3 4 5; do
  if [ "$asked" != 0 ]; then break; fi
  if [ -e "$run_dir/supervisor-error.log" ]; then
    mv -f "$run_dir/supervisor-error.log" "$run_dir/supervisor-error.old.log"
  fi
  "${train[@]}" &
  child=$!
  pass_on
  wait "$child"
  # A signal interrupts the wait.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"
  code=$?
  child=
  if [ "$asked" != 0 ]; then
    # Told to leave before it had begun.
    if [ "$code" -eq 143 ]; then code=75; fi
    break
  fi
  if [ "$code" -le 128 ] && ! { [ "$code" -eq 1 ] && [ -e "$run_dir/supervisor-error.log" ]; }; then break; fi
  say "the supervisor ended with $code (attempt $attempt)"
done
"""

_REQUEUE = """\
# Back into the queue, without the nodes that this run has no use for any more.
requeue() {
  if [ "$cancelled" != 0 ]; then
    say "cancelled; its state is saved"
    scancel "$SLURM_JOB_ID"
    return
  fi
  say "$1"
  scontrol requeue "$SLURM_JOB_ID" || return
  exclude=$exclude_at_site
  if [ -s "$run_dir/EXCLUDE_FILE" ]; then exclude="$exclude${exclude:+,}$(cat "$run_dir/EXCLUDE_FILE")"; fi
  if [ -n "$exclude" ]; then scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$exclude"; fi
}
""".replace("EXCLUDE_FILE", EXCLUDE_FILE)

_END_SINGLE = """\
case "$code" in
  0) say "done" ;;
  75) requeue "goes on from its newest snapshot" ;;
  *) say "stopped with $code and not requeued; $run_dir has the reason" ;;
esac
exit "$code"
"""

_END_CHAIN = """\
# Jobs of a chain wait for each other. Within this time of its end, a job leaves the rest to the next one.
time_is_up() {
  end=$(SLURM_TIME_FORMAT=standard squeue -h -j "$SLURM_JOB_ID" -o %e) && end=$(date -d "$end" +%s) || return 1
  [ $((end - $(date +%s))) -le "$near_end_s" ]
}
end_chain() { scancel --state=PENDING "$SLURM_ARRAY_JOB_ID"; }

case "$code" in
  0)
    say "done"
    end_chain
    ;;
  75)
    if [ "$cancelled" = 0 ] && time_is_up; then
      say "time is up; $((chain - SLURM_ARRAY_TASK_ID)) more jobs go on from its newest snapshot"
    else
      requeue "goes on from its newest snapshot"
    fi
    ;;
  *)
    say "stopped with $code and not requeued; $run_dir has the reason"
    end_chain
    ;;
esac
exit "$code"
"""


def render_script(request: JobRequest, python: str, left_out: Sequence[str] = ()) -> str:
    """The whole script. python: the interpreter on the nodes; left_out: nodes that earlier jobs of the run excluded.

    Raises:
        ValueError: if a path or an option has a control character in it.
    """
    slurm, run = request.profile.slurm, safe_name(request.config.run.name, "run.name")
    exclude = ",".join([*filter(None, [slurm.exclude]), *(safe_name(node, "node") for node in left_out)])
    nodes, spares = request.config.cluster.nodes, request.config.cluster.spares
    train = [python, "-m", "cluster.cli", "run", request.config_path, *request.overrides]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Everstep run {run}: {nodes} nodes train, {spares} stand by. Written by `everstep submit`.",
            *(f"#SBATCH {_quoted_option(name, value)}" for name, value in _options(request, exclude)),
            *(f"#SBATCH {_quoted_option(*_split(option))}" for option in slurm.options),
            "",
            "set -u",
            *_site(request),
            f"run={shlex.quote(run)}",
            f"run_dir={_quoted(str(request.run_dir))}",
            f"exclude_at_site={_quoted(exclude)}",
            f"train=({' '.join(_quoted(word) for word in train)})",
            *([f"chain={slurm.chain}", f"near_end_s={slurm.grace_s + 90}"] if slurm.chain > 1 else []),
            "",
            _BEGIN + _REQUEUE + (_END_CHAIN if slurm.chain > 1 else _END_SINGLE),
        ]
    )


def _options(request: JobRequest, exclude: str) -> Iterator[tuple[str, str]]:
    slurm, cluster, run = request.profile.slurm, request.config.cluster, request.config.run.name
    own = {option.removeprefix("--").partition("=")[0] for option in slurm.options}
    yield "job-name", run
    yield "comment", f"everstep run {run} in {request.run_dir}"
    yield "nodes", str(cluster.nodes + cluster.spares)
    yield "ntasks-per-node", "1"
    for name in ("partition", "account", "qos", "reservation", "constraint", "gres", "switches"):
        if value := getattr(slurm, name):
            yield name, value
    if exclude:
        yield "exclude", exclude
    if slurm.time_limit:
        yield "time", slurm.time_limit
    if slurm.exclusive:
        yield "exclusive", ""
        if not own & {"mem", "mem-per-cpu", "mem-per-gpu"}:
            yield "mem", "0"
    if slurm.chain > 1:
        yield "array", f"1-{slurm.chain}%1"
    # The job outlives its nodes, and comes back; its shell alone is warned before the time is up or it is preempted.
    yield "no-kill", ""
    yield "requeue", ""
    yield "signal", f"B:TERM@{slurm.grace_s}"
    yield "open-mode", "append"
    yield "chdir", str(request.working_dir)
    yield "output", f"{_no_pattern(str(request.run_dir))}/slurm-{'%A_%a' if slurm.chain > 1 else '%j'}.out"


def _site(request: JobRequest) -> Iterator[str]:
    slurm, variables = request.profile.slurm, request.profile.variables
    for module in slurm.modules:
        yield f"module load {_quoted(module)}"
    for line in slurm.setup:
        if _CONTROL.search(line):
            raise ValueError(f"slurm.setup: {line!r} is not one line")
        yield line
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"environment: {name!r} is no name of a variable")
        yield f"export {name}={_quoted(value)}"


def _split(option: str) -> tuple[str, str]:
    name, _, value = option.removeprefix("--").partition("=")
    return name, value


def _quoted_option(name: str, value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError(f"slurm.options: --{name} is no option of sbatch")
    return f"--{name}={_quoted(value)}" if value else f"--{name}"


def _quoted(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError(f"{text!r} has a control character in it; a job script cannot hold it")
    return shlex.quote(text)


def _no_pattern(path: str) -> str:
    """A path in which SLURM finds no pattern to fill in. It takes a backslash as leave to fill in none at all."""
    if "\\" in path:
        raise ValueError(f"{path!r}: SLURM cannot write to a path with a backslash; choose another run.dir")
    return path.replace("%", "%%")
