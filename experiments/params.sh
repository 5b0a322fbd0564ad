# A share of the parameters, fine-tuned. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for criterion in gfbs slimming random; do
    for seed in $SEEDS; do
        prune gateresnet20 --params 0.27 $(score "$seed" $criterion) --epochs 10 --cosine "$@"
    done
done
finish
