#!/usr/bin/env bash
# Recipes for the body behind the plain resize, tried on a fifth of the training images: ResNet-50, 192 to 96 pixels, 6 epochs, one run after another.
#
#   bash results/recipe.sh SEED [SETTING...]     all settings, or those named
#
# It goes on where it was interrupted. RUNS is where the runs go (runs/recipe).
set -e
runs=${RUNS:-runs/recipe} seed=$1
shift

settings() {   # NAME OPTIONS: what differs from the recipe
    cat <<'END'
recipe
lr-1e-3     --lr 1e-3
lr-5e-4     --lr 5e-4
lr-6e-3     --lr 6e-3
sgd-0.05    --opt sgd --lr 0.05
sgd-0.2     --opt sgd --lr 0.2
flat_cos    --schedule flat_cos
bs-32       --bs 32
clip-1      --clip 1
xresnet50   --arch xresnet50
END
}

settings | { if [ $# -gt 0 ]; then grep -E "^($(IFS='|'; echo "$*"))( |$)"; else cat; fi; } | while read -r name options; do
    resizer_train --data imagewoof-320 --arch resnet50 --resizer bilinear --size 192 --out 96 --epochs 6 --cache disk --workers 0 --tune \
        --runs "$runs" --name "$name-$seed" --seed "$seed" --resume $options < /dev/null
done
