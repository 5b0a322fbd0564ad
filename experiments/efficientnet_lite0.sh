# EfficientNet-Lite0, a network of others, on photos: DATA=<folder with a photo per class> sh
# experiments/efficientnet_lite0.sh. The network is scored and recalibrated on the photos of every
# second class and evaluated on the others. Flags go to gfbs_imagenet.py; see common.sh for the rest.
. "$(dirname "$0")/common.sh"

DATA=${DATA:?a folder with a folder of photos for each of the 1,000 classes of ImageNet}
NET=experiments.efficientnet_lite0:factory
HALVES=$OUT/$TABLE/halves
PYTHONPATH=. && export PYTHONPATH
even=0
for folder in "$DATA"/*/; do
    class=$(basename "$folder")
    even=$((1 - even))
    mkdir -p "$HALVES/train/$class" "$HALVES/val/$class"
    [ $even = 1 ] && half=train || half=val
    ln -sf "$(realpath "$folder")"/* "$HALVES/$half/$class"
done
[ -f "$TRAINED/experiments.efficientnet_lite0-factory/model_best.pth" ] ||
    queue "$PYTHON" prepare_torch_imagenet_models.py --net "$NET" --output "$TRAINED" \
        --mean 0.498,0.498,0.498 --std 0.502,0.502,0.502
run_queue
for macs in 0.9 0.8 0.7; do
    for criterion in gfbs taylor l1 random; do
        queue "$PYTHON" gfbs_imagenet.py --net "$NET" --data_dir "$HALVES" --macs $macs \
            --criterion $criterion --train_bs 50 --recalibrate 10 --epochs 0 --workers 1 \
            --checkpoint "$TRAINED" --output "$OUT/$TABLE" --resume "$@"
    done
done
finish
