# What the experiments share; each of them reads this file.
#
#     sh experiments/cifar10.sh                                        everything, as published
#     SEEDS="1" sh experiments/cifar10.sh --amp bf16 --epochs 40       one seed, other flags
#     OUT=/tmp/smoke SEEDS="1" sh experiments/cifar10.sh --dataset synthetic --epochs 2
#     BASELINE=checkpoints sh experiments/criteria.sh --epochs 0       prune what is there already
#
# Flags go to every command of an experiment, training of the baseline included; those that only
# pruning knows need BASELINE. A run that was cut off goes on where it was, and one that has its
# result.json is skipped, so a script can simply be started again. Folders are relative to the
# repository. In the environment:
#
#     SEEDS      of the pruning runs; one baseline, of seed 1, serves them all
#     OUT        where everything goes (./checkpoints)
#     BASELINE   a folder or a file with the network to prune; without it, one is trained
#     PYTHON     the interpreter (python)

set -eu
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-1 2 3}
OUT=${OUT:-checkpoints}

run() {
    echo "+ python $*"
    "${PYTHON:-python}" "$@"
}

# baseline FLAGS: train the network to prune.
baseline() {
    [ -n "${BASELINE:-}" ] ||
        run train.py "$@" --output "$OUT" --logdir "$OUT/runs" --resume --skip_finished
}

# prune FOLDER FLAGS: prune it, into a folder of this experiment.
prune() {
    folder=$OUT/$1
    shift
    run gfbs_cifar.py "$@" --checkpoint "${BASELINE:-$OUT}" --output "$folder" \
        --logdir "$folder/runs" --resume --skip_finished
}

# table FOLDER: what came out.
table() {
    run -m tools.results "$OUT/$1" --csv "$OUT/$1/table.csv"
}
