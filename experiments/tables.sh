# All tables of the documentation, one after the other; see common.sh for how to use it. Where time
# is short, the first are the most important. All that has failed is named at the end.
cd "$(dirname "$0")/.." || exit
SEEDS=${SEEDS:-1 2 3} OUT=${OUT:-tables} status=0
export SEEDS OUT
trap 'kill $!; exit 143' INT TERM HUP

table() {
    "$@" &
    wait $! || status=1
}

for name in criteria w_beta score_images finetune params; do
    table sh experiments/$name.sh "$@"
done
for seeds in "${SEEDS%% *}" "$SEEDS"; do # one seed of each first
    for name in full resnet56; do
        table env SEEDS="$seeds" sh experiments/$name.sh "$@"
    done
done
table env CRITERIA="taylor_fo beta fpgm" sh experiments/finetune.sh "$@"
table sh experiments/rounds.sh "$@"
table sh experiments/vgg.sh "$@"
[ $status = 0 ] || cat "$OUT"/*/failed.txt >&2
exit $status
