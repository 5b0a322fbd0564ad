# ResNet-50 on ImageNet over the pruning ratio: DATA_DIR=<path-to-imagenet> sh experiments/imagenet.sh
# Flags go to gfbs_imagenet.py; a smoke test is --epochs 2 --limit_train_batches 2. LAUNCH may be
# "torchrun --nproc_per_node=8 --" in the place of python. See common.sh for the rest.
. "$(dirname "$0")/common.sh"
data=${DATA_DIR:?the folder that has train/ and val/}
[ -n "${BASELINE:-}" ] || [ -f "$OUT/resnet50/model_best.pth" ] ||
    run prepare_torch_imagenet_models.py --data_dir "$data" --output "$OUT"
for seed in $SEEDS; do
    for p in 0.2 0.3 0.4 0.5; do
        # shellcheck disable=SC2086  # a command of several words
        ${LAUNCH:-${PYTHON:-python}} gfbs_imagenet.py --data_dir "$data" --p $p --seed "$seed" "$@" \
            --checkpoint "${BASELINE:-$OUT}" --output "$OUT/imagenet" \
            --logdir "$OUT/imagenet/runs" --resume --skip_finished
    done
done
table imagenet
