#!/bin/sh
# Makes the embedded pair anew, in build/pair, and puts it into eagle_jax/pair. Stretches that were finished are kept, and
# one that was interrupted is gone on with. From the repository's root, with the package and its extra `train` installed:
#
#     sh recipes/pair/make.sh
set -eu
cd "$(dirname "$0")/../.."
here=recipes/pair out=build/pair

[ -d $out/corpus ] || python $here/corpus.py $out/corpus
mkdir -p $out/shape
cp $here/target.json $out/shape/config.json
cp $out/corpus/tokenizer/* $out/shape/

eagle-jax train --config $here/target.yaml
# The heads learn on the target's own greedy text, and on the corpus.
[ -f $out/regenerated.jsonl ] || eagle-jax train regenerate --target $out/runs/target/final \
    --data $out/corpus/train.jsonl --out $out/regenerated.jsonl \
    --limit 3000 --prompt-tokens 24 --max-new-tokens 160 --batch 32 --dtype float32
eagle-jax train --config $here/eagle3.yaml
eagle-jax train --config $here/eagle1.yaml

for part in "target target" "eagle3 head" "eagle1 head_eagle1"; do
    set -- $part
    rm -rf "eagle_jax/pair/$2"
    cp -r "$out/runs/$1/final" "eagle_jax/pair/$2"
done
