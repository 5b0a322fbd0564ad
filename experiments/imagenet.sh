# ResNet-50 on ImageNet over the pruning ratio: DATA=<path-to-imagenet> sh experiments/imagenet.sh
# Flags go to gfbs_imagenet.py; a smoke test is --epochs 2 --limit_train_batches 2. See
# common.sh for the rest.
JOBS=1 GPUS=0 # a run takes all GPUs
. "$(dirname "$0")/common.sh"

DATA=${DATA:?the folder that has train/ and val/}
[ -f "$TRAINED/resnet50/model_best.pth" ] ||
    queue "$PYTHON" prepare_torch_imagenet_models.py --data_dir "$DATA" --output "$TRAINED"
run_queue
for p in 0.2 0.3 0.4 0.5; do
    for seed in $SEEDS; do
        queue "$PYTHON" gfbs_imagenet.py --data_dir "$DATA" --p $p --seed "$seed" \
            --checkpoint "$TRAINED" --output "$OUT/$TABLE" --resume "$@"
    done
done
finish
