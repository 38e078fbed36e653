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

regenerate() { # TARGET OUT LINES: greedy text of the target
    [ -f "$2" ] || eagle-jax train regenerate --target "$1" --data $out/corpus/train.jsonl --out "$2" \
        --limit "$3" --prompt-tokens 24 --max-new-tokens 128 --batch 32 --dtype float32
}

eagle-jax train --config $here/target.yaml
# It learns to end where it would repeat itself.
regenerate $out/runs/target/final $out/greedy.jsonl 512
[ -f $out/ends.jsonl ] || python $here/ends.py $out/greedy.jsonl $out/corpus/train.jsonl $out/ends.jsonl
eagle-jax train --config $here/ends.yaml
# The heads learn on the target's own greedy text, and on the corpus.
regenerate $out/runs/ends/final $out/regenerated.jsonl 1200
eagle-jax train --config $here/eagle3.yaml
eagle-jax train --config $here/eagle1.yaml

for part in "ends target" "eagle3 head" "eagle1 head_eagle1"; do
    set -- $part
    rm -rf "eagle_jax/pair/$2"
    cp -r "$out/runs/$1/final" "eagle_jax/pair/$2"
done
