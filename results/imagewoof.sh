#!/usr/bin/env bash
# The matrix on Imagewoof: ResNet-50 from random weights, 20 epochs, in two settings that were fixed beforehand; then all of it with 5 epochs.
#
#   bash results/imagewoof.sh [OPTIONS of resizer_compare]                                          e.g. --cache device
#   RUNS=runs/try bash results/imagewoof.sh --limit 100 --epochs 1 --arch resnet18    a try, in a folder of its own
#
# It wants timm for its optimizer (pip install "resizer_fastai[timm]"), and goes on where it was interrupted. RUNS is where the runs go (runs), DATA what is trained on (imagewoof-320).
set -e -o pipefail
runs=${RUNS:-runs} data=${DATA:-imagewoof-320} learned=learned,learned+zero_init=1

cells() {   # EPOCHS SIZE OUT ARMS SEEDS OPTIONS...
    resizer_compare --data "$data" --arch resnet50 --body_init fastai --opt muon --schedule flat_cos --lr 8e-3 --epochs "$1" --runs "$runs" --size "$2" --out "$3" --name "$(basename "$data")-$2-$3-$1" --arms "$4" --seeds "$5" "${@:6}"
}

matrix() {
    for epochs in 20 5; do
        for setting in '448 224' '320 160'; do cells $epochs $setting bilinear,$learned 0,1,2,3,4 "$@"; done
        for setting in '448 224' '320 160'; do cells $epochs $setting bilinear,again,antialias,pil,muller,$learned 0,1,2 "$@"; done
        for setting in '448 224' '320 160'; do cells $epochs $setting bilinear,none,$learned 0,1,2 "$@"; done
        for setting in '448 224' '320 160'; do cells $epochs $setting bilinear 0 --collect "$@"; done
    done
}

case " $* " in
    *' --dry_run '*) matrix "$@" | awk '!seen[$0]++';;   # the command of each cell once
    *) matrix "$@";;
esac
