r"""The prompt language, held to what AUTOMATIC1111 1.10.1 does.

`data/prompt_golden.json` and the tables below were made by running the host's own functions (lark 1.1.2, under
several hash seeds); the rest are properties that hold for any prompt.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizerFast

from lib_estimate.errors import EstimateError, PromptSyntaxError
from lib_estimate.prompt.attention import BREAK, EMPHASIS_MODES, apply_emphasis, parse_attention
from lib_estimate.prompt.chunks import EmbeddingNames, Placed, Vocabulary, chunks
from lib_estimate.prompt.schedule import extra_network_tags, prompt_schedule, split_and

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "data" / "prompt_golden.json").read_text(encoding="utf-8"))["rows"]
ACCEPTED = [
    pytest.param(row, id=f"{number}-{row['prompt'][:30]!a}")
    for number, row in enumerate(GOLDEN)
    if "host_error" not in row
]
START, END = 49406, 49407
DOWN = 1 / 1.1


@pytest.fixture(scope="module")
def encode():
    tokenizer = CLIPTokenizerFast.from_pretrained(HERE / "shapes_sd" / "tokenizer")
    return lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@pytest.fixture(scope="module")
def clip_l(encode):
    return Vocabulary(encode, start=START, end=END, pad=END, comma=267, chunk_length=75)


@pytest.fixture(scope="module")
def short(encode):
    """The same, with chunks that a table can show."""
    return Vocabulary(encode, start=START, end=END, pad=END, comma=267, chunk_length=6)


@pytest.fixture
def names(encode):
    names = EmbeddingNames(encode)
    for name, vectors in (("dog", 3), ("dog cat", 2), ("fox", 1), ("whole", 6)):
        names.add(name, vectors)
    return names


def text_of(chunk):
    """Tokens and weights with the padding cut off, as in the golden file and the tables."""
    pairs = list(zip(chunk.tokens, chunk.weights, strict=True))
    while pairs[-1] == (END, 1.0):
        pairs.pop()
    return [token for token, _ in pairs], [round(weight, 9) for _, weight in pairs]


# What the host gave for its own prompts


@pytest.mark.parametrize("row", ACCEPTED)
def test_golden_attention(row):
    got = parse_attention(row["prompt"])
    assert [text for text, _ in got] == [text for text, _ in row["attention"]]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in row["attention"]], rel=0, abs=1e-12)


@pytest.mark.parametrize("row", ACCEPTED)
def test_golden_schedule(row):
    assert prompt_schedule(row["prompt"], 20) == [tuple(entry) for entry in row["schedule_20"]]


@pytest.mark.parametrize("row", ACCEPTED)
def test_golden_and(row):
    assert split_and(row["prompt"]) == [tuple(entry) for entry in row["and"]]


@pytest.mark.parametrize("row", ACCEPTED)
def test_golden_chunks(row, clip_l):
    got, count = chunks(row["prompt"], clip_l)
    assert count == row["token_count"]
    assert [text_of(chunk) for chunk in got] == [(chunk["tokens"], chunk["weights"]) for chunk in row["chunks"]]
    assert all(len(chunk.tokens) == len(chunk.weights) == 77 for chunk in got)


def test_golden_rejections(clip_l):
    rejected = [row["prompt"] for row in GOLDEN if "host_error" in row]
    assert rejected
    for prompt in rejected:
        with pytest.raises(PromptSyntaxError):
            chunks(prompt, clip_l)


# Emphasis


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:1.3", [("a:1.3", 1.1)]),
        ("(a (b:0.5", [("a ", 1.1), ("b:0.5", 1.2100000000000002)]),
        ("[a (b]) c", [("a ", DOWN), ("b c", 1.0)]),
        ("([a)]", [("a", 1.0)]),
        ("[a:1.5]", [("a:1.5", DOWN)]),
        ("(a:1.5]", [("a:1.5]", 1.1)]),
        ("(a:-0.5) b", [("a", -0.5), (" b", 1.0)]),
        ("( a : -1. )", [(" a ", -1.0)]),
        ("(a: 1 .5)", [("a: 1 .5", 1.1)]),
        ("(a:1e2)", [("a:1e2", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a::1.2)", [("a:", 1.2)]),
        ("(a:\u0663)", [("a", 3.0)]),
        ("((a)(b:2)c:0.5)", [("a", 0.55), ("b", 1.0), ("c", 0.5)]),
        ("(a:0)(b:0)", [("ab", 0.0)]),
        ("((((", [("", 1.0)]),
        ("]]))", [("]]))", 1.0)]),
        ("(a\\)b:1.2)", [("a)b", 1.2)]),
        ("\\(a\\\\)", [("(a\\)", 1.0)]),
        ("(a\\:1.2)", [("a", 1.2)]),  # a colon cannot be escaped
        ("a\\b", [("ab", 1.0)]),
        ("a\\", [("a", 1.0)]),
        ("\\BREAK", [("", 1.0), (BREAK, -1.0), ("", 1.0)]),
        ("(a BREAK b)", [("a", 1.1), (BREAK, -1.1), ("b", 1.1)]),
        ("(BREAK:-1)", [("", -1.0), (BREAK, 1.0), ("", -1.0)]),
        ("a\nBREAK\n\nb", [("a", 1.0), (BREAK, -1.0), ("b", 1.0)]),
        ("a:BREAK:b", [("a:", 1.0), (BREAK, -1.0), (":b", 1.0)]),
        ("aBREAK BREAKb _BREAK_", [("aBREAK BREAKb _BREAK_", 1.0)]),
    ],
)
def test_attention(prompt, expected):
    assert parse_attention(prompt) == expected


@pytest.mark.parametrize("weight", ["1.5.2", "..", "."])
def test_a_weight_that_is_no_number_is_named_with_its_place(weight):
    with pytest.raises(PromptSyntaxError) as caught:
        parse_attention(f"cat (a:{weight})")
    assert isinstance(caught.value, EstimateError)
    assert f'"{weight}" at character 7 ' in str(caught.value)
    assert parse_attention(f"a:{weight})") == [(f"a:{weight})", 1.0)]  # without the bracket it is text


# Schedules


@pytest.mark.parametrize(
    ("prompt", "steps", "expected"),
    [
        ("[a|[b|c]]", 4, "a c a c"),
        ("[[a|b]|c]", 4, "a c a c"),
        ("[a|b|]", 4, "a b - a"),
        ("[fe|||]male", 5, "female male male male female"),
        ("[a|b]", 1, "a"),
        ("[a:[b|c]:2]", 4, "a a b c"),
        ("[[[a:b:3]:c:5]:d:0.2]", 10, "a a d d d d d d d d"),
        ("[a:b:3][c:d:5]", 6, "ac ac ac bc bc bd"),
        ("[a:b:5][c:d:0.5]", 10, "ac ac ac ac ac bd bd bd bd bd"),
        ("[cat:[dog:fox:8]:4]AND[a|b]", 9, "catANDa catANDb catANDa catANDb dogANDa dogANDb dogANDa dogANDb foxANDa"),
        ("[a:3]", 6, "- - - a a a"),
        ("[:3]", 4, "- - - -"),
        ("[::3]", 4, "- - - -"),
        ("[a:b:-1]", 2, "b b"),
        ("[a:b:-0.5]", 2, "b b"),
        ("[a:b:1.0]", 3, "a a a"),
        ("[a:b:1]", 3, "a b b"),
        ("[a:b:99]", 3, "a a a"),
        ("[a:b:2.5]", 1, "a"),
        ("[a:b:.5]", 7, "a a a b b b b"),
        ("[a:b:0.99]", 4, "a a a b"),
        ("[a:b:2e0]", 4, "a a b b"),
        ("[a:b:5.e-1]", 4, "a a b b"),
        ("[a:b:+3]", 4, "a a a b"),
        ("[a:b: 3 \n]", 4, "a a a b"),
        ("(a[b:c:0.5]:1.3)", 4, "(ab:1.3) (ab:1.3) (ac:1.3) (ac:1.3)"),
        ("([a|b]:1.2)[c]", 2, "(a:1.2)[c] (b:1.2)[c]"),
        ("[(a:1.3):(b:0.7):3]", 4, "(a:1.3) (a:1.3) (a:1.3) (b:0.7)"),
        ("[a\\]b:c:3]", 4, "a\\]b a\\]b a\\]b c"),
        ("[a\\:b:c\\|d:3]", 4, "a\\:b a\\:b a\\:b c\\|d"),
    ],
)
def test_schedule_shows_at_each_step(prompt, steps, expected):
    """The table has one word per step, "-" for none."""
    shown, first = [], 1
    for last, text in prompt_schedule(prompt, steps):
        shown += [text or "-"] * (last - first + 1)
        first = last + 1
    assert " ".join(shown) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "[a:b:c:3]",
        "[a:b:c]",
        "[a:b:3 x]",
        "[a:b:3",
        "[a:b|c:3]",
        "[(a|b):c:2]",
        "(a|b)",
        "a|b [c:d:3]",
        "a [b:c:3] \\",
        "a\\\nb [b:c:3]",
        "\\[a:b:3\\]",
        "[[]:(]:3)",
        "[a (b:c:d):e:3]",
    ],
)
def test_what_is_no_span_stays_text(prompt):
    assert prompt_schedule(prompt, 6) == [(6, prompt)]


def test_schedule_keeps_steps_that_change_nothing():
    assert prompt_schedule("[|]", 2) == [(1, ""), (2, "")]
    assert prompt_schedule("[[[a:b:3]:c:5]:d:0.2]", 10) == [(2, "a"), (3, "d"), (5, "d"), (10, "d")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x: [a:b:3]", ["x: a", "x: b"]),
        ("[a:b:3]: x", ["a: x", "b: x"]),
        ("(x [a:b:3]", ["(x a", "(x b"]),
        ("[x] ) [a:b:3]", ["[x] ) a", "[x] ) b"]),
        ("[x:[a:b:3]:c:d]", ["[x:a:c:d]", "[x:b:c:d]"]),
        ("((a][:b:c [d:3]", ["((a][:b:c ", "((a][:b:c d"]),
    ],
)
def test_spans_count_beside_stray_brackets_and_colons(prompt, expected):
    """Here the host's reading depends on its hash seed; ours is the one of its readings that edits."""
    assert [text for _, text in prompt_schedule(prompt, 6)] == expected


def test_a_step_beyond_all_numbers_is_explained():
    with pytest.raises(PromptSyntaxError, match="1e999"):
        prompt_schedule("[a:b:1e999]", 20)


def test_deep_nesting():
    depth = 2000
    assert prompt_schedule("[" * depth + "a" + ":2]" * depth, 4) == [(2, ""), (4, "a")]


# AND


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a : 2 AND b:-1", [("a", 2.0), (" b", -1.0)]),
        ("a:1 :2 AND b", [("a:1", 2.0), (" b", 1.0)]),
        ("a:1.5 b AND c", [("a:1.5 b", 1.0), (" c", 1.0)]),
        ("a:.5.5 AND b:5.", [("a:.5.5", 1.0), (" b", 5.0)]),
        ("a:1.3) AND a:+.5", [("a:1.3)", 1.0), (" a", 0.5)]),
        ("a:1e3 AND b : ", [("a:1e3", 1.0), (" b :", 1.0)]),
        ("AND", [("", 1.0), ("", 1.0)]),
        ("a AND AND b", [("a", 1.0), ("", 1.0), (" b", 1.0)]),
        ("a\nAND\nb :0.5\n", [("a", 1.0), ("\nb", 0.5)]),
        ("(a AND b:2) AND c", [("(a", 1.0), (" b:2)", 1.0), (" c", 1.0)]),
        ("BRAND AND_x ANDy", [("BRAND AND_x ANDy", 1.0)]),
        ("a:\x1c1.", [("a", 1.0)]),
        ("5", [("5", 1.0)]),
    ],
)
def test_and(prompt, expected):
    assert split_and(prompt) == expected


# Chunks. Token 320 is "a", 267 a comma; chunks of 6; the embeddings are those of the fixture `names`.


@pytest.mark.parametrize(
    ("prompt", "backtrack", "count", "expected"),
    [
        # embeddings at the end of a chunk
        ("a a a dog", 3, 6, [([320, 320, 320, 0, 0, 0], [(4, "dog", 3)])]),
        ("a a a a dog a", 3, 10, [([320] * 4, []), ([0, 0, 0, 320], [(1, "dog", 3)])]),
        ("whole a", 3, 7, [([0] * 6, [(1, "whole", 6)]), ([320], [])]),
        ("a whole", 3, 12, [([320], []), ([0] * 6, [(1, "whole", 6)])]),
        ("a a a, dog a", 3, 10, [([320, 320, 320, 267], []), ([0, 0, 0, 320], [(1, "dog", 3)])]),
        # longest name first; only whole tokens; capitals are the tokenizer's business
        ("dog cat dog", 3, 5, [([0] * 5, [(1, "dog cat", 2), (3, "dog", 3)])]),
        ("foxes Fox", 3, 2, [([24145, 0], [(2, "fox", 1)])]),
        # what follows a near comma moves on, but its vectors do not
        ("a, a a a a a", 5, 11, [([320, 267], []), ([320] * 5, [])]),
        ("a, a a a a a", 4, 7, [([320, 267, 320, 320, 320, 320], []), ([320], [])]),
        ("a, a a a a a", 0, 7, [([320, 267, 320, 320, 320, 320], []), ([320], [])]),
        ("a a a a a, a", 3, 7, [([320, 320, 320, 320, 320, 267], []), ([320], [])]),
        ("a a a a a a, a", 3, 8, [([320] * 6, []), ([267, 320], [])]),
        ("a a, dog a", 4, 10, [([320, 320, 267], [(4, "dog", 3)]), ([0, 0, 0, 320], [])]),
        # BREAK
        ("a BREAK dog", 3, 9, [([320], []), ([0, 0, 0], [(1, "dog", 3)])]),
        ("BREAK", 3, 6, [([], [])]),
        ("a BREAK", 3, 6, [([320], [])]),
        ("a a a a a a BREAK a", 3, 7, [([320] * 6, []), ([320], [])]),
        ("a a a a a a", 3, 6, [([320] * 6, [])]),
        ("(BREAK) a", 3, 2, [([2568, 320], [])]),
        # a word of nine tokens
        (
            "supercalifragilisticexpialidocious",
            3,
            9,
            [([1642, 2857, 13093, 2076, 5868, 26850], []), ([835, 639, 38466], [])],
        ),
    ],
)
def test_chunks(prompt, backtrack, count, expected, short, names):
    got, got_count = chunks(prompt, short, names.find, comma_padding_backtrack=backtrack)
    assert [(text_of(chunk)[0][1:], list(chunk.placed)) for chunk in got] == [
        (tokens, [Placed(*place) for place in placed]) for tokens, placed in expected
    ]
    assert got_count == count


def test_weights_go_with_their_tokens(short, names):
    def weights(prompt):
        return [list(chunk.weights) for chunk in chunks(prompt, short, names.find)[0]]

    assert weights("(a a a a dog:1.5) a") == [[1, 1.5, 1.5, 1.5, 1.5, 1, 1, 1], [1, 1.5, 1.5, 1.5, 1, 1, 1, 1]]
    assert weights("a a, (a a:2) a a a") == [[1.0] * 8, [1, 2, 2, 1, 1, 1, 1, 1]]


def test_without_emphasis_all_is_text(short, encode):
    got, count = chunks("(a:1.5) BREAK", short, emphasis=False)
    assert [text_of(chunk)[0][1:] for chunk in got] == [[263, 320, 281, 272, 269, 276], [264, 2568]]
    assert {weight for chunk in got for weight in chunk.weights} == {1.0}
    assert count == 8 == len(encode("(a:1.5) BREAK"))


def test_padding_differs_from_the_end_token_for_openclip(encode, names):
    open_clip = Vocabulary(encode, start=START, end=END, pad=0, comma=267, chunk_length=6)
    [chunk], _ = chunks("a fox", open_clip, names.find)
    assert chunk.tokens == (START, 320, 0, END, 0, 0, 0, 0)
    [full], _ = chunks("a a a a a a", open_clip)
    assert full.tokens == (START, *[320] * 6, END)
    # An end token in the prompt ends it for the encoder, as in the host.
    [cut], _ = chunks("a <|endoftext|> b", open_clip)
    assert cut.tokens == (START, 320, END, 0, 0, 0, 0, 0)


def test_an_embedding_longer_than_a_chunk_is_refused(short, names):
    names.add("lake", 7)
    with pytest.raises(PromptSyntaxError, match=r'"lake" has 7 vectors.* at most 6'):
        chunks("a lake", short, names.find)


# Names of embeddings


def test_names_longest_first_whatever_the_order(encode):
    names = EmbeddingNames(encode)
    names.add("red car", 2)
    names.add("red car park", 3)
    names.add("red", 1)
    tokens = encode("a red car park")
    assert names.find(tokens, 0) is None
    assert names.find(tokens, 1) == ("red car park", 3, 3)
    names.remove("red car park")
    assert names.find(tokens, 1) == ("red car", 2, 2)
    assert names.find(encode("red"), 0) == ("red", 1, 1)
    names.remove("red car park")
    names.remove("never there")


def test_names_replace_and_share_tokens(encode):
    names = EmbeddingNames(encode)
    names.add("fox", 1)
    names.add("Fox", 2)
    assert names.find(encode("FOX"), 0) == ("fox", 1, 1)
    names.add("fox", 5)  # comes last now, as in the host
    assert names.find(encode("fox"), 0) == ("Fox", 1, 2)
    names.remove("Fox")
    assert names.find(encode("fox"), 0) == ("fox", 1, 5)


def test_a_name_without_tokens_is_refused(encode):
    with pytest.raises(PromptSyntaxError, match="name"):
        EmbeddingNames(encode).add(" ", 1)


# Extra networks


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a <lora:x:0.5> b<hypernet:y>", "a  b", ["<lora:x:0.5>", "<hypernet:y>"]),
        ("<a<b:c>", "<a", ["<b:c>"]),
        ("<lora:x<b:c>>", ">", ["<lora:x<b:c>"]),
        ("<lora:x\ny>", "", ["<lora:x\ny>"]),
        ("a < b > c", "a < b > c", []),
        ("<lora> <lora:> <:x> <lora:x", "<lora> <lora:> <:x> <lora:x", []),
        ("<3 <lo ra:x>", "<3 <lo ra:x>", []),
    ],
)
def test_extra_network_tags(prompt, text, tags):
    assert extra_network_tags(prompt) == (text, tags)


# Weights onto the encoder's output


def test_apply_emphasis_does_what_its_formula_says():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, generator=generator) + 0.5
    weights = torch.rand(2, 5, generator=generator) + 0.5
    weighted = z * weights.reshape(2, 5, 1)
    assert apply_emphasis(z, weights, "None") is z
    assert apply_emphasis(z, weights, "Ignore") is z
    assert torch.equal(apply_emphasis(z, weights, "No norm"), weighted)
    original = apply_emphasis(z, weights, "Original")
    assert torch.equal(original, weighted * (z.mean() / weighted.mean()))
    torch.testing.assert_close(original.mean(), z.mean())
    # One mean for the whole batch: the texts of a batch change each other.
    assert not torch.allclose(original[:1], apply_emphasis(z[:1], weights[:1], "Original"))


def test_apply_emphasis_lets_gradients_through_and_knows_its_modes():
    for mode in EMPHASIS_MODES:
        z = torch.ones(1, 2, 2, requires_grad=True)
        apply_emphasis(z, torch.tensor([[1.0, 2.0]]), mode).square().sum().backward()
        assert z.grad is not None
    with pytest.raises(ValueError, match="No norm"):
        apply_emphasis(torch.ones(1, 1, 1), torch.ones(1, 1), "no norm")


# Properties

SYNTAX = [*"()[]:|\\ \n,aé", "dog", "AND", "BREAK", "1.5", "3", ":0.5]", ":1.2)"]
PROMPTS = st.lists(st.sampled_from(SYNTAX), max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.integers(1, 8), st.booleans())
def test_any_prompt_gives_full_chunks_or_a_clear_refusal(short, prompt, backtrack, emphasis):
    try:
        got, count = chunks(prompt, short, emphasis=emphasis, comma_padding_backtrack=backtrack)
    except PromptSyntaxError:
        return
    assert got
    for chunk in got:
        assert len(chunk.tokens) == len(chunk.weights) == 8
        assert (chunk.tokens[0], chunk.tokens[-1]) == (START, END)
        assert (chunk.weights[0], chunk.weights[-1]) == (1.0, 1.0)
    pairs = parse_attention(prompt) if emphasis else [(prompt, 1.0)]
    wanted = [token for pair in pairs if pair != (BREAK, -1.0) for token in short.encode(pair[0])]
    assert [token for chunk in got for token in text_of(chunk)[0][1:]] == wanted
    assert count >= len(wanted)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.integers(1, 12))
def test_any_prompt_has_a_schedule(prompt, steps):
    schedule = prompt_schedule(prompt, steps)
    ends = [end for end, _ in schedule]
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert ends[0] >= 1
    for _, text in schedule:
        # No text is made up: a prompt is only ever shortened.
        assert len(text) <= len(prompt)
    if "[" not in prompt:
        assert schedule == [(steps, prompt)]


@settings(deadline=None)
@given(PROMPTS)
def test_attention_of_escaped_text_is_the_text(prompt):
    plain = prompt.replace("BREAK", "break")
    escaped = "".join("\\" + letter if letter in "()[]\\" else letter for letter in plain)
    assert parse_attention(escaped) == [(plain, 1.0)]


@settings(deadline=None)
@given(PROMPTS)
def test_parts_of_and_are_parts_of_the_prompt(prompt):
    parts = split_and(prompt)
    assert len(parts) >= 1
    assert all(text in prompt for text, _ in parts)


def test_imports_without_torch():
    names = "lib_estimate.prompt.chunks, lib_estimate.prompt.schedule"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=False).returncode == 0
