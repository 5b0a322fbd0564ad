# VGG-16 after a short training: GFBS at two ratios, others at the multiply-adds that it reached.
# See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

TRAINED=$OUT/vgg/baselines
baselines gatevgg16 --epochs 30 --cosine "$@"
for p in 0.5 0.7; do
    prune gatevgg16 --p $p $(score "$FIRST" gfbs) --epochs 10 --cosine "$@"
done
run_queue
for result in "$OUT"/vgg/*/gfbs_p0.7*/result.json; do
    [ -f "$result" ] || break # it has failed
    macs=$("$PYTHON" -c 'import json, sys; macs = json.load(open(sys.argv[1]))["cost"]["macs"]
print(round(macs["after"] / macs["before"], 4))' "$result")
    for criterion in l1 random; do
        prune gatevgg16 --macs "$macs" $(score "$FIRST" $criterion) --epochs 10 --cosine "$@"
    done
done
finish
