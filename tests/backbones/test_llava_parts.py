"""Parts of LLaVA from elsewhere, and the public sizes on the meta device."""

import json
import logging.handlers
import queue
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.llava_loading import pixel_statistics
from umm_zoo.backbones.stored_template import StoredTemplate
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.checkpoints.exported import OWN, REST, read_exported
from umm_zoo.checkpoints.folder import CONTENTS
from umm_zoo.release.parts import LibraryPart
from umm_zoo.release.processors import write_processor

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 1024}
TEXT |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A whole CLIP model, a SigLIP tower and a Llama with a tokenizer, as folders."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sources")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8)).save_pretrained(folder / "clip")
    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(folder / "siglip")
    (folder / "siglip" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(folder / "llama")
    load_tokenizer().save_pretrained(folder / "llama")
    return folder


def test_the_vision_half_of_clip_and_a_language_model_with_a_new_projector(sources):
    said, logger = queue.Queue(), logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler := logging.handlers.QueueHandler(said))
    own = LlavaBackbone.from_parts(str(sources / "clip"), str(sources / "llama"))
    logger.removeHandler(handler)
    assert said.empty()  # no table of the text half, which is left out on purpose
    clip, llama = (kind.from_pretrained(sources / name) for kind, name in ((CLIPModel, "clip"), (LlamaForCausalLM, "llama")))
    for part, theirs in ((own.vision_tower, clip.vision_model), (own.language_model, llama)):
        for (name, one), (other_name, other) in zip(part.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert name == other_name and torch.equal(one, other)
    assert own.projector.linear_1.weight.shape == (24, 16)
    assert own.projector.linear_1.weight.abs().max() <= 1 / 16**0.5  # torch's own initialisation, not the library's normal one
    images, turns = torch.rand(1, 3, 8, 8), [{"role": "user", "text": "<image>?"}, {"role": "assistant", "text": "red"}]
    assert own(own.embed([turns], images, [1])).loss.isfinite()


def test_the_halves_of_a_llava_with_a_new_projector(sources, tmp_path):
    tower = TOWER | {"model_type": "clip_vision_model"}
    whole = LlavaBackbone.from_config({"vision_config": tower, "text_config": TEXT | {"model_type": "llama"}})
    whole.save(tmp_path)
    own = LlavaBackbone.from_parts(str(tmp_path), str(tmp_path))
    for name in ("vision_tower", "language_model"):
        theirs, found = whole.parts()[name].state_dict(), own.parts()[name].state_dict()
        assert theirs.keys() == found.keys() and all(torch.equal(theirs[key], found[key]) for key in theirs)
    assert not torch.equal(own.projector.linear_1.weight, whole.projector.linear_1.weight)
    assert own.config.image_token_id == whole.config.image_token_id and len(own.tokenizer) == len(whole.tokenizer)
    mixed = LlavaBackbone.from_parts(str(sources / "clip"), str(tmp_path))
    images, turns = torch.rand(1, 3, 8, 8), [{"role": "user", "text": "<image>?"}, {"role": "assistant", "text": "red"}]
    assert mixed(mixed.embed([turns], images, [1])).loss.isfinite()
    with torch.device("meta"):
        parts = LlavaBackbone.from_parts(str(tmp_path), str(tmp_path), dtype="bfloat16").parts()
    assert parts["projector"].linear_1.weight.dtype is torch.float32  # as it is off the meta device
    for name, part in own.parts().items():
        assert sum(p.numel() for p in parts[name].parameters()) == sum(p.numel() for p in part.parameters())


@pytest.fixture
def stranger(sources, tmp_path):
    """The Llama with a tokenizer that knows no images and fills its vocabulary, and a chat template for texts."""
    shutil.copytree(sources / "llama", tmp_path / "stranger")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "stranger" / name
        file.write_text(file.read_text().replace("<image>", "<unused>"))
    chat = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    (tmp_path / "stranger" / "chat_template.jinja").write_text(chat)
    return str(tmp_path / "stranger")


def test_no_word_of_a_strangers_tokenizer_stands_for_an_image(sources, stranger):
    own = LlavaBackbone.from_parts(str(sources / "clip"), stranger, dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(stranger).state_dict()
    assert (own.image_token_id, own.tokenizer.convert_tokens_to_ids("<image>"), own.config.text_config.vocab_size) == (
        1024,
        1024,
        1025,
    )
    for name, rows in own.language_model.state_dict().items():
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(rows[:-1] if grown else rows, theirs[name])
        assert not grown or torch.allclose(rows[-1], theirs[name].mean(dim=0), atol=1e-7)
    words = sorted(own.tokenizer.get_vocab().values())
    assert words == list(range(1025))  # 32000, the library's own number, would have been a word of a larger one


def test_a_language_model_that_knew_no_images_leaves_as_a_llava_of_the_library(sources, stranger, tmp_path):
    template = StoredTemplate.from_pretrained(stranger)
    own = LlavaBackbone.from_parts(str(sources / "clip"), stranger, template=template, dtype="float32").eval()
    own.save(tmp_path / "out")
    write_processor(own, tmp_path / "out")
    turns = [{"role": "user", "text": "<image>\nWhich?"}, {"role": "assistant", "text": "red"}]
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    inputs, words = own.embed([turns], images, [1]), AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    text = words.apply_chat_template([*asked, {"role": "assistant", "content": "red"}], tokenize=False)
    ids = words(text.replace("<image>", "<image>" * 4), add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids.tolist() == inputs.token_ids.tolist()
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    logits = model(input_ids=ids, pixel_values=own.normalise(images)).logits
    assert torch.allclose(logits, own.lm_head(own(inputs).hidden), atol=1e-5)
    kept = StoredTemplate.from_pretrained(str(tmp_path / "out"))
    again = LlavaBackbone.from_pretrained(str(tmp_path / "out"), template=kept).eval()
    assert torch.equal(again.embed([turns], images, [1]).token_ids, ids)


def test_a_template_that_was_loaded_comes_from_where_the_release_is(sources, stranger, tmp_path):
    own = LlavaBackbone.from_parts(str(sources / "clip"), stranger, dtype="float32")
    template = {"_target_": "umm_zoo.backbones.stored_template.StoredTemplate.from_pretrained", "source": stranger}
    node = LibraryPart(("vlm",), "vlm", own, {"template": template, "max_length": 9}).load_node("out")
    assert (node["source"], node["template"]["source"], node["max_length"]) == ("out", "out", 9)
    contents = {"experiment": {"method": {"vlm": node}}, "parts": {"vlm": "vlm"}, "files": {}}
    (tmp_path / CONTENTS).write_text(json.dumps({OWN: contents}))
    save_file({}, tmp_path / REST)
    found = read_exported(tmp_path)["experiment"]["method"]["vlm"]
    assert found["source"] == found["template"]["source"] == str(tmp_path / "vlm")


def test_a_towers_own_pixel_statistics_are_used(sources):
    own = LlavaBackbone.from_parts(str(sources / "siglip"), TEXT | {"model_type": "llama"})
    assert own.image_mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert own.image_std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert pixel_statistics("siglip_vision_model") == ([0.5] * 3, [0.5] * 3)
    assert pixel_statistics("clip_vision_model")[0] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert own.grid == (2, 2) and own.config.vision_feature_select_strategy == "full"


def test_a_new_projector_is_float32_beside_half_precision_parts(sources):
    own = LlavaBackbone.from_parts(str(sources / "clip"), str(sources / "llama"), dtype="bfloat16")
    assert {p.dtype for p in own.projector.parameters()} == {torch.float32}
    assert {p.dtype for part in (own.vision_tower, own.language_model) for p in part.parameters()} == {torch.bfloat16}
    turns = [{"role": "user", "text": "<image>?"}, {"role": "assistant", "text": "red"}]
    own(own.embed([turns], torch.rand(1, 3, 8, 8), [1])).loss.backward()
    assert own.projector.linear_1.weight.grad.abs().sum() > 0


def test_a_part_that_is_not_what_was_stated_is_refused(sources):
    with pytest.raises(ValueError, match=r"config\.vision_config\.patch_size: found 2, expected 4 as in .*clip"):
        LlavaBackbone.from_parts(str(sources / "clip"), TEXT | {"model_type": "llama"}, config={"vision_config": {"patch_size": 2}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LlavaBackbone.from_parts(str(sources / "nowhere"), str(sources / "llama"))
    with pytest.raises(ValueError, match=r"config\.text_config: found beside a language_model"):
        LlavaBackbone.from_parts(str(sources / "clip"), TEXT | {"model_type": "llama"}, config={"text_config": TEXT})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_config": TOWER}, "config.vision_config: .* expected a map with 'model_type'"),
        ({"vision_config": {**TOWER, "model_type": "clip_vison"}}, "model_type: found 'clip_vison'"),
        (
            {"vision_config": {"model_type": "dinov2"}},
            r"found 'dinov2', expected \['clip_vision_model', 'siglip",
        ),
        ({"text_config": {"model_type": "llama", "hiden_size": 8}}, "found 'hiden_size'.* did you mean 'hidden_size'"),
        ({"vision_feature_leyer": -1}, "did you mean 'vision_feature_layer'"),
        ({"vision_feature_select_strategy": "full"}, "expected 'default' for a clip_vision_model"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    config = {"vision_config": {**TOWER, "model_type": "clip_vision_model"}, "text_config": {**TEXT, "model_type": "llama"}}
    with pytest.raises(ValueError, match=message):
        LlavaBackbone.from_config(config | change)


CLIP_L = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
CLIP_L |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SO400M |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
VICUNA = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
QWEN2 |= {"num_attention_heads": 28, "num_key_value_heads": 4}


def _clip(d, f, layers, side, patch):
    block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    return d + 3 * patch * patch * d + ((side // patch) ** 2 + 1) * d + 4 * d + layers * block


def _siglip(d, f, layers, side, patch):
    block = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    return 3 * patch * patch * d + d + (side // patch) ** 2 * d + 2 * d + layers * block + (d + block - 2 * d)


def _llama(v, d, f, layers):
    return 2 * v * d + layers * (4 * d * d + 3 * d * f + 2 * d) + d


def _qwen2(v, d, f, layers, heads, kv):
    k = d // heads * kv
    return 2 * v * d + layers * (2 * d * d + d + 2 * (d * k + k) + 3 * d * f + 2 * d) + d


@pytest.mark.parametrize(
    "vision, text, tower, language, total, grid",
    [
        (CLIP_L, VICUNA, _clip(1024, 4096, 24, 336, 14), _llama(32064, 4096, 11008, 32), 7_063_427_072, 24),
        (SO400M, QWEN2, _siglip(1152, 4304, 27, 384, 14), _qwen2(152064, 3584, 18944, 28, 28, 4), None, 27),
    ],
)
def test_public_sizes_without_memory_or_files(vision, text, tower, language, total, grid):
    config = {"vision_config": vision, "text_config": text}
    with torch.device("meta"):
        own = LlavaBackbone.from_pretrained("no/such-model", config=config)
        parts = LlavaBackbone.from_parts("no/such-tower", "no/such-model", config=config)
        theirs = LlavaForConditionalGeneration(LlavaConfig(**config))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in own.parts().items()}
    width, inner = text["hidden_size"], vision["hidden_size"]
    projector = inner * width + width + width * width + width
    assert counts == {"vision_tower": tower, "projector": projector, "language_model": language}
    assert counts == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.parts().items()}
    assert sum(counts.values()) == sum(p.numel() for p in theirs.parameters()) == (total or sum(counts.values()))
    assert own.grid == (grid, grid) and all(p.is_meta for p in own.parameters())
