"""Names of embeddings: what may be one, where its file belongs, which file has it already."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

from lib_estimate.errors import EmbeddingFileError

FORMATS = ("pt", "safetensors")
TORCH_SUFFIXES = (".pt", ".bin")
IMAGE_SUFFIXES = (".png", ".webp", ".jxl", ".avif")
EMBEDDING_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", *IMAGE_SUFFIXES)

MAX_NAME_BYTES = 128  # with ".safetensors" or ".preview.png" still below the 143 of an encrypted Linux home

LEFT_FOR_ENDINGS = 8  # such as -neg, which is put behind a cleaned name

EDGES = "".join(filter(str.isspace, map(chr, range(0x3001)))) + ".-"  # nothing of it at a cleaned name's ends

FORBIDDEN_BY_FILES = '<>:"/\\|?*'
FORBIDDEN_BY_PROMPTS = ",()[]#"  # `:`, `<`, `|` and the backslash are refused by file systems already
PROMPT_WORDS = re.compile(r"\b(AND|BREAK)\b")
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # Unicode categories


def check_name(name: str) -> str:
    """Returns the name without surrounding space and in composed Unicode, or says why it can't be used."""
    name = unicodedata.normalize("NFC", name).strip()
    if not name:
        raise EmbeddingFileError("The embedding has no name. Type one: it will be the word that stands in prompts.")
    for problem in (_file_problem(name), _prompt_problem(name)):
        if problem:
            shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
            raise EmbeddingFileError(f'"{shown}" can\'t be the name of an embedding: {problem}')
    return name


def _file_problem(name: str) -> str | None:
    """What Windows, Linux or a webui's look at its folder would make of a file of this name."""
    bad = sorted(set(name) & set(FORBIDDEN_BY_FILES))
    if bad:
        return f"file names can't contain {' '.join(bad)}. Leave that out."
    if any(unicodedata.category(character) in INVISIBLE for character in name):
        return "it contains an invisible character. Type the name instead of pasting it."
    if name.startswith("."):
        return "a file that starts with a dot is hidden. Start with a letter or a digit."
    if name.endswith("."):
        return "Windows drops a dot at the end. Leave it out."
    if DEVICE_NAME.fullmatch(name):
        return "Windows keeps it for a device. Add something to it."
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it takes {len(name.encode())} bytes, and {MAX_NAME_BYTES} is the most. Choose a shorter one."
    ending = Path(name).suffix.lower()
    if ending == ".preview":
        return 'webuis keep files with ".preview" for the card pictures of embeddings. Leave that ending out.'
    if ending in EMBEDDING_SUFFIXES:
        return f'leave the ending "{ending}" out. The format is chosen apart from the name.'
    return None


def _prompt_problem(name: str) -> str | None:
    """What a webui's prompt parser would do to the name before the name could be found."""
    eaten = sorted(set(name) & set(FORBIDDEN_BY_PROMPTS))
    if eaten:
        return f"{' '.join(eaten)} means something in a prompt, so the name wouldn't be found there. Leave that out."
    word = PROMPT_WORDS.search(name)
    if word:
        return f"{word[0]} is a command in a prompt, so the name wouldn't be found there. Write it in small letters."
    return None


def cleaned(name: str) -> str:
    """The nearest name that can be used; "" where nothing is left of it."""
    name = unicodedata.normalize("NFC", name[: 4 * MAX_NAME_BYTES])  # nothing behind that would be left anyway
    bad = set(FORBIDDEN_BY_FILES + FORBIDDEN_BY_PROMPTS)
    plain = "".join("/" if c in bad or unicodedata.category(c) in INVISIBLE else c for c in name)
    plain = re.sub(r"\s*/[\s/]*", "-", plain)  # whatever stood between two words
    plain = PROMPT_WORDS.sub(lambda word: word[0].lower(), plain).strip(EDGES)
    stem, dot, ending = plain.rpartition(".")
    if f".{ending.lower()}" in (*EMBEDDING_SUFFIXES, ".preview") and dot:
        plain = f"{stem}-{ending}"
    if DEVICE_NAME.fullmatch(plain):
        plain = f"style-{plain}"
    return plain.encode()[: MAX_NAME_BYTES - LEFT_FOR_ENDINGS].decode(errors="ignore").strip(EDGES)


def shadowed_word(name: str, encode: Callable[[str], list[int]], common_below: int = 48_000) -> str | None:
    """A warning if the name is a word that prompts use, else None.

    Webuis look for embeddings among token ids, whatever the case, so an embedding called `cat` stands in wherever
    "cat" is written. `encode` gives a text's ids without start and end. CLIP's vocabulary numbers its pieces in the
    order in which they were merged, the most frequent first, and a text of one token is always a whole word of it. The
    first 48 000 of its 49 408 entries are common by that measure ("cat" is 2368, "kimono" 40 000 or so); the words
    people take on purpose because they mean nothing lie behind ("sks" is 48136).
    """
    ids = encode(name)
    if len(ids) != 1 or ids[0] >= common_below:
        return None
    return (
        f'"{name}" is a word of its own to the model: wherever a prompt says "{name}", in any case, this embedding '
        f'would take its place. Choose a name that isn\'t a word, such as "{name}_emb".'
    )


def embedding_path(folder: Path, name: str, file_format: str) -> Path:
    """Where an embedding of this name and format belongs. Checks both."""
    if file_format not in FORMATS:
        raise EmbeddingFileError(f'There is no format "{file_format}". Choose one of: {", ".join(FORMATS)}.')
    return Path(folder) / f"{check_name(name)}.{file_format}"


def find_existing(folder: Path, name: str) -> Path | None:
    """The file in the folder, or below it, that a webui may take for an embedding of this name; None if there is none.

    Case doesn't count: to Windows it makes no difference, and neither does it to the tokens webuis match names by.
    """
    return next(_called(folder, name), None)


def find_readable(folder: Path, name: str) -> Path | None:
    """The same for somebody who wants to read it: a picture of that name, mostly a mere picture, comes last."""
    return min(_called(folder, name), key=lambda path: path.suffix.lower() in IMAGE_SUFFIXES, default=None)


def listed(folder: Path) -> list[str]:
    """The names of the embedding files in the folder and below, cards left out."""
    suffixes = set(EMBEDDING_SUFFIXES) - set(IMAGE_SUFFIXES)
    found = {path.stem for path in files_below(Path(folder)) if path.suffix.lower() in suffixes}
    return sorted(found, key=folded)


def _called(folder: Path, name: str) -> Iterator[Path]:
    wanted = folded(name)
    for path in files_below(Path(folder)):
        if path.suffix.lower() in EMBEDDING_SUFFIXES and folded(path.stem) == wanted:
            yield path


def folded(name: str) -> str:
    """The same for names that can't be told apart in a folder or a prompt."""
    return unicodedata.normalize("NFC", name).strip().casefold()


def key_of(name: str) -> str:
    """What hidden files of a name are called: the name itself may be too long for that."""
    return hashlib.sha256(folded(name).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def files_below(folder: Path) -> Iterator[Path]:
    """Files, nearest first within each folder; through links too, as webuis look, but through each only once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        for file in sorted(files):
            yield Path(root, file)
