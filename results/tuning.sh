#!/usr/bin/env bash
# Settings that might earn more, tried on training images (--tune): ResNet-18, 128 to 64 pixels, 6 epochs, one thread a run.
#
#   bash results/tuning.sh SEED [SETTING...]     all settings, or those named
#
# It goes on where it was interrupted. RUNS is where the runs go (runs/tuning), JOBS how many are made side by side (1).
set -e
export RUNS=${RUNS:-runs/tuning} OMP_NUM_THREADS=1 SEED=${1:?which seed}
shift

settings() {   # NAME OPTIONS: what differs from the recipe
    cat <<LIST
bilinear        --resizer bilinear
learned         --resizer learned
zero_init       --resizer learned+zero_init=1
lr_mult-0.1     --resizer learned --lr_mult 0.1
lr_mult-3       --resizer learned --lr_mult 3
antialias       --resizer learned+antialias=1
unshuffle       --resizer learned+out_channels=12+skip_mode=unshuffle
num_resblocks-1 --resizer learned+num_resblocks=1
ema             --resizer learned --ema 0.99
ema-bilinear    --resizer bilinear --ema 0.99
start           --resizer learned --lr 3e-4 --start "$RUNS/bilinear-{seed}"
start-bilinear  --resizer bilinear --lr 3e-4 --start "$RUNS/bilinear-{seed}"
group           --resizer learned+norm=group
num_resblocks-4 --resizer learned+num_resblocks=4
num_kernels-32  --resizer learned+num_kernels=32
LIST
}

run() {   # NAME OPTIONS...
    resizer_train --data imagewoof-320 --arch resnet18 --size 128 --out 64 --epochs 6 --cache disk --workers 0 --tune \
        --runs "$RUNS" --name "$1-$SEED" --seed "$SEED" --resume "${@:2}"
}
source "$(dirname "$0")/each_setting.sh"
each_setting "$@"
