# VGG-16 on CIFAR-10: everything cut at once, layer by layer, in rounds, and the pruned shape
# trained from scratch. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
baseline --net gatevgg16 "$@"
for seed in $SEEDS; do
    for p in 0.5 0.7; do
        for how in "" --smooth "--steps 5" --from_scratch; do
            # shellcheck disable=SC2086  # no word, one or two
            prune smooth --net gatevgg16 --p $p --seed "$seed" $how "$@"
        done
    done
done
table smooth
