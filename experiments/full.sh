# The published recipe in full. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for seed in $SEEDS; do
    prune gateresnet20 --macs 0.5 $(score "$seed" gfbs) --epochs 160 "$@"
done
finish
