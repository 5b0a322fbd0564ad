# ResNet-20 and VGG-16 on CIFAR-10: the weight of the beta term, from the Taylor term alone to the
# beta term alone. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
for net in gateresnet20 gatevgg16; do
    baseline --net $net "$@"
    for seed in $SEEDS; do
        for w in 0 0.01 0.03 0.05 0.1 0.3 1; do
            prune beta/w$w --net $net --macs 0.7 --w_beta $w --seed "$seed" "$@"
        done
        prune beta/only --net $net --macs 0.7 --beta_only --seed "$seed" "$@"
    done
done
table beta
