# What the SLURM scripts share; see docs/cluster.md.

# run COMMAND: run it as the only work of this job, and leave with its exit code. On USR1, which
# --signal sends before the time limit, the command saves and stops, and the job goes back into the
# queue. On TERM, which scancel sends, the command saves and stops, and the job ends.
run() {
    again=
    "$@" &
    child=$!
    trap 'again=yes; kill -TERM $child' USR1
    trap 'kill -TERM $child' TERM
    wait $child && code=0 || code=$?
    while kill -0 $child 2>/dev/null; do # a signal has ended the wait, and not the command
        wait $child && code=0 || code=$?
    done
    [ -z "$again" ] || [ $code = 0 ] || scontrol requeue "$SLURM_JOB_ID"
    exit $code
}
