#!/bin/sh
# Packs what a machine without a network needs for training/start.sh: sh training/luggage.sh TEXT.jsonl.xz FOLDER
set -e
mkdir -p "$2/code/training" "$2/code/mlx_gemma_mtp"
: >"$2/code/mlx_gemma_mtp/__init__.py" # the package's own one needs its version file
cp mlx_gemma_mtp/errors.py "$2/code/mlx_gemma_mtp/"
for name in __init__ bundled cli corpus dense following minutes optimizer shards smalltalk together; do
    cp "training/$name.py" "$2/code/training/"
done
cp training/start.sh "$2/"
cp mlx_gemma_mtp/demo/target/tokenizer.json "$2/"
cp tests/data/prompt_following.json "$2/held.json"
cmp -s "$1" "$2/text.jsonl.xz" || cp "$1" "$2/text.jsonl.xz"
[ -z "$INIT" ] || cp -r "$INIT" "$2/pair" # a pair to go on from
du -sh "$2"
