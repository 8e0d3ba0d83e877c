"""Real files in real folders; what is replaced by hand is only there to make something fail."""

import base64
import errno
import io
import json
import os
import pickle
import pickletools
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, PngImagePlugin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_estimate.errors import EmbeddingFileError, EstimateError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.files.names import FORMATS, check_name, embedding_path, find_existing, shadowed_word
from lib_estimate.files.reading import load
from lib_estimate.files.writing import save

VOCABULARY = Path(__file__).parents[1] / "shapes_sd" / "tokenizer"
METADATA = {
    "prompt": 'a (red:1.4) "circle" — 赤い円, BREAK',
    "negative_prompt": "",
    "seed": 2**53 + 1,
    "step": 120,
    "sd_checkpoint": "cc6cb27103",
    "sd_checkpoint_name": "v1-5-pruned-emaonly",
    "errors": [0.1, 1e-30, 3],
    "settings": {"loss": "denoising", "resume": None, "half": True},
}


def vectors(count=3, width=32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def sd1(name="style", tensor=None, metadata=METADATA):
    return Embedding(name, {"clip_l": vectors() if tensor is None else tensor}, metadata)


def sdxl(name="style"):
    return Embedding(name, {"clip_l": vectors(4, 24, 1), "clip_g": vectors(4, 40, 2)}, METADATA)


def bits(tensor):
    return tensor.contiguous().view(torch.int32).tolist()


def state(folder):
    """Every file below: its bytes and when it was changed."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(str(VOCABULARY))


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("file_format", FORMATS)
def test_round_trip(tmp_path, file_format):
    path = embedding_path(tmp_path / "new" / "folder", "style", file_format)
    odd = vectors()
    odd[0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])  # negative zero, the smallest and almost the largest float32
    save(sd1(tensor=odd), path)
    read = load(path)
    assert read.name == "style"
    assert list(read.vectors) == ["clip_l"]
    assert read.vectors["clip_l"].dtype == torch.float32
    assert bits(read.vectors["clip_l"]) == bits(odd)
    assert read.metadata == METADATA
    assert list(tmp_path.rglob("*.*")) == [path]


@pytest.mark.parametrize(
    "metadata", [{}, {"tuple": (1, 2), 3: "three"}, {"sd_checkpoint_name": "half \ud83d", "step": "none"}]
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_any_metadata_comes_back_as_json_would_give_it(tmp_path, file_format, metadata):
    path = tmp_path / f"style.{file_format}"
    save(sd1(metadata=metadata), path)
    assert load(path).metadata == json.loads(json.dumps(metadata))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_loss_that_was_infinite_does_not_cost_the_embedding(tmp_path, file_format):
    path = tmp_path / f"style.{file_format}"
    save(sd1(metadata={"errors": [float("nan"), float("inf"), 1.0]}), path)
    assert load(path).metadata == {"errors": [None, None, 1.0]}


def test_metadata_that_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(EmbeddingFileError, match=r"metadata\.settings\.folder is a \w*Path"):
        save(sd1(metadata={"settings": {"folder": tmp_path}}), tmp_path / "style.pt")
    assert not list(tmp_path.iterdir())


def test_sdxl_round_trip(tmp_path):
    path = tmp_path / "style.safetensors"
    save(sdxl(), path)
    read = load(path)
    assert {key: bits(value) for key, value in read.vectors.items()} == {
        key: bits(value) for key, value in sdxl().vectors.items()
    }
    assert read.metadata == METADATA
    assert set(safetensors.torch.load_file(path)) == {"clip_l", "clip_g"}


def test_sdxl_is_refused_as_pt(tmp_path):
    with pytest.raises(EmbeddingFileError, match="Save SDXL as safetensors"):
        save(sdxl(), tmp_path / "style.pt")
    assert not list(tmp_path.iterdir())


def test_sd2_key_is_written_like_any_single_one(tmp_path):
    for file_format in FORMATS:
        path = tmp_path / f"style.{file_format}"
        save(Embedding("style", {"clip_h": vectors()}, {}), path)
        assert bits(load(path).vectors["clip_l"]) == bits(vectors())


@pytest.mark.parametrize("file_format", FORMATS)
def test_only_the_vectors_are_written_not_the_storage_they_are_a_view_of(tmp_path, file_format):
    table = vectors(1000, 64)
    for view in (table[7:9], table.T[:2], table[:1].expand(2, 64), table[7:9].half(), torch.nn.Parameter(table[7:9])):
        path = tmp_path / f"style.{file_format}"
        save(sd1(tensor=view, metadata={}), path, overwrite=True)
        assert path.stat().st_size < view.numel() * 4 + 1500
        read = load(path).vectors["clip_l"]
        assert torch.equal(read, view.detach().float())
        assert read.untyped_storage().nbytes() == view.numel() * 4


# ---------------------------------------------------------------------------------------------------------------------
# What others make of the files


def test_pt_is_the_container_and_the_dict_that_webuis_accept(tmp_path):
    path = tmp_path / "style.pt"
    save(sd1(), path)
    data = path.read_bytes()
    assert not data.startswith(b"PK")
    assert pickle.loads(data) == 0x1950A86A20F9469CFC6C  # the first of five pickles: torch's magic number

    content = torch.load(path, weights_only=True)
    assert content["string_to_token"] == {"*": 265}
    assert type(content["string_to_param"]) is dict
    assert list(content["string_to_param"]) == ["*"]
    assert type(content["string_to_param"]["*"]) is torch.Tensor
    assert {key: content[key] for key in ("name", "step", "sd_checkpoint", "sd_checkpoint_name")} == {
        "name": "style",
        "step": 120,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": "v1-5-pruned-emaonly",
    }
    assert json.loads(content["embedding_estimate"]) == METADATA


def test_pt_asks_for_nothing_that_the_webuis_check_of_pickles_forbids(tmp_path):
    path = tmp_path / "style.pt"
    save(sd1(), path)
    asked = set()
    with open(path, "rb") as file:
        for _ in range(5):
            for code, argument, _ in pickletools.genops(file):
                assert code.name not in ("STACK_GLOBAL", "INST")
                if code.name == "GLOBAL":
                    asked.add(argument)
    assert asked == {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}


def test_safetensors_holds_one_tensor_and_the_rest_as_text(tmp_path):
    path = tmp_path / "style.safetensors"
    save(sd1(), path)
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.keys()) == ["emb_params"]
        header = file.metadata()
    assert json.loads(header.pop("embedding_estimate")) == METADATA
    assert header == {
        "format": "pt",
        "name": "style",
        "step": "120",
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": "v1-5-pruned-emaonly",
    }


@pytest.mark.parametrize("file_format", FORMATS)
def test_diffusers_loads_it(tmp_path, file_format):
    textual_inversion = pytest.importorskip("diffusers.loaders.textual_inversion", reason="diffusers is not installed")

    class Pipeline(textual_inversion.TextualInversionLoaderMixin):
        """As much of a pipeline as the loader asks for."""

        hf_device_map = None

        def __init__(self):
            self.tokenizer = CLIPTokenizer.from_pretrained(str(VOCABULARY))
            size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            self.text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(self.tokenizer), **size))
            self.components = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}

    path = tmp_path / f"my_style.{file_format}"
    save(sd1("my_style"), path)
    pipeline = Pipeline()
    # A .safetensors file has no place for a name that diffusers looks at; the .pt file has one.
    pipeline.load_textual_inversion(str(path), token="my_style" if file_format == "safetensors" else None)
    prompt = pipeline.maybe_convert_prompt("a my_style picture", pipeline.tokenizer)
    ids = pipeline.tokenizer(prompt, add_special_tokens=False).input_ids
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert len(ids) == 1 + 3 + 1
    assert bits(table[ids[1:4]]) == bits(vectors())


@pytest.mark.parametrize("file_format", FORMATS)
def test_loaders_that_a_webui_wraps_are_not_used(tmp_path, monkeypatch, file_format):
    def wrapped(*_, **__):
        raise AssertionError("Forge would rename the file now")

    monkeypatch.setattr(torch, "load", wrapped)
    monkeypatch.setattr(safetensors.torch, "load_file", wrapped)
    path = tmp_path / f"style.{file_format}"
    save(sd1(), path)
    assert load(path).metadata == METADATA


# ---------------------------------------------------------------------------------------------------------------------
# What stands in the folder already


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_existing_file_is_not_overwritten_unasked(tmp_path, file_format):
    path = tmp_path / f"style.{file_format}"
    save(sd1(), path)
    before = state(tmp_path)
    with pytest.raises(EmbeddingFileError, match="exists already"):
        save(sd1(tensor=vectors(seed=5)), path)
    assert state(tmp_path) == before


@pytest.mark.parametrize("file_format", FORMATS)
def test_overwriting_changes_that_file_alone(tmp_path, file_format):
    path = tmp_path / f"style.{file_format}"
    for other in ("style.bin", "style.preview.png", "style.json", "other.pt", "sub/style.pt"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"theirs")
    others = state(tmp_path)
    save(sd1(), path)
    save(sd1(tensor=vectors(5, seed=5)), path, overwrite=True)
    assert bits(load(path).vectors["clip_l"]) == bits(vectors(5, seed=5))
    after = state(tmp_path)
    after.pop(path)
    assert after == others


def test_a_link_that_leads_nowhere_is_taken_for_a_file(tmp_path):
    path = tmp_path / "style.pt"
    path.symlink_to(tmp_path / "unmounted" / "style.pt")
    with pytest.raises(EmbeddingFileError, match="exists already"):
        save(sd1(), path)
    assert path.is_symlink()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_ours_is_written_is_kept(tmp_path, monkeypatch, links):
    path = tmp_path / "style.pt"
    fsync = os.fsync

    def rival(descriptor):
        path.write_bytes(b"theirs")
        fsync(descriptor)

    monkeypatch.setattr(writing.os, "fsync", rival)
    if not links:
        no_hard_links(monkeypatch)
    with pytest.raises(EmbeddingFileError, match="exists already"):
        save(sd1(), path)
    assert {file: data for file, (data, _) in state(tmp_path).items()} == {path: b"theirs"}


def no_hard_links(monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(writing.os, "link", link)


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    no_hard_links(monkeypatch)
    path = tmp_path / "style.pt"
    save(sd1(), path)
    assert load(path).metadata == METADATA
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# When something fails half-way


def broken_replace(monkeypatch):
    def replace(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(writing.os, "replace", replace)
    monkeypatch.setattr(writing.os, "rename", replace)


def broken_disk(monkeypatch):
    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", fsync)


def broken_bytes(monkeypatch):
    read = reading._file_bytes

    def flipped(file):
        data = bytearray(read(file))
        data[-5] ^= 1
        return bytes(data)

    monkeypatch.setattr(reading, "_file_bytes", flipped)


def broken_file(monkeypatch):
    read = reading._file_bytes
    monkeypatch.setattr(reading, "_file_bytes", lambda file: read(file)[:-5])


def interrupted(monkeypatch):
    def fsync(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing.os, "fsync", fsync)


FAULTS = [
    (broken_replace, EmbeddingFileError, "Permission denied"),
    (broken_disk, EmbeddingFileError, "No space left"),
    (broken_bytes, EmbeddingFileError, "not what was written"),
    (broken_file, EmbeddingFileError, "not what was written"),
    (interrupted, KeyboardInterrupt, None),
]


@pytest.mark.parametrize(("fault", "error", "text"), FAULTS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, file_format, fault, error, text):
    path = tmp_path / f"style.{file_format}"
    save(sd1(), path)
    before = state(tmp_path)
    fault(monkeypatch)
    with pytest.raises(error, match=text):
        save(sd1(tensor=vectors(seed=5)), path, overwrite=True)
    assert state(tmp_path) == before


@pytest.mark.parametrize(("fault", "error", "text"), FAULTS)
def test_a_failure_leaves_an_empty_folder_empty(tmp_path, monkeypatch, fault, error, text):
    fault(monkeypatch)
    no_hard_links(monkeypatch)  # else os.replace isn't needed
    with pytest.raises(error, match=text):
        save(sd1(), tmp_path / "style.pt")
    assert not list(tmp_path.iterdir())


def test_metadata_that_comes_back_different_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_own_record", lambda about: {**METADATA, "seed": 1})
    for file_format in FORMATS:
        with pytest.raises(EmbeddingFileError, match="not what was written"):
            save(sd1(), tmp_path / f"style.{file_format}")
    assert not list(tmp_path.iterdir())


def test_the_unfinished_file_does_not_look_like_an_embedding(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(writing.os, "fsync", lambda _: seen.extend(tmp_path.iterdir()))
    save(sd1(), tmp_path / "style.pt")
    assert [path.suffix for path in seen] == [".tmp"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_others_may_read_the_file_as_far_as_the_user_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        save(sd1(), tmp_path / "style.pt")
    finally:
        os.umask(before)
    assert (tmp_path / "style.pt").stat().st_mode & 0o777 == 0o640


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "embeddings").write_bytes(b"a file")
    with pytest.raises(EmbeddingFileError, match=r"was not saved in .*embeddings"):
        save(sd1(), tmp_path / "embeddings" / "style.pt")
    assert (tmp_path / "embeddings").read_bytes() == b"a file"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"clip_l": torch.tensor([[1.0, float("nan")]])}, "NaN or infinity"),
        ({"clip_l": torch.tensor([[1.0, float("inf")]])}, "NaN or infinity"),
        ({"clip_l": torch.tensor([[1e300]], dtype=torch.float64)}, "NaN or infinity"),
        ({"clip_l": torch.zeros(0, 32)}, "no vectors"),
        ({"clip_l": torch.zeros(2, 3, 32)}, r"\[N, width\]"),
        ({"clip_l": torch.zeros(2, 32, dtype=torch.int64)}, "floating-point"),
        ({"clip_l": torch.zeros(2, 32).to_sparse()}, "floating-point"),
        ({"clip_l": torch.zeros(2, 32, device="meta")}, "floating-point"),
        ({"clip_l": [[1.0]]}, "not a tensor"),
        ({"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(3, 40)}, "as many of one as of the other"),
        ({"clip_l": torch.zeros(2, 32), "t5": torch.zeros(2, 40)}, "expected one tensor"),
        ({}, "found nothing"),
    ],
)
def test_vectors_no_host_could_use_are_refused(tmp_path, content, text):
    with pytest.raises(EmbeddingFileError, match=text):
        save(Embedding("style", content, {}), tmp_path / "style.safetensors")
    assert not list(tmp_path.iterdir())


def test_name_and_file_must_agree(tmp_path):
    for path in (tmp_path / "other.pt", tmp_path / "Style.pt"):
        with pytest.raises(EmbeddingFileError, match="Give both the same name"):
            save(sd1("style"), path)
    with pytest.raises(EmbeddingFileError, match="AND is a command"):
        save(sd1("you AND me"), tmp_path / "you AND me.pt")
    with pytest.raises(EmbeddingFileError, match=r"ends in: \.pt, \.safetensors"):
        save(sd1("style"), tmp_path / "style.bin")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "has no name"),
        ("  \t ", "has no name"),
        *[(f"a{character}b", "file names can't contain") for character in '<>:"/\\|?*'],
        ("../style", "file names can't contain"),
        ("C:style", "file names can't contain"),
        ("line\nbreak", "invisible character"),
        ("nul\0byte", "invisible character"),
        ("a\u202egnp", "invisible character"),
        ("half\ud83d", "invisible character"),
        (".hidden", "starts with a dot"),
        ("..", "starts with a dot"),
        ("style.", "drops a dot"),
        *[(name, "device") for name in ("CON", "nul", "com1", "LPT9.v2", "aux.x", "con .x", "COM¹", "CONIN$")],
        ("x" * 129, "129 bytes"),
        ("赤" * 43, "129 bytes"),
        ("style.preview", "card pictures"),
        ("style.Preview", "card pictures"),
        ("style.pt", 'leave the ending ".pt" out'),
        ("style.SafeTensors", "leave the ending"),
        ("style.png", "leave the ending"),
        *[(f"a{character}b", "means something in a prompt") for character in ",()[]#"],
        ("you AND me", "AND is a command"),
        ("take-a-BREAK", "BREAK is a command"),
    ],
)
def test_bad_names(tmp_path, name, reason):
    with pytest.raises(EmbeddingFileError, match=reason) as caught:
        check_name(name)
    assert isinstance(caught.value, EstimateError)
    assert str(caught.value).isprintable()
    with pytest.raises(EmbeddingFileError):
        embedding_path(tmp_path, name, "pt")


@pytest.mark.parametrize(
    "name",
    ["style", "my style v1.5", "赤い円", "naïve", "x" * 128, "console", "and break", "BREAKFAST", "_AND_", "👍🏽"],
)
def test_good_names_can_be_saved_and_found(tmp_path, name):
    assert check_name(f" {name}\n") == name
    for file_format in FORMATS:
        path = embedding_path(tmp_path, name, file_format)
        save(sd1(name), path)
        assert load(path).name == name
        assert find_existing(tmp_path, name).stem == name


def test_names_are_composed_as_keyboards_type_them():
    assert check_name("cafe\u0301") == "caf\u00e9"


def test_unknown_format(tmp_path):
    with pytest.raises(EmbeddingFileError, match="Choose one of: pt, safetensors"):
        embedding_path(tmp_path, "style", "ckpt")


@pytest.mark.parametrize(
    "file", ["Style.pt", "STYLE.bin", "style.SafeTensors", "style.png", "style.webp", "sub/deeper/sTyle.pt"]
)
def test_existing_files_are_found(tmp_path, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    assert find_existing(tmp_path, "style") == tmp_path / file
    assert find_existing(tmp_path, "styl") is None


def test_files_that_are_no_embeddings_do_not_take_the_name(tmp_path):
    for file in ("style.preview.png", "style.json", "style.txt", "style.pt.optim", "mystyle.pt", "style"):
        (tmp_path / file).write_bytes(b"")
    (tmp_path / "style.pt").mkdir()
    assert find_existing(tmp_path, "style") is None
    assert find_existing(tmp_path / "missing", "style") is None


def test_accents_and_links_when_looking_for_files(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "embeddings").mkdir()
    (tmp_path / "embeddings" / "circle").symlink_to(tmp_path / "embeddings", target_is_directory=True)
    (tmp_path / "embeddings" / "more").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "CAFE\u0301.pt").write_bytes(b"")
    assert find_existing(tmp_path / "embeddings", "caf\u00e9") == tmp_path / "embeddings" / "more" / "CAFE\u0301.pt"


def test_words_that_an_embedding_would_shadow(tokenizer):
    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for word in ("cat", "Cat", "masterpiece", "kimono", "a", "7"):
        assert f'"{word}"' in shadowed_word(word, encode)
    for name in ("sks", "easynegative", "black cat", "cat_emb", "赤い円"):
        assert shadowed_word(name, encode) is None
    assert shadowed_word("kimono", encode, common_below=30_000) is None
    assert shadowed_word("sks", encode, common_below=49_408)


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def webui_dict(**changes):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors()},
        "name": "inner name",
        "step": 4999,
        "sd_checkpoint": "cc6cb27103",
        "sd_checkpoint_name": None,
        **changes,
    }


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_webui_pt(tmp_path, zipped, suffix):
    path = tmp_path / f"theirs{suffix}"
    torch.save(webui_dict(), path, _use_new_zipfile_serialization=zipped)
    read = load(path)
    assert read.name == "theirs"
    assert bits(read.vectors["clip_l"]) == bits(vectors())
    assert read.metadata == {"name": "inner name", "step": 4999, "sd_checkpoint": "cc6cb27103"}


def test_webui_pt_with_trained_parameter_in_half_precision(tmp_path):
    torch.save(webui_dict(string_to_param={"*": torch.nn.Parameter(vectors().half())}), tmp_path / "theirs.pt")
    read = load(tmp_path / "theirs.pt").vectors["clip_l"]
    assert torch.equal(read, vectors().half().float())
    assert not read.requires_grad


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch before 2.5 refuses ParameterDict")
def test_the_first_embeddings_had_a_parameter_dict(tmp_path):
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors()})}
    torch.save(content, tmp_path / "theirs.pt")
    assert bits(load(tmp_path / "theirs.pt").vectors["clip_l"]) == bits(vectors())


@pytest.mark.parametrize("tensor", [vectors(), vectors(1)[0]])
def test_diffusers_dict(tmp_path, tensor):
    torch.save({"<cat-toy>": tensor}, tmp_path / "learned_embeds.bin")
    read = load(tmp_path / "learned_embeds.bin")
    assert bits(read.vectors["clip_l"]) == bits(tensor.reshape(-1, 32))
    assert read.metadata == {"token": "<cat-toy>"}


def test_a_table_dragged_along_is_not_kept(tmp_path):
    table = vectors(5000, 32)
    torch.save({"<cat-toy>": table[4999]}, tmp_path / "learned_embeds.bin")
    assert (tmp_path / "learned_embeds.bin").stat().st_size > table.numel() * 4
    assert load(tmp_path / "learned_embeds.bin").vectors["clip_l"].untyped_storage().nbytes() == 32 * 4


def test_sdxl_pt_of_others(tmp_path):
    torch.save(sdxl().vectors, tmp_path / "theirs.pt")
    assert {key: value.shape for key, value in load(tmp_path / "theirs.pt").vectors.items()} == {
        "clip_l": (4, 24),
        "clip_g": (4, 40),
    }


def test_safetensors_of_others(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file({"<cat-toy>": vectors().bfloat16()}, path, {"ss_tag": "cat", "embedding_estimate": "{"})
    read = load(path)
    assert torch.equal(read.vectors["clip_l"], vectors().bfloat16().float())
    assert read.metadata == {"ss_tag": "cat", "embedding_estimate": "{"}
    safetensors.torch.save_file({"emb_params": vectors()}, path)
    assert load(path).metadata == {}


def write_card(path, content, spaces=0):
    """As the webui saves one: a picture with base64 of JSON in a text chunk."""
    text = json.dumps(content, default=lambda tensor: {"TORCHTENSOR": tensor.tolist()}) + " " * spaces
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "a cat")
    about.add_text("sd-ti-embedding", base64.b64encode(text.encode()))
    Image.new("RGB", (8, 8)).save(path, pnginfo=about)


@pytest.mark.parametrize("spaces", range(3))  # base64 of any length: with and without a sign of its end
def test_png_card(tmp_path, spaces):
    write_card(tmp_path / "inner-4999.png", webui_dict(), spaces)
    read = load(tmp_path / "inner-4999.png")
    assert read.name == "inner name"
    assert bits(read.vectors["clip_l"]) == bits(vectors())
    assert read.metadata == {"name": "inner name", "step": 4999, "sd_checkpoint": "cc6cb27103"}


def test_pictures_without_an_embedding_in_their_text(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.webp")
    for name in ("picture.png", "picture.webp"):
        with pytest.raises(EmbeddingFileError, match="hidden in the pixels"):
            load(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Files that can't be read, which stay as they are


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil was here",)


def torch_bytes(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def saved_bytes(folder, file_format):
    path = folder / f"style.{file_format}"
    save(sd1(), path)
    data = path.read_bytes()
    path.unlink()
    return data


def card_bytes(text):
    body = b"sd-ti-embedding\0" + text
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", len(body), b"tEXt") + body


BROKEN = [
    ("empty.pt", b"", "is empty"),
    ("page.pt", b"<!DOCTYPE html><html>", r"starts with '<!DOCTYPE html>"),
    ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1", "starts with 'version https:"),
    ("plain.pt", pickle.dumps({"a": 1}), "starts with"),
    ("zip.pt", b"PK\x03\x04 but no zip", "cut off or damaged"),
    ("model.pt", torch_bytes({"a": vectors(), "b": vectors()}), r"2 entries \(a, b\)"),
    ("big.pt", torch_bytes({str(i): vectors() for i in range(9)}), r"9 entries \(0, 1, 2, 3, \.\.\.\)"),
    ("list.pt", torch_bytes([vectors()]), "holds a list"),
    ("tensor.pt", torch_bytes(vectors()), "holds a Tensor"),
    ("nothing.pt", torch_bytes({}), "holds nothing"),
    ("number.pt", torch_bytes({"a": 1}), "is a int, not a tensor"),
    ("two.pt", torch_bytes(webui_dict(string_to_param={"*": vectors(), "+": vectors()})), r"2 entries \(\*, \+\)"),
    ("noparam.pt", torch_bytes(webui_dict(string_to_param=3)), "string_to_param holds a int"),
    ("nan.pt", torch_bytes({"a": vectors() / 0}), "NaN or infinity"),
    ("3d.pt", torch_bytes({"a": vectors()[None]}), r"float32 \[1, 3, 32\]"),
    ("repeated.pt", torch_bytes({"a": torch.zeros(1).expand(2**20, 2**20)}), r"\[1048576, 1048576\]"),
    ("pair.pt", torch_bytes({"clip_l": vectors(3), "clip_g": vectors(4)}), "as many of one as of the other"),
    ("evil.pt", torch_bytes({"string_to_param": Evil()}), r"asks for \w+\.mkdir; a file that wants to run code"),
    ("evil2.pt", torch_bytes({"string_to_param": Evil()}, zipped=False), r"asks for \w+\.mkdir"),
    ("lora.safetensors", safetensors.torch.save({"a": vectors(), "b": vectors()}), r"2 entries \(a, b\)"),
    ("none.safetensors", safetensors.torch.save({}), "holds nothing"),
    ("ints.safetensors", safetensors.torch.save({"a": torch.zeros(2, 3, dtype=torch.int32)}), "floating-point"),
    ("style.ckpt", b"anything", "no embedding file"),
    ("cut.png", card_bytes(b"eyJzdHJpbmdf"), "cut off or damaged"),
    ("ragged.png", card_bytes(base64.b64encode(b'{"a": {"TORCHTENSOR": [[1], [2, 3]]}}')), "cut off or damaged"),
    ("list.png", card_bytes(base64.b64encode(b"[1]")), "text holds a list"),
    ("short.png", card_bytes(b"")[:10], "no embedding in its text"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_broken_and_foreign_files_are_refused_and_untouched(tmp_path, monkeypatch, name, data, reason):
    monkeypatch.chdir(tmp_path)  # where Evil would leave its mark
    path = tmp_path / name
    path.write_bytes(data)
    before = state(tmp_path)
    with pytest.raises(EmbeddingFileError, match=reason) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert state(tmp_path) == before
    assert not (tmp_path / "evil was here").exists()


@pytest.mark.parametrize("file_format", FORMATS)
def test_cut_off_anywhere_a_file_is_refused(tmp_path, file_format):
    data = saved_bytes(tmp_path, file_format)
    path = tmp_path / f"style.{file_format}"
    for length in (1, 9, 40, len(data) // 2, len(data) - 200, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EmbeddingFileError):
            load(path)
        assert path.read_bytes() == data[:length]


def test_missing_files_folders_and_checkpoints(tmp_path, monkeypatch):
    with pytest.raises(EmbeddingFileError, match="No such file"):
        load(tmp_path / "missing.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(EmbeddingFileError, match="can't be read"):
        load(tmp_path / "folder.pt")
    with open(tmp_path / "checkpoint.safetensors", "wb") as file:
        file.truncate(600 << 20)  # takes no room on the disk
    with pytest.raises(EmbeddingFileError, match="600 MB"):
        load(tmp_path / "checkpoint.safetensors")
