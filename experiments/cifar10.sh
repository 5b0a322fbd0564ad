# VGG-16 and ResNet-56 on CIFAR-10 over the pruning ratio. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
for net in gatevgg16 gateresnet56; do
    baseline --net $net "$@"
    for seed in $SEEDS; do
        for p in 0.3 0.4 0.5 0.6 0.7 0.8; do
            prune cifar10 --net $net --p $p --seed "$seed" "$@"
        done
    done
done
table cifar10
