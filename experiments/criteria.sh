# All criteria at equal multiply-adds, right after the cut, and with BatchNorm's statistics
# estimated anew. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

nets="gateresnet56 gateresnet20"
baselines "$nets" "$@"
for net in $nets; do
    for macs in 0.7 0.5 0.3; do
        for criterion in gfbs taylor beta slimming taylor_fo l1 fpgm random; do
            for seed in $(seeds_of $criterion); do
                prune "$net" --macs $macs $(score "$seed" $criterion) \
                    --epochs 0 --recalibrate 50 "$@"
            done
        done
    done
done
finish
