"""bench --drafts and show: names of drafts, the comparison, its picture, and the tree of a cycle."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import eagle_jax
from eagle_jax import LookupFirst, Medusa, MedusaConfig, PromptLookup, SamplingConfig, StaticTree, TreeConfig, convert
from eagle_jax.cli import main, places
from eagle_jax.cli.options import draft_options, model_options, tree_options
from eagle_jax.convert import to_official
from eagle_jax.drafts.registry import WEIGHTLESS
from eagle_jax.measure import machine, plot, samples
from eagle_jax.measure.drawn import Drawn, Node, decode_to
from eagle_jax.tree import PUBLISHED_TREES, BestExpansions, BestPrefixes
from tests.decode.test_sampled_distribution import tiny_config
from tests.drafts.kinds import KINDS
from tests.test_cli import OPTIONS, PROMPT, converted_pair
from tests.toy import GOLDEN


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    return converted_pair(golden, tmp_path_factory.mktemp("drafts"))


@pytest.fixture(scope="module")
def medusa(folder, tmp_path_factory):
    """A folder of three random Medusa heads for the golden target."""
    target, _ = convert.load(folder)
    sizes = MedusaConfig(target.config.vocab_size, target.config.hidden_size, num_heads=3)
    out = tmp_path_factory.mktemp("medusa")
    save_file(to_official(Medusa(sizes, jax.random.key(0))), out / "medusa_lm_head.safetensors")
    (out / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    return out


def test_bench_of_several_drafts(folder, tmp_path, capsys):
    prompts = tmp_path / "question.jsonl"  # as MT-bench has them, and plain ones
    prompts.write_text(json.dumps({"question_id": 81, "turns": [PROMPT, "more"]}) + '\n"import os\\nimport "\n')
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--model", str(folder), "--prompts", str(prompts), "--drafts", "plain,prompt-lookup,eagle3"]
    arguments += ["--repeats", "1"]
    assert main(["bench", *arguments, *OPTIONS, "--json", str(report), "--plot", str(picture)]) == 0
    result = json.loads(report.read_text())
    assert (result["rows"], result["max_new_tokens"]) == (2, 24)
    by_name = {one["name"]: one for one in result["drafts"]}
    assert list(by_name) == ["plain", "prompt-lookup", "eagle3"]
    for name, one in by_name.items():
        assert one["new_tokens"] == 48 and one["identical_rows"] == 2
        assert sum(one["accepted"]) == one["target_passes"]
        assert one["tokens_a_pass"] == pytest.approx(46 / one["target_passes"])
        shares = [sum(one["accepted"][depth:]) / one["target_passes"] for depth in range(1, len(one["accepted"]))]
        assert one["accepted_at_depth"] == pytest.approx(shares)
        parts = one["ms_a_cycle"]
        assert parts["rest"] == pytest.approx(max(parts["cycle"] - parts["draft"] - parts["verify"], 0))
        assert parts["verify"] > 0 and (parts["draft"] > 0) == (name != "plain")
        assert one["ratio"] == pytest.approx(one["tokens_a_second"] / by_name["plain"]["tokens_a_second"])
    assert by_name["eagle3"]["target_passes"] < by_name["plain"]["target_passes"] == 46
    out = capsys.readouterr().out
    for words in ("draft", "verify", "rest", "tok/s", "prompt-lookup: length 10", "eagle3: tree: depth 3", "2/2"):
        assert words in out
    assert "Distinct 4-grams of the plain texts" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png", "question.jsonl"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("plain,eagle4", "unknown draft 'eagle4'; known: plain, lookahead"),
        ("plain,plain", "plain is named twice"),
        ("lookahead=dir", "lookahead has no weights"),
        ("prompt-lookup+lookup", r"prompt-lookup\+lookup: \+lookup goes with model, medusa"),
    ],
)
def test_names_that_mean_nothing(spec, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        draft_options.parse_specs(spec)


def test_candidates_take_their_weights_and_trees(folder, medusa):
    target, head = convert.load(folder)
    loaded = model_options.Models(target, head, folder / "target")
    whole = str(GOLDEN / "weights/t1_target")
    specs = draft_options.parse_specs(
        f"plain,lookahead,prompt-lookup-tree,model={whole},medusa={medusa},eagle3,eagle3+lookup"
    )
    tree = TreeConfig(3, 2, 5)
    options = decoding(tree=tree, draft_tree=[("model", StaticTree.chain(2))])
    found = draft_options.candidates(loaded, specs, options)
    assert [one.name for one in found] == list(specs)
    plain, _, lookup, model, heads, eagle3, both = found
    assert plain.draft is None and eagle3.draft is head and eagle3.tree == tree
    assert lookup.draft == PromptLookup(branches=4)
    assert type(both.draft) is eagle_jax.LookupFirst and both.draft.otherwise is head and both.tree == tree
    assert type(model.draft) is eagle_jax.DraftModel and model.tree == StaticTree.chain(2)
    assert heads.draft.config.num_heads == 3
    assert heads.shape == "static tree: depth 3, 62 nodes"  # the published one, cut off at three heads
    for spec, message in (
        ("eagle1", "eagle1 needs weights that this model has not; name them: eagle1=DIR_OR_ID"),
        (f"medusa={whole}", r"medusa=.*: holds a DraftModel, not a Medusa"),
    ):
        with pytest.raises(ValueError, match=message):
            draft_options.candidates(loaded, draft_options.parse_specs(spec), options)


def test_a_hub_id_may_have_a_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(
        draft_options, "load_draft", lambda *where, **options: asked.append((where[0], options)) or PromptLookup()
    )
    loaded = model_options.Models(None, None, GOLDEN)
    for spec in ("medusa=owner/heads@v1.0", "medusa=owner/heads", f"medusa={GOLDEN}"):
        with pytest.raises(ValueError, match="not a Medusa"):
            draft_options.candidates(loaded, draft_options.parse_specs(spec), decoding())
    expected = [("owner/heads", "v1.0"), ("owner/heads", None), (str(GOLDEN), None)]
    assert asked == [(path, {"revision": revision}) for path, revision in expected]


def test_the_embedded_pair_has_heads_of_its_own():
    target, _ = convert.from_pretrained(samples.embedded_pair() / "target", dtype=jnp.float32)
    loaded = model_options.Models(target, None, samples.embedded_pair() / "target")
    found = draft_options.candidates(
        loaded, draft_options.parse_specs("eagle1,eagle2,eagle3"), decoding(), embedded=True
    )
    assert found[0].draft is found[1].draft  # loaded once
    assert found[0].tree == PUBLISHED_TREES["eagle"] and found[1].tree == TreeConfig()
    assert [type(one.draft).__name__ for one in found] == ["Eagle1Draft", "Eagle1Draft", "Eagle3Draft"]
    assert all(one.draft.dtype == jnp.float32 and one.draft.config.window is None for one in found)
    specs = draft_options.parse_specs("lookahead,eagle3")
    found = draft_options.candidates(loaded, specs, decoding(draft_window=(4, 64)), embedded=True)
    assert found[1].draft.config.window == (4, 64)  # of the EAGLE heads; others have no such thing


def test_trees_on_the_command_line(tmp_path):
    (tmp_path / "paths.json").write_text("[[0], [1], [0, 0]]")
    for text, tree in (
        ("8,10,60", TreeConfig()),
        ("chain:3", StaticTree.chain(3)),
        ("best:15,64", BestPrefixes(15, 64)),
        ("expand:15,4,64", BestExpansions(15, 4, 64)),
        ("medusa-zephyr-stage2", PUBLISHED_TREES["medusa-zephyr-stage2"]),
        (str(tmp_path / "paths.json"), StaticTree([[0], [1], [0, 0]])),
    ):
        assert tree_options.parse_tree(text) == tree
    (tmp_path / "bad.json").write_text("[[0, 0]]")
    (tmp_path / "object.json").write_text("{}")
    for text, message in (
        (str(tmp_path / "bad.json"), "lacks its parent"),
        (str(tmp_path / "object.json"), "a list of paths was expected"),
        (str(tmp_path / "none.json"), "No such file"),
        ("chain:99999999999", "a tree may be 1000 levels deep at most"),
        ("99999999999,1,2", "a tree may be 1000 levels deep at most"),
        ("best:1001,64", "a tree may be 1000 levels deep at most"),
        ("expand:1001,1,1100", "a tree may be 1000 levels deep at most"),
        ("expand:15,64", "a tree is depth,top_k,num_nodes.*expand:DEPTH,TOP_K,NODES"),
        ("expand:3,2,99", "num_nodes = 99 is more than .* at most 15"),
        ("best:15", "a tree is depth,top_k,num_nodes.*best:DEPTH,NODES"),
        ("chain:0", "a tree is depth,top_k,num_nodes"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            tree_options.parse_tree(text)
    assert draft_options.parse_draft_tree("eagle1=chain:2") == ("eagle1", StaticTree.chain(2))
    with pytest.raises(argparse.ArgumentTypeError, match="trees are for model, medusa, dflash, dspark, eagle1"):
        draft_options.parse_draft_tree("lookahead=chain:2")


def decoding(**options) -> SimpleNamespace:
    """The options of decoding, as argparse has them where none is given but these."""
    names = ("model", "target", "draft", "tree", "stop_below", "score_temperature", "draft_window", "confidence")
    names += ("lookup",)
    return SimpleNamespace(**dict.fromkeys(names) | options)


def test_a_tree_that_suits_the_draft(folder):
    _, head = convert.load(folder)

    def choose(draft=head, **options):
        choice = tree_options.choose_tree(draft, decoding(**options))
        return choice.tree, choice.words(draft)

    assert choose() == (TreeConfig(), "Eagle3Draft, tree: depth 8, top_k 10, 60 nodes (the default)")
    both = dataclasses.replace(TreeConfig(), stop_below=0.2, score_temperature=0.5)
    tree, words = choose(stop_below=0.2, score_temperature=0.5)
    assert tree == both and "60 nodes, stops below 0.2, score temperature 0.5 (the default)" in words
    assert choose(tree=StaticTree.chain(2)) == (StaticTree.chain(2), "Eagle3Draft, chain of 2 (from --tree)")
    block = KINDS["dflash"].build(tiny_config(), 0, 1.0)  # of five tokens
    assert (
        tree_options.choose_tree(block, decoding()).words(block)
        == "DFlash, the best 63 prefixes, depth 4 (the default)"
    )
    both = LookupFirst(head, length=5)
    assert choose(both, tree=StaticTree.chain(2))[1] == "Eagle3Draft and copies of 5 tokens, chain of 2 (from --tree)"
    assert tree_options.choose_tree(LookupFirst(block), decoding()).tree.depth == 4
    assert choose(None)[1] == "plain decoding"
    assert choose(PromptLookup())[1] == "PromptLookup, length 10, branches 1, ngram 3 (a shape of its own)"
    for draft, options, message in (
        (head, {"score_temperature": 0.5, "tree": StaticTree.chain(2)}, "--score-temperature is for dynamic trees"),
        (head, {"stop_below": 0.2, "tree": StaticTree.chain(2)}, "--stop-below .* not for a chain of 2"),
        (PromptLookup(), {"tree": TreeConfig()}, "--tree is for drafts that grow trees; PromptLookup does not"),
        (PromptLookup(), {"stop_below": 0.2}, "--stop-below is for drafts that grow trees"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(draft, **options)


def test_a_draft_without_weights_goes_with_every_target(folder, capsys):
    """It takes the place of a converted folder's own head, too."""
    out = []
    for draft in ([], ["--draft", "prompt-lookup"]):
        tree = [] if draft else OPTIONS[:2]
        assert main(["generate", "--model", str(folder), *draft, "--prompt", PROMPT, *tree, *OPTIONS[2:]]) == 0
        out.append(capsys.readouterr())
    assert out[0].out == out[1].out
    assert "PromptLookup, length 10, branches 1, ngram 3 (a shape of its own)\n" in out[1].err
    target = str(folder.parent / "target")
    for name, kind in WEIGHTLESS.items():
        args = decoding(target=target, draft=name, **dict.fromkeys(("dtype", "mesh", "revision", "draft_revision")))
        assert model_options.load_models(args).draft == kind.draft(**kind.settings)
    for draft, options, message in (
        ("prompt-lookup", ["--tree", "3,2,5"], "--tree is for drafts that grow trees; PromptLookup does not"),
        ("lookahead", ["--draft-window", "4,16"], "--draft-window is for EAGLE heads, this draft is a Lookahead"),
        ("head/", [], "--draft goes with --target: a converted folder holds its own draft, in place of which --draft"),
    ):
        assert main(["generate", "--model", str(folder), "--draft", draft, "--prompt", "x", *options]) == 2
        assert message in capsys.readouterr().err


def test_copies_before_the_head(folder, tmp_path, capsys):
    """--lookup changes no greedy text; a file begun without it is not continued with it."""
    (tmp_path / "prompts.txt").write_text(PROMPT)
    many = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out.jsonl"), "--batch", "1"]
    out = []
    for lookup in ([], ["--lookup", "5"]):
        assert main(["generate", "--model", str(folder), *lookup, "--prompt", PROMPT, *OPTIONS]) == 0
        out.append(capsys.readouterr())
        code = main(["generate", "--model", str(folder), *lookup, *many, *OPTIONS])
        said = capsys.readouterr().err
        assert code == 2 * len(lookup[:1]) and ("lookup" in said) == bool(lookup)
    assert out[0].out == out[1].out
    assert "Eagle3Draft and copies of 5 tokens, tree: depth 3" in out[1].err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "--model", "MODEL", "--draft", "lookahead", "--prompt", "x", "--lookup"],
            "copies alone: --draft",
        ),
        (["bench", "--model", "MODEL", "--drafts", "eagle3", "--lookup"], "in --drafts write NAME+lookup"),
        (["show", "--prompt", "x", "--lookup"], "after --draft-name write NAME+lookup"),
        (["generate", "--model", "MODEL", "--prompt", "x", "--lookup", "0"], "argument --lookup: must be a positive"),
    ],
)
def test_copies_that_have_no_draft_to_ask_are_refused(folder, capsys, command, message):
    with contextlib.suppress(SystemExit):  # argparse
        assert main([str(folder) if word == "MODEL" else word for word in command]) == 2
    assert message in capsys.readouterr().err


def test_every_other_command_takes_a_draft_without_weights_by_its_name(folder, tmp_path, capsys, monkeypatch):
    prompt, shape = "import os", "PromptLookup, length 10, branches 1, ngram 3"
    named, short = ["--model", str(folder), "--draft", "prompt-lookup"], ["--max-new-tokens", "12"]

    def output(command, *options):
        assert main([command, *named, *options]) == 0
        captured = capsys.readouterr()
        assert shape in captured.err + captured.out
        return captured.out

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{prompt}\n"))
    text = output("chat", "--context", "64", *short)
    (tmp_path / "prompts.txt").write_text(prompt)
    prompts, out = ["--prompts", str(tmp_path / "prompts.txt")], tmp_path / "out.jsonl"
    output("generate", *prompts, "--out", str(out), *short)
    assert json.loads(out.read_text().splitlines()[1])["text"] == text.removesuffix("\n")
    assert "Identical tokens: 1 of 1 rows." in output("bench", *prompts, "--repeats", "1", *short)
    assert main(["show", *named, "--prompt", prompt, *short]) == 0
    assert "PromptLookup, length 10, branches 1, ngram 3: cycle 1" in capsys.readouterr().out
    assert main(["tune", *named]) == 2  # it has no tree to tune
    assert "there is no EAGLE head here" in capsys.readouterr().err


def test_the_tuned_tree_is_that_of_the_nearest_batch_and_of_one_batch_where_texts_depend_on_it(
    folder, tmp_path, monkeypatch
):
    """A greedy or coupled text is the same with every tree; any other sampled text must not depend on --batch."""
    target, head = convert.load(folder)
    setting = {"device": machine.device_name(), "dtype": "float32"}
    sizes = {1: (1, 1, 2), 4: (2, 2, 5), 32: (3, 2, 6)}
    entries = [
        setting | {"batch": batch, "tree": {"depth": depth, "top_k": k, "num_nodes": nodes}}
        for batch, (depth, k, nodes) in sizes.items()
    ]
    (tmp_path / "tuned.json").write_text(json.dumps(entries))

    def batch_of(choice):
        words = re.search(r"\(tuned on this device for batch (\d+)\)", choice.words(head))
        assert choice.tree == TreeConfig(*sizes[int(words[1])])
        return int(words[1])

    for batch, nearest in ((1, 1), (2, 1), (3, 4), (8, 4), (12, 32), (100, 32)):
        args = decoding(model=str(tmp_path), batch=batch)
        assert batch_of(tree_options.choose_tree(head, args, batch)) == nearest
        for sampling in (SamplingConfig(), SamplingConfig(1.0, coupled=True)):
            assert batch_of(tree_options.choose_tree_for_many(head, args, sampling)) == nearest
        assert batch_of(tree_options.choose_tree_for_many(head, args, SamplingConfig(1.0))) == 4
    tree = TreeConfig(2, 2, 4)
    args = decoding(model=str(tmp_path), batch=1, tree=tree)
    assert (
        tree_options.choose_tree_for_many(head, args, SamplingConfig(1.0)).words(head).endswith("4 nodes (from --tree)")
    )
    # A head that --drafts names by its folder has the tree that was tuned there.
    monkeypatch.setattr(draft_options, "load_draft", lambda *where, **options: head)
    loaded = model_options.Models(target, None, folder / "target")
    (found,) = draft_options.candidates(loaded, {"eagle3": str(tmp_path)}, decoding(batch=3))
    assert (found.tree, found.origin) == (TreeConfig(*sizes[4]), "tuned on this device for batch 4")
    (found,) = draft_options.candidates(loaded, {"eagle3": str(tmp_path)}, decoding(batch=3, tree=tree))
    assert (found.tree, found.origin) == (tree, "from --tree")


def test_show_draws_a_cycle(folder, tmp_path, capsys):
    picture = tmp_path / "tree.svg"
    arguments = ["show", "--model", str(folder), "--prompt", PROMPT, "--cycle", "3", *OPTIONS]
    assert main([*arguments, "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "Eagle3Draft, tree: depth 3, top_k 2, 5 nodes: cycle 3" in out
    # The accepted tokens and the target's own are those of the text, where each cycle ends with the target's own.
    target, head = convert.load(folder)
    tokens, lengths = eagle_jax.pad([list(PROMPT.encode())])
    whole = eagle_jax.generate(target, head, tokens, lengths, tree=TreeConfig(3, 2, 5), max_new_tokens=24)
    first = int(lengths[0])
    own = [i for i in range(first + 1, int(whole.lengths[0])) if not whole.drafted[0, i]]
    gained = bytes(np.asarray(whole.tokens[0, own[1] + 1 : own[2] + 1]).tolist()).decode()
    lines = [line for line in out.splitlines() if "accepted" in line or "target's own" in line]
    assert len(lines) == len(gained) > 1
    for line, character in zip(lines, gained, strict=True):
        assert repr(character)[1:-1] in line
    assert "<svg" in picture.read_text()
    with pytest.raises(ValueError, match=r"the text ends in cycle [1-8], at 24 tokens, before --cycle 9"):
        decode_to(target, head, TreeConfig(3, 2, 5), tokens, lengths, 9, capacity=24, max_new_tokens=30)


def test_show_stops_at_the_end_of_the_text(folder, capsys):
    """The text after "import os" begins with a dot, the target's own, and an accepted newline."""
    arguments = ["show", "--model", str(folder), "--prompt", "import os", *OPTIONS, "--stop-token", "10"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("accepted") == 1 and "the text ends here" in out and "target's own" not in out
    assert main([*arguments, "--cycle", "2"]) == 2
    assert "the text ends in cycle 1, at 11 tokens, before --cycle 2" in capsys.readouterr().err
    assert main([*arguments[:-2], "--cycle", "2", "--max-new-tokens", "3"]) == 2
    assert "the text ends in cycle 1, at 12 tokens, before --cycle 2" in capsys.readouterr().err


def test_places_that_cannot_be_written_are_found(tmp_path):
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "empty.json").touch()
    places.write_json(str(tmp_path / "ours.json"), {"a": 1})
    for name in ("new.json", "empty.json", "ours.json"):
        places.check_report("--json", str(tmp_path / name))
    for path, message in (
        (tmp_path, "--json .*: is a folder; name a file in it"),
        (tmp_path / "none/x.json", "--json .*x.json: there is no folder .*none to write it to"),
        (tmp_path / "mine.json/x.json", "there is no folder .*mine.json to write it to"),
        ("/dev/null", "--json /dev/null: exists and is not a regular file"),
        ("/proc/x.json", "--json /proc/x.json: cannot be written"),
        (tmp_path / "mine.json", "--json .*mine.json: exists and was not written by eagle-jax"),
    ):
        with pytest.raises(ValueError, match=message):
            places.check_report("--json", str(path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.json", "mine.json", "ours.json"]
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--json", "none/x.json"],
        ["bench", "--drafts", "plain", "--plot", "none/x.png"],
        ["show", "--prompt", "x", "--out", "none/x.svg"],
        ["generate", "--prompts", __file__, "--out", "none/x.jsonl"],
        ["train regenerate", "--data", __file__, "--out", "none/x.jsonl"],
    ],
)
def test_commands_check_their_output_before_they_load_anything(arguments, monkeypatch, capsys):
    def too_late(args):
        raise AssertionError

    monkeypatch.setattr(model_options, "load_models", too_late)
    assert main([*arguments[0].split(), "--model", "m", *arguments[1:]]) == 2
    assert "there is no folder none to write it to" in capsys.readouterr().err


def test_a_picture_replaces_only_one_of_ours(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of my cat")
    with pytest.raises(ValueError, match=r"--plot .*photo.png: exists and was not written by eagle-jax"):
        places.check_picture("--plot", str(tmp_path / "photo.png"))
    node = Node(0, None, 0, "a", None, True)
    for name in ("x.png", "x.svg", "x.pdf"):
        plot.save(plot.tree(Drawn([node], 0, "b", 0), "a tree"), str(tmp_path / name), places.MARK)
        places.check_picture("--plot", str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["show", "--model", "MODEL", "--prompt", "x", "--out", "tree.gif"],
            "a picture's name ends in .png, .svg, .pdf",
        ),
        (["show", "--model", "MODEL", "--prompt", "x", "--draft-name", "plain"], "plain decoding has no tree to show"),
        (["show", "--model", "MODEL", "--prompt", "x", "--draft-name", "eagle3,lookahead"], "name one draft"),
        (["bench", "--model", "MODEL", "--plot", "x.png"], "--plot and --draft-tree go with --drafts"),
        (["bench", "--model", "MODEL", "--drafts", "plain,eagle2"], "eagle2 needs weights"),
        (
            ["show", "--model", "MODEL", "--prompt", "x", "--draft-name", "lookahead", "--tree", "3,2,5"],
            "--tree is for drafts that grow trees; Lookahead does not",
        ),
        (
            ["show", "--model", "MODEL", "--prompt", "x", "--draft-name", "lookahead", "--draft-window", "4,16"],
            "--draft-window is for EAGLE heads, this draft is a Lookahead",
        ),
    ],
)
def test_what_cannot_be_is_one_line(folder, arguments, message, capsys):
    assert main([str(folder) if argument == "MODEL" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(re.escape(message), err) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("asked", "dtype", "line"), [(None, "float32", "decoding in float32"), ("bfloat16", "bfloat16", "as asked")]
)
def test_a_cpu_decodes_in_float32_unless_asked_otherwise_and_says_so(capsys, asked, dtype, line):
    parser = argparse.ArgumentParser()
    model_options.add_model_arguments(parser)
    pair = samples.embedded_pair()
    arguments = ["--target", str(pair / "target"), "--draft", str(pair / "head_eagle1")]
    args = parser.parse_args(arguments + ([] if asked is None else ["--dtype", asked]))
    args.draft_window = args.confidence = args.lookup = None
    loaded = model_options.load_models(args)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((loaded.target, loaded.draft))} == {dtype}
    assert line in capsys.readouterr().err
