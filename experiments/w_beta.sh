# The weight of the beta term, from the Taylor term alone to the beta term alone, right after the
# cut. See common.sh for how to use it.
# shellcheck disable=SC2046,SC2086  # several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for how in taylor "gfbs 0.01" "gfbs 0.03" "gfbs 0.05" "gfbs 0.1" "gfbs 0.3" "gfbs 1" beta; do
    criterion=${how% *} weight=${how#"$criterion"}
    for seed in $(seeds_of $criterion); do
        prune gateresnet20 --macs 0.7 $(score "$seed" $criterion) ${weight:+--w_beta $weight} \
            --epochs 0 --recalibrate 50 "$@"
    done
done
finish
