# ResNet-20 and VGG-16 on CIFAR-10: all criteria at equal multiply-adds. Every seed scores on other
# images. NETS, MACS and CRITERIA choose among them. See common.sh for how to use it.
. "$(dirname "$0")/common.sh"
for net in ${NETS:-gateresnet20 gatevgg16}; do
    baseline --net "$net" "$@"
    for seed in $SEEDS; do
        for macs in ${MACS:-0.7 0.5 0.3}; do
            for criterion in ${CRITERIA:-gfbs taylor beta slimming taylor_fo l1 fpgm random}; do
                prune criteria --net "$net" --macs $macs --criterion "$criterion" \
                    --seed "$seed" --score_seed "$seed" "$@"
            done
        done
    done
done
table criteria
