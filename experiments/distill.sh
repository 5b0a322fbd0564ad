# Half of the multiply-adds, fine-tuned with and without the unpruned network as the teacher, from
# the cut of finetune.sh. See common.sh for how to use it.
# shellcheck disable=SC2046,SC2086  # several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for seed in $SEEDS; do
    for how in "" "--distill 0.5"; do
        prune gateresnet20 --macs 0.5 --round_to 8 $(score "$seed" gfbs) --epochs 10 --cosine $how "$@"
    done
done
finish
