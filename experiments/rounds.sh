# One shot, block by block, and in rounds, in 20 epochs each: --smooth fine-tunes once per block
# that loses channels, as all 9 of ResNet-20 do, so 9 x 1 + 11; --steps 5 takes 5 x 2 + 10. See
# common.sh for how to use it.
# shellcheck disable=SC2046,SC2086  # several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for seed in $SEEDS; do
    for how in "--epochs 20" "--epochs 20 --smooth --smooth_epochs 1 --final_epochs 11" \
        "--epochs 10 --steps 5 --step_epochs 2"; do
        prune gateresnet20 --macs 0.5 $(score "$seed" gfbs) --cosine $how "$@"
    done
done
finish
