# How many images the score needs, right after the cut. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for images in 32 64 128 200 500 1000 2000; do
    for seed in $SEEDS; do
        prune gateresnet20 --macs 0.7 $(score "$seed" gfbs) --score_images $images \
            --epochs 0 --recalibrate 50 "$@"
    done
done
finish
