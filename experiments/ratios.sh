# The paper's networks, and two more, over the pruning ratio, by the published recipes: days on a
# GPU. See common.sh for how to use it.
# shellcheck disable=SC2046  # score says several words
. "$(dirname "$0")/common.sh"

over_p() {
    nets=$1 ratios=$2
    shift 2
    baselines "$nets" "$@"
    for net in $nets; do
        for p in $ratios; do
            for seed in $SEEDS; do
                prune "$net" --p "$p" $(score "$seed" gfbs) "$@"
            done
        done
    done
}
over_p "gatevgg16 gateresnet56" "0.3 0.4 0.5 0.6 0.7 0.8" "$@"
over_p "gatemobilenetv2 gatedensenet40" "0.2 0.3 0.4 0.5 0.6" "$@"
DATA='' BASELINES='' # those are CIFAR-10
over_p "gatevgg16 gateresnet56" "0.2 0.3 0.4 0.5 0.6" --dataset cifar100 "$@"
finish
