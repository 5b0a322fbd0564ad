# ResNet-20 on CIFAR-10: how many images the score needs. Every seed scores on other images. See
# common.sh for how to use it.
. "$(dirname "$0")/common.sh"
baseline --net gateresnet20 "$@"
for seed in $SEEDS; do
    for images in 32 64 128 200 500 1000 2000; do
        prune batch_size/$images --net gateresnet20 --macs 0.7 --score_images $images \
            --seed "$seed" --score_seed "$seed" "$@"
    done
done
table batch_size
