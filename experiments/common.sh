# What the experiments share; each of them reads this file, and is one table.
#
#     sh experiments/tables.sh                           all tables, one after the other
#     JOBS=8 sh experiments/finetune.sh                  one of them, eight runs at a time
#     OUT=/tmp/smoke SEEDS=1 sh experiments/tables.sh --dataset synthetic --epochs 2
#
# Flags go to every command. A run that is finished is skipped and one that was cut off goes on, so
# after any interruption the same command is simply started again. A run that fails stops no other;
# failed commands are named at the end, and in $OUT/<table>/failed.txt, and the exit code is 1.
# Relative folders start at the repository. In the environment:
#
#     DATA       folder with train/<class>/*.png and test/<class>/*.png; without it, CIFAR-10 is
#                downloaded
#     BASELINES  folder with resnet20.th and resnet56.th of akamaster/pytorch_resnet_cifar10, which
#                are trained with ImageNet's mean and deviation; without it, baselines are trained
#     OUT        where everything goes (tables)
#     SEEDS      of the runs that are repeated (1 2 3)
#     JOBS       runs at a time (1); with GPUs each has one to itself, or shares it with others
#                where there are fewer
#     GPUS       how many GPUs to use (all; 0 with none)
#     THREADS    CPU threads of a run, on which its bits depend (1 with several jobs, else 2)
#     FAST       flags that make training faster (--amp bf16)
#     PYTHON     the interpreter (python)

set -eu
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-1 2 3} OUT=${OUT:-tables} JOBS=${JOBS:-1} PYTHON=${PYTHON:-python}
FAST=${FAST---amp bf16}
FIRST=${SEEDS%% *} # for what is not repeated
TRAINED=$OUT/baselines
TABLE=$(basename "$0" .sh)
OMP_NUM_THREADS=${THREADS:-$((JOBS > 1 ? 1 : 2))}
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || :)}
QUEUE=$OUT/$TABLE/queue.txt FAILED=$OUT/$TABLE/failed.txt
export OMP_NUM_THREADS GPUS FAILED
mkdir -p "$OUT/$TABLE"

# Every process of the table holds this lock: after a kill, the next start waits for those left.
exec 9>"$OUT/lock"
flock --nonblock 9 || { echo "waiting for earlier runs below $OUT to end" && flock 9; }
: >"$QUEUE" >"$FAILED"

# queue COMMAND: to be run by the next run_queue; a command is a line, every word in quotes.
queue() {
    printf '"%s"' "$1" >>"$QUEUE"
    shift
    printf ' "%s"' "$@" >>"$QUEUE"
    echo >>"$QUEUE"
}

# run_queue: run what is queued, JOBS at a time, and wait for all of it. Runs tell of themselves in
# their log.txt; here they show only what goes wrong.
run_queue() {
    # In a session of its own, so that a signal to this script can be passed on to all of them.
    setsid xargs --no-run-if-empty -L 1 -P "$JOBS" --process-slot-var=SLOT sh -c '
        [ "$GPUS" = 0 ] || set -- "$@" --gpu $((SLOT % GPUS))
        echo "+ $*"
        said=$("$@" 2>&1 >/dev/null) && failed= || failed="exit code $?: $*"
        [ -z "$said" ] || echo "$said" >&2
        [ -z "$failed" ] || { echo "$failed" >>"$FAILED"; exit 1; }' sh <"$QUEUE" &
    trap 'kill -- -$!; exit 143' INT TERM HUP
    wait $! || :
    trap - INT TERM HUP
    : >"$QUEUE"
}

# on_cifar SCRIPT FLAGS: queue a command; without DATA, the script downloads CIFAR-10.
on_cifar() {
    script=$1
    shift
    [ -z "${DATA:-}" ] || set -- --dataset folder --data_dir "$DATA" "$@"
    # shellcheck disable=SC2086  # several words
    queue "$PYTHON" $script $FAST --resume "$@"
}

# published NET: the file of BASELINES with this network, if there is one.
published() {
    file=${BASELINES:-}/${1#gate}.th
    [ ! -f "$file" ] || echo "$file"
}

# baselines NETS FLAGS: train the networks that BASELINES lacks, and wait for them.
baselines() {
    nets=$1
    shift
    for net in $nets; do
        [ -n "$(published "$net")" ] ||
            on_cifar train.py --net "$net" --output "$TRAINED" "$@"
    done
    run_queue
}

# prune NET FLAGS: queue a run into the folder of this table. SCRIPT may name another script.
prune() {
    net=$1
    shift
    if [ -n "$(published "$net")" ]; then
        set -- --checkpoint "$(published "$net")" \
            --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 "$@"
    else
        set -- --checkpoint "$TRAINED" "$@"
    fi
    on_cifar "${SCRIPT:-gfbs_cifar.py}" --net "$net" --output "$OUT/$TABLE" "$@"
}

# score SEED CRITERION: flags with which criteria that look at a batch see another with every seed.
score() {
    case $2 in
    gfbs | taylor | taylor_fo) echo "--seed $1 --criterion $2 --score_seed $1" ;;
    *) echo "--seed $1 --criterion $2" ;;
    esac
}

# seeds_of CRITERION: those that make a difference before any training.
seeds_of() {
    case $1 in
    gfbs | taylor | taylor_fo | random) echo "$SEEDS" ;;
    *) echo "$FIRST" ;;
    esac
}

# finish: run what is left, say where it is, and name what has failed.
finish() {
    run_queue
    echo "results in $OUT/$TABLE"
    [ ! -s "$FAILED" ] || { sed 's/^/failed with /' "$FAILED" >&2 && exit 1; }
}
