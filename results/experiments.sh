#!/usr/bin/env bash
# Today's counterparts of version 1's experiments, by the names of README.md.
#
#   bash results/experiments.sh                    list the names
#   bash results/experiments.sh NAME [OPTIONS]     run one; OPTIONS go to resizer_compare: --dry_run prints its commands
#
# An experiment goes on where it was interrupted. RUNS is the folder of the runs (runs). WOOF is a folder of Imagewoof's
# training images, a fifth of which `recipe` and `tuning` validate on; by default where fastai keeps them.
set -e
runs=${RUNS:-runs}
woof=${WOOF:-$HOME/.fastai/data/imagewoof2-320/train}
controls=bilinear,antialias,blurred,none

name=${1:-}
shift $(( $# > 0 ))

compare() {   # NAME OPTIONS...
    resizer_compare --runs "$runs" --name "$1" "${@:2}"
}

variants() {   # Register variants of the learned resizer under names of their own, for --module
    mkdir -p "$runs"
    cat > "$runs/resizer_variants.py" <<'PYTHON'
from functools import partial
from resizer_fastai.resizer import Resizer, resizers

resizers['from_zero'] = partial(Resizer, zero_init=True)
resizers['blocks_1'] = partial(Resizer, num_resblocks=1)
resizers['blocks_4'] = partial(Resizer, num_resblocks=4)
resizers['kernels_32'] = partial(Resizer, num_kernels=32)
PYTHON
    export PYTHONPATH="$runs${PYTHONPATH:+:$PYTHONPATH}"
}

small() {   # NAME SIZE OUT OPTIONS...: Imagewoof with a ResNet-18
    variants
    compare "$1" --data imagewoof-320 --arch resnet18 --size "$2" --out "$3" --epochs 6 --cache disk --module resizer_variants "${@:4}"
}

large() {   # NAME OPTIONS...: Imagewoof at 448 to 224 pixels, one seed
    compare "$1" --data imagewoof-320 --size 448 --out 224 --epochs 20 --cache disk --seeds 0 "${@:2}"
}

settings() {   # PREFIX OPTIONS... < lines of SETTING OPTIONS: each on training images only
    while read -r setting line; do
        # shellcheck disable=SC2086
        compare "$1/$setting" --data "$woof" --valid_pct 0.2 --epochs 6 --cache disk --seeds 0,1,2 "${@:2}" $line "${more[@]}" < /dev/null
    done
}

more=("$@")
case $name in
sample)
    compare sample --resizers $controls,muller,learned --seeds 0,1,2 --data sample --arch resnet18 --size 128 --out 64 \
        --epochs 6 --bs 25 "$@";;
woof-128-64)
    small woof-128-64 128 64 --resizers $controls,muller,learned,from_zero --seeds 0,1,2 "$@";;
woof-192-96)
    small woof-192-96 192 96 --resizers $controls,muller,learned,from_zero --seeds 0,1,2,3,4 "$@";;
woof-192-96-fresh)
    small woof-192-96-fresh 192 96 --resizers from_zero --seeds 5,6,7,8,9,10,11,12,13,14 "$@";;
woof-192-96-learned)
    small woof-192-96-learned 192 96 --resizers learned --seeds 25,26,27,28,29,30,31,32,33,34 "$@";;
woof-192-96-muon)
    compare woof-192-96-muon --data imagewoof-320 --arch resnet50 --size 192 --out 96 --epochs 6 --cache disk \
        --recipe muon --lr_mult 0.1 --resizers learned --seeds 15,16,17,18,19,20,21,22,23,24 "$@";;
woof-448-224)
    large woof-448-224 --arch resnet50 --resizers bilinear "$@";;
woof-448-224-muon)
    large woof-448-224-muon --arch resnet50 --recipe muon --resizers bilinear "$@";;
woof-448-224-xresnet50)
    large woof-448-224-xresnet50 --arch xresnet50 --resizers bilinear "$@";;
recipe)
    settings recipe --size 192 --out 96 --resizers bilinear <<'LIST'
recipe           --arch resnet50
lr-1e-3          --arch resnet50 --lr 1e-3
sgd-0.05         --arch resnet50 --opt sgd --lr 0.05
flat_cos         --arch resnet50 --schedule flat_cos
bs-32            --arch resnet50 --bs 32
xresnet50        --arch xresnet50
resnet50d        --arch timm/resnet50d
zero+fan_in      --arch resnet50 --recipe muon --opt adamw --schedule one_cycle --lr 3e-3
min_scale-0.6    --arch resnet50 --recipe muon --opt adamw --schedule one_cycle --lr 3e-3 --min_scale 0.6
muon-3e-3        --arch resnet50 --recipe muon --lr 3e-3
muon-8e-3        --arch resnet50 --recipe muon
muon-1.6e-2      --arch resnet50 --recipe muon --lr 1.6e-2
muon+one_cycle   --arch resnet50 --recipe muon --schedule one_cycle --lr 3e-3
muon+learned     --arch resnet50 --recipe muon --resizers learned
LIST
    ;;
tuning)
    variants
    settings tuning --arch resnet18 --size 128 --out 64 --module resizer_variants <<'LIST'
learned          --resizers learned,from_zero,blocks_1,blocks_4,kernels_32
lr_mult-0.1      --resizers learned --lr_mult 0.1
lr_mult-3        --resizers learned --lr_mult 3
LIST
    ;;
'')
    sed -n 's/^\([a-z][a-z0-9-]*\))$/\1/p' "$0";;
*)
    echo "no experiment $name; there are:" $(bash "$0") >&2
    exit 2;;
esac
