#!/usr/bin/env bash
# Recipes for the body behind the plain resize, tried on training images (--tune): ResNet-50, 192 to 96 pixels, 6 epochs.
#
#   bash results/recipe.sh SEED [SETTING...]     all settings, or those named
#
# It goes on where it was interrupted. RUNS is where the runs go (runs/recipe), JOBS how many are made side by side (1).
set -e
export RUNS=${RUNS:-runs/recipe} SEED=${1:?which seed}
shift

settings() {   # NAME OPTIONS: what differs from the recipe
    cat <<LIST
recipe
lr-1e-3                 --lr 1e-3
lr-5e-4                 --lr 5e-4
lr-6e-3                 --lr 6e-3
sgd-0.05                --opt sgd --lr 0.05
sgd-0.2                 --opt sgd --lr 0.2
flat_cos                --schedule flat_cos
bs-32                   --bs 32
bs-128                  --bs 128
clip-1                  --clip 1
xresnet50               --arch xresnet50
zero_init_residual      --body_init identity
fan_in                  --body_init fan_in
resnet50c               --arch timm/resnet50c
resnet50d               --arch timm/resnet50d
zero+fan_in             --body_init fastai
zero+eps-1e-6           --body_init identity --eps 1e-6
zero+eps-1e-8           --body_init identity --eps 1e-8
zero+lr-6e-3            --body_init identity --lr 6e-3
zero+bs-32              --body_init identity --bs 32
resnet18                --arch resnet18
resnet18+fastai         --arch resnet18 --body_init fastai
clip-1+eps-1e-8         --clip 1 --eps 1e-8
ranger-3e-3             --body_init fastai --opt ranger --schedule flat_cos
ranger-8e-3             --body_init fastai --opt ranger --schedule flat_cos --lr 8e-3
min_scale-0.6           --body_init fastai --min_scale 0.6
bs-32+lr-1.5e-3         --body_init fastai --bs 32 --lr 1.5e-3
ranger+one_cycle        --body_init fastai --opt ranger
fastai+flat_cos         --body_init fastai --schedule flat_cos
ranger-1.5e-3           --body_init fastai --opt ranger --schedule flat_cos --lr 1.5e-3
ranger+bs-32            --body_init fastai --opt ranger --schedule flat_cos --bs 32
ranger+bs-32+lr-1.5e-3  --body_init fastai --opt ranger --schedule flat_cos --bs 32 --lr 1.5e-3
ranger+min_scale-0.6    --body_init fastai --opt ranger --schedule flat_cos --min_scale 0.6
muon-3e-3               --body_init fastai --opt muon --schedule flat_cos
muon-8e-3               --body_init fastai --opt muon --schedule flat_cos --lr 8e-3
muon-1.6e-2             --body_init fastai --opt muon --schedule flat_cos --lr 1.6e-2
muon-1e-3               --body_init fastai --opt muon --schedule flat_cos --lr 1e-3
muon+one_cycle          --body_init fastai --opt muon
fastai+learned          --body_init fastai --resizer learned
ranger+learned          --body_init fastai --opt ranger --schedule flat_cos --resizer learned
muon+learned            --body_init fastai --opt muon --schedule flat_cos --lr 8e-3 --resizer learned
muon+zero_init          --body_init fastai --opt muon --schedule flat_cos --lr 8e-3 --resizer learned+zero_init=1
muon+lr_mult-0.1        --body_init fastai --opt muon --schedule flat_cos --lr 8e-3 --resizer learned --lr_mult 0.1
muon+start-bilinear     --opt muon --schedule flat_cos --lr 8e-4 --start "$RUNS/muon-8e-3-{seed}"
muon+start              --opt muon --schedule flat_cos --lr 8e-4 --start "$RUNS/muon-8e-3-{seed}" --resizer learned
muon+start+zero_init    --opt muon --schedule flat_cos --lr 8e-4 --start "$RUNS/muon-8e-3-{seed}" --resizer learned+zero_init=1
LIST
}

run() {   # NAME OPTIONS...
    resizer_train --data imagewoof-320 --arch resnet50 --resizer bilinear --size 192 --out 96 --epochs 6 --cache disk --workers 0 --tune \
        --runs "$RUNS" --name "$1-$SEED" --seed "$SEED" --resume "${@:2}"
}

source "$(dirname "$0")/each_setting.sh"
each_setting "$@"
