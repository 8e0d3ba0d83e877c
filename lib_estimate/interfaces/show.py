"""What the commands `parse` and `inspect` show: how prompts are read, and what an embedding file holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lib_estimate.errors import EstimateError, PromptSyntaxError
from lib_estimate.request import ModelOptions

if TYPE_CHECKING:  # torch is slow to load, and `parse` needs none
    from lib_estimate.files.embedding import Embedding
    from lib_estimate.report.inside import Look


def parse(args: argparse.Namespace) -> int:
    if args.steps < 1:
        raise EstimateError(f"--steps is {args.steps}: it must be at least 1.")
    from lib_estimate.prompt.vocabulary import bundled

    vocabulary, decode = bundled()
    rows = [_parsed(prompt, args.steps, vocabulary) for prompt in args.prompts]
    if args.json:
        sys.stdout.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(_parse_table(row, decode) for row in rows))
    return 1 if any("error" in row for row in rows) else 0


def _parsed(prompt: str, steps: int, vocabulary: Any) -> dict[str, Any]:
    """How one prompt is read; chunks without their padding."""
    from lib_estimate.prompt import attention, chunks, schedule

    try:
        found, count = chunks.chunks(prompt, vocabulary)
        return {
            "prompt": prompt,
            "attention": [list(pair) for pair in attention.parse_attention(prompt)],
            f"schedule_{steps}": [list(pair) for pair in schedule.prompt_schedule(prompt, steps)],
            "and": [list(pair) for pair in schedule.split_and(prompt)],
            "token_count": count,
            "chunks": [_without_padding(chunk, vocabulary) for chunk in found],
        }
    except PromptSyntaxError as error:
        return {"prompt": prompt, "error": str(error)}


def _without_padding(chunk: Any, vocabulary: Any) -> dict[str, list]:
    length = len(chunk.tokens)
    while (
        length > 1 and chunk.tokens[length - 1] in (vocabulary.end, vocabulary.pad) and chunk.weights[length - 1] == 1
    ):
        length -= 1
    return {"tokens": list(chunk.tokens[:length]), "weights": [round(w, 9) for w in chunk.weights[:length]]}


def _parse_table(row: dict[str, Any], decode: Any) -> str:
    lines = [f"prompt: {row['prompt']}"]
    if "error" in row:
        return "\n".join([*lines, f"  error: {row['error']}", ""])
    schedule = next(value for key, value in row.items() if key.startswith("schedule_"))
    lines.append(f"  {row['token_count']} tokens in {len(row['chunks'])} chunk(s)")
    if len(row["and"]) > 1:
        lines += [f"  AND part, weight {weight:g}: {text.strip()}" for text, weight in row["and"]]
    if len(schedule) > 1:
        lines += [f"  until step {step}: {text}" for step, text in schedule]
    for number, chunk in enumerate(row["chunks"], 1):
        lines.append(f"  chunk {number}:")
        pairs = list(zip(chunk["tokens"], chunk["weights"], strict=True))[1:]
        lines += [f"    {decode(token):<20} {weight:g}" for token, weight in pairs]
    return "\n".join([*lines, ""])


def inspect(args: argparse.Namespace) -> int:
    from lib_estimate.files import reading
    from lib_estimate.report import inside

    embedding = reading.load(args.file)
    looks = _beside_words(embedding, args.model) if args.model else inside.lengths(embedding.vectors)
    if args.json:
        vectors = {key: look.record() for key, look in looks.items()}
        record = {"name": embedding.name, "vectors": vectors, "metadata": embedding.metadata}
        sys.stdout.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return 0
    lines = [f"{embedding.name}", *(line for key, look in looks.items() for line in _look_lines(key, look))]
    if not args.model:
        lines.append("  Which words these are near, only a model knows: give it as --model.")
    lines += [f"  {key}: {value}" for key, value in embedding.metadata.items()]
    sys.stdout.write("\n".join(map(_printable, lines)) + "\n")
    return 0


def _printable(text: str) -> str:
    """Without what would steer the terminal: the text is anyone's."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _beside_words(embedding: Embedding, model: str) -> dict[str, Look]:
    from lib_estimate.hosts.standalone import StandaloneHost
    from lib_estimate.learn.continued import fitting_vectors
    from lib_estimate.report.inside import look_inside

    # Only token tables are looked at: there is nothing for a GPU to do, and no need for more memory than the file's.
    host = StandaloneHost(ModelOptions(model=model, device="cpu", dtype="float16"))
    with host.session() as session:
        return look_inside(fitting_vectors(embedding, session.info), session.words())


def _look_lines(key: str, look: Look) -> Iterator[str]:
    mean = look.record()["length"]
    beside = "" if look.typical is None else f"; a typical word's is {look.typical:.3f}"
    yield f"  {key}: {len(look.vectors)} vectors of width {look.width}, mean length {mean:.3f}{beside}"
    for number, vector in enumerate(look.vectors, 1):
        times = "" if look.typical is None else f"  {vector.length / look.typical:6.2f} x"
        words = ", ".join(f"{word} {cosine:.2f}" for word, cosine in vector.words)
        yield f"    {number:>3}  length {vector.length:.3f}{times}  {words}".rstrip()
    yield from (f"  warning: {warning}" for warning in look.warnings())
