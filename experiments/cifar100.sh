# VGG-16 and ResNet-56 on CIFAR-100 over the pruning ratio. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
for net in gatevgg16 gateresnet56; do
    baseline --net $net --dataset cifar100 "$@"
    for seed in $SEEDS; do
        for p in 0.2 0.3 0.4 0.5 0.6; do
            prune cifar100 --net $net --dataset cifar100 --p $p --seed "$seed" "$@"
        done
    done
done
table cifar100
