#!/bin/sh
# Makes the embedded pair anew, in build/pair, and puts it into eagle_jax/pair. Stretches that were finished are kept, and
# one that was interrupted is gone on with. From the repository's root, with the package and its extra `train` installed:
#
#     sh recipes/pair/make.sh               on an accelerator
#     DEVICES=2 sh recipes/pair/make.sh     on a CPU: a device for each core, twice as fast as one device for both
set -eu
cd "$(dirname "$0")/../.."
here=recipes/pair out=build/pair
devices=${DEVICES:-1}
# On a busy machine a device may wait longer for another than the 40 seconds after which XLA ends the process.
flags="--xla_force_host_platform_device_count=$devices --xla_cpu_collective_call_terminate_timeout_seconds=600"
export XLA_FLAGS="${XLA_FLAGS:-} $flags"

train() { # CONFIG [KEY=VALUE ...]
    config=$1 && shift
    eagle-jax train --config "$here/$config.yaml" "mesh.data=$devices" "$@"
}

[ -d $out/corpus ] || python $here/corpus.py $out/corpus
mkdir -p $out/shape
cp $here/target.json $out/shape/config.json
cp $out/corpus/tokenizer/* $out/shape/

regenerate() { # TARGET FIRST_LINE LAST_LINE OUT: greedy text of the target from prompts of the corpus
    [ -f "$4" ] && return
    sed -n "$2,$3p" $out/corpus/train.jsonl > "$4.prompts.jsonl"
    eagle-jax train regenerate --target "$1" --data "$4.prompts.jsonl" --out "$4" \
        --prompt-tokens 24 --max-new-tokens 128 --batch 64 --dtype float32
}

ends() { # ROUND: the texts of this round up to where they repeat themselves; and with the end alone to be learned
    [ -f $out/end$1.jsonl ] && return
    python $here/ends.py $out/greedy$1.jsonl $out/corpus/train.jsonl $out/ends$1.jsonl
    python $here/ends.py $out/greedy$1.jsonl $out/corpus/train.jsonl $out/end$1.jsonl end
}

train target
# In three rounds it learns to end where it would repeat itself, each from texts of the round before.
regenerate $out/runs/target/final 1 1024 $out/greedy1.jsonl
ends 1
train ends
regenerate $out/runs/ends1/final 1025 2048 $out/greedy2.jsonl
ends 2
train ends start=$out/runs/ends1/final output=$out/runs/ends2 \
    "data.train=[$out/ends1.jsonl,$out/ends2.jsonl]"
regenerate $out/runs/ends2/final 2049 3548 $out/greedy3.jsonl
ends 3
train ends start=$out/runs/ends2/final output=$out/runs/ends3 \
    "data.train=[$out/end1.jsonl,$out/end2.jsonl,$out/end3.jsonl]" steps=14 evaluation.every=7 \
    optimizer.learning_rate=0.001 optimizer.adam_learning_rate=0.0003
# The heads learn on the target's own greedy text, and on a part of the corpus.
regenerate $out/runs/ends3/best 3549 11166 $out/own.jsonl
[ -f $out/part.jsonl ] || head -n 6000 $out/corpus/train.jsonl > $out/part.jsonl
train eagle3
train eagle1

for part in "ends3/best target" "eagle3/final head" "eagle1/final head_eagle1"; do
    set -- $part
    rm -rf "eagle_jax/pair/$2"
    cp -r "$out/runs/$1" "eagle_jax/pair/$2"
done
