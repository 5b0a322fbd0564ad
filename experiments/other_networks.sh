# MobileNetV2 and DenseNet-40 on CIFAR-10 over the pruning ratio. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
for net in ${NETS:-gatemobilenetv2 gatedensenet40}; do
    baseline --net "$net" "$@"
    for seed in $SEEDS; do
        for p in ${RATIOS:-0.2 0.3 0.4 0.5 0.6}; do
            prune other_networks --net "$net" --p "$p" --seed "$seed" "$@"
        done
    done
done
table other_networks
