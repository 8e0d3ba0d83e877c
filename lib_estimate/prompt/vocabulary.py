"""CLIP's vocabulary that comes with the project, without transformers, which alone takes a second to load.

Leans on `tokenizers`, which transformers brings along; read as `CLIPTokenizer` of transformers 5 sets it up, of texts
cleaned as a webui does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lib_estimate.prompt.chunks import Vocabulary
from lib_estimate.prompt.cleaning import as_clip

BUNDLED = Path(__file__).parents[2] / "tests" / "shapes_sd" / "tokenizer"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def bundled() -> tuple[Vocabulary, Callable[[int], str]]:
    """What `chunks` needs, and how a token is spelled."""
    about = json.loads((BUNDLED / "tokenizer_config.json").read_text(encoding="utf-8"))
    start, end, pad = (about[f"{which}_token"] for which in ("bos", "eos", "pad"))
    files = [str(BUNDLED / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer(models.BPE.from_file(*files, end_of_word_suffix="</w>", unk_token=about["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted({start, end}))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(as_clip(text), add_special_tokens=False).ids

    def spelled(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False).replace("</w>", " ").strip()

    ids = [tokenizer.token_to_id(token) for token in (start, end, pad)]
    return Vocabulary(encode, *ids, comma=encode(",")[0], chunk_length=about["model_max_length"] - 2), spelled
