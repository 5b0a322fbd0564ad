# ResNet-56 fine-tuned, with Torch-Pruning's Taylor importance beside our criteria. See common.sh
# for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

baselines gateresnet56 "$@"
for seed in $SEEDS; do
    for criterion in gfbs l1 random; do
        prune gateresnet56 --macs 0.5 $(score "$seed" $criterion) --epochs 10 --cosine "$@"
    done
    SCRIPT="-m experiments.torch_pruning_taylor"
    prune gateresnet56 --macs 0.5 --seed "$seed" --score_seed "$seed" --epochs 10 --cosine "$@"
    SCRIPT=
done
finish
