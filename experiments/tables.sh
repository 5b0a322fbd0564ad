# All tables of the documentation, one after the other; see common.sh for how to use it. Where time
# is short, the first are the most important. All that has failed is named at the end.
cd "$(dirname "$0")/.." || exit
all=${SEEDS:-1 2 3} OUT=${OUT:-tables} CRITERIA='' failed=''
export SEEDS CRITERIA OUT
trap 'kill $!; exit 143' INT TERM HUP

# table NAME FLAGS
table() {
    name=$1
    shift
    sh "experiments/$name.sh" "$@" &
    wait $! || failed="$failed$(cat "$OUT/$name/failed.txt")
"
}

SEEDS=$all
for name in criteria w_beta score_images finetune params; do
    table $name "$@"
done
for SEEDS in "${all%% *}" "$all"; do # one seed of each first
    table full "$@"
    table resnet56 "$@"
done
CRITERIA="taylor_fo beta fpgm"
table finetune "$@"
table rounds "$@"
table distill "$@"
table vgg "$@"
[ -z "$failed" ] || { printf 'FAILED in all:\n%s' "$failed" >&2 && exit 1; }
