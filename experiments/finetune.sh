# Half of the multiply-adds, fine-tuned, and one control: the shape of GFBS trained from scratch.
# Widths are multiples of 8: such networks train about twice as fast (docs/performance.md).
# CRITERIA chooses among them. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

baselines gateresnet20 "$@"
for criterion in ${CRITERIA:-gfbs taylor slimming l1 random}; do
    for seed in $SEEDS; do
        prune gateresnet20 --macs 0.5 --round_to 8 $(score "$seed" "$criterion") --epochs 10 --cosine "$@"
    done
done
prune gateresnet20 --macs 0.5 --round_to 8 $(score "$FIRST" gfbs) --epochs 10 --cosine --from_scratch "$@"
finish
