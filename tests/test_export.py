"""Exports of finished runs: what libraries load of them, their cards, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from finished_runs import write_run
from nursery import Nursery
from PIL import Image
from safetensors.torch import load_file
from test_generate import METHOD
from test_generate_images import PRETRAINING, UAE, WEMMU
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionModel, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_pipelines.shapes import main as make_shapes
from tests.backbones.decoder_parts import FLUX, SDXL_CONFIG
from tests.methods import uae_parts
from tools.probing import load_part
from umm_zoo.backbones.adapters import adapters_of
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.evaluate import evaluate
from umm_zoo.experiment.file import load_experiment
from umm_zoo.export import main
from umm_zoo.generation.tensors import to_pil
from umm_zoo.method import Method
from umm_zoo.release.card import world_commands
from umm_zoo.release.exporting import Export
from umm_zoo.release.folder import new_folder
from umm_zoo.release.parts import is_of_run
from umm_zoo.training.curriculum import run as fit

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CELLS = ["top left", "top right", "bottom left", "bottom right"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower trained for two steps on a world of its own, after a first stage of one step."""
    folder = tmp_path_factory.mktemp("export")
    numbers = ["--seed", "7", "--train", "16", "--val", "8", "--test", "12", "--heldout", "0", "--samples-per-shard", "10"]
    assert make_shapes([str(folder / "world"), "--tasks", "captions,text_to_image", "--shapes", "3", *numbers]) == 0
    source = {"_target_": "data_pipelines.shards.data.ShardSource"}
    experiment = {
        "name": "parts/first",
        "method": {
            "_target_": "umm_zoo.pretraining.supervised_tower.SupervisedTower",
            "tower": {"_target_": "umm_zoo.backbones.features.CLIPVisionFeatures.from_config", "config": VISION, "image_size": 32},
            "labels": {
                "_target_": "umm_zoo.pretraining.supervised_tower.CellLabels",
                "cells": CELLS,
                "attributes": {"size": ["small", "large"]},
            },
        },
        "training": {
            "trained": ["tower", "heads"],
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3},
        },
        "data": {
            "_target_": "data_pipelines.shards.data.ShardData",
            "train": {"captions": {**source, "shards": f"{folder}/world/train/captions-*.tar"}, "questions": None},
            "val": {"captions": {**source, "shards": f"{folder}/world/val/captions-*.tar"}},
            "image_size": 32,
            "batch_size": 4,
        },
        "metrics": {"held_out": {"_target_": "umm_zoo.metrics.Means", "names": ["size_accuracy"]}},
        "trainer": {"max_steps": 1, "val_check_interval": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "first.yaml").write_text(yaml.safe_dump(experiment))
    second = {"base": "first.yaml", "after": "first.yaml", "name": "parts/second", "trainer": {"max_steps": 2}}
    (folder / "second.yaml").write_text(yaml.safe_dump(second))
    assert fit(load_experiment(folder / "second.yaml"), runs=str(folder / "runs")) == 0
    return folder / "runs" / "parts" / "second"


def finished(folder: Path, method: dict[str, Any], **more: Any) -> Path:
    """A run of untrained weights as if it had finished."""
    run = write_run(folder, method, **more)
    (run / "metrics.json").write_text(json.dumps({"experiment": "toy.yaml", "steps": 1, "seed": 0, "seconds": 2.0, "metrics": {}}))
    return run


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_an_encoder_loads_bit_equal_here_and_in_the_library(run: Path, tmp_path: Path) -> None:
    Export(run).write(tmp_path / "tower")
    tower: Any = Method.load(run).tower
    assert equal(tower.state_dict(), load_part(str(tmp_path / "tower")).state_dict())
    assert equal(tower.model.state_dict(), CLIPVisionModel.from_pretrained(tmp_path / "tower").state_dict())
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded: Any = load_part(str(tmp_path / "tower"))
    assert torch.equal(tower(image), loaded(image)) and torch.equal(tower.tokens(image), loaded.tokens(image))
    processed = CLIPImageProcessorPil.from_pretrained(tmp_path / "tower")(to_pil(image[0]), return_tensors="pt")["pixel_values"]
    assert (processed - tower.pixels(image)).abs().mean() < 0.02  # the library rounds to 8 bits


def test_weights_are_stored_in_the_precision_asked_for(run: Path, tmp_path: Path) -> None:
    card = Export(run, dtype="float16").write(tmp_path / "tower")
    stored = load_file(tmp_path / "tower" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    assert card["weights_bytes"] == (tmp_path / "tower" / "model.safetensors").stat().st_size and card["stored_as"] == "float16"
    loaded = load_part(str(tmp_path / "tower")).state_dict()
    for key, value in Method.load(run).tower.state_dict().items():
        if value.is_floating_point():
            assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], value.half().float()), key


def test_a_codec_in_half_precision_keeps_its_scaling(tmp_path: Path) -> None:
    method = {"_target_": "umm_zoo.pretraining.autoencoder.Autoencoder", "codec": WEMMU["codec"]}
    run = finished(tmp_path / "run", method)
    Export(run, dtype="float16").write(tmp_path / "out")
    own, loaded = (cast(Any, part).scaling for part in (Method.load(run).codec, load_part(str(tmp_path / "out"))))
    assert torch.equal(own, loaded) and own != own.half()  # it stands in the config, whole


def test_the_card_says_how_the_part_was_made_and_what_it_scores(run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "tower"
    assert main([str(run), str(folder), "--test"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("MiB, raw weights")
    card, report = json.loads((folder / "card.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert card["recipe"]["steps"] == 2 and card["recipe"]["batch_size"] == 4 and card["commit"] == report["commit"]
    (stage,) = card["recipe"]["after"]
    assert stage["steps"] == 1 and card["seconds"] == pytest.approx(report["seconds"] + stage["seconds"], abs=0.06)
    assert card["scores"]["val"] == {
        "samples": 8,
        "metrics": {"held_out/size_accuracy": report["metrics"]["val/held_out/size_accuracy"]},
    }
    assert card["scores"]["test"]["samples"] == 12 and 0 <= card["scores"]["test"]["metrics"]["held_out/size_accuracy"] <= 1
    assert [(source["split"], source["samples"], source["read"]) for source in card["sources"]] == [
        ("train", 16, 8),
        ("val", 8, None),
    ]
    text = (folder / "README.md").read_text()
    (command,) = card["worlds"][0]["commands"]
    for said in (
        *(report["commit"], command, "2 steps of 4 samples", "first.yaml`: 1 steps", "image_size: 32", "12 samples"),
        *("library_name: transformers", "transformers.CLIPVisionModel", "not stated", "Raw weights"),
    ):
        assert str(said) in text, said


def test_the_world_can_be_made_again_from_the_card(run: Path, tmp_path: Path) -> None:
    world = run.parents[2] / "world"
    (command,) = world_commands(tmp_path / "again", json.loads((world / "world.json").read_text()))
    assert make_shapes(command.split()[3:]) == 0
    for name in ("world.json", "train/captions-000000.tar", "test/captions-000001.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()


def test_tasks_written_in_other_numbers_are_commands_of_their_own() -> None:
    parts = {
        f"{split}/{task}": {"samples": n, "samples_per_shard": 9}
        for task, n in (("captions", 4), ("pairs", 4))
        for split in ("val", "test", "heldout")
    }
    parts["train/captions"] = {"samples": 5, "samples_per_shard": 9, "caption_order": "random"}
    parts |= {"val/edits": {"samples": 3, "samples_per_shard": 9}}
    world = {
        "cells": 3,
        "num_colours": 4,
        "num_shapes": 2,
        "max_objects": 3,
        "image_size": 32,
        "detail": "mark",
        "sizes": ["large"],
    }
    commands = world_commands(Path("w"), {"seed": 2, "world": world, "parts": parts})
    head = "python -m data_pipelines.shapes w --seed 2 --cells 3 --sizes large"
    assert commands == [
        f"{head} --train 5 --val 4 --test 4 --caption-order random --tasks captions,pairs --samples-per-shard 9",
        f"{head} --train 0 --val 3 --test 0 --tasks edits --samples-per-shard 9",
    ]


def test_a_llava_answers_in_the_library_as_it_does_here(tmp_path: Path) -> None:
    template = {"_target_": "umm_zoo.backbones.templates.VicunaV1", "end": "<|im_end|>", "system": "Look."}
    run = finished(tmp_path / "run", {**METHOD, "vlm": {**METHOD["vlm"], "template": template}})
    Export(run).write(tmp_path / "out")
    here, words = Method.load(run), AutoTokenizer.from_pretrained(tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": [{"type": "text", "text": "What colour?"}]}]
    ids = words.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**ids, max_new_tokens=9, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert words.decode(found, skip_special_tokens=True).strip() == here.ask(None, "What colour?", max_new_tokens=9) != ""


@pytest.mark.parametrize("kind", ["ChatML", "VicunaV1", "QwenChat", "Plain"])
def test_the_library_s_chat_template_writes_the_prompts_of_training(kind: str) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: F401 - what renders it
    from transformers.utils.chat_template_utils import render_jinja_template

    from umm_zoo.backbones import templates
    from umm_zoo.release.processors import jinja

    template = getattr(templates, kind)()
    turns = [("user", "<image>\n<image>\nWhich?"), ("assistant", "This."), ("user", "Why?"), ("assistant", "So.")]
    form = jinja(template, "<I>", "")
    for system in ([], [("system", "Be brief.")]):
        for count in (1, 2, 3, 4):
            rows, opens = [*system, *turns[:count]], bool(count % 2)
            pieces = template.render([{"role": role, "text": text} for role, text in rows], for_generation=opens)
            asked = []
            for role, text in rows:
                *images, words = text.split("\n")
                items = [{"type": "image"} for _ in images]
                asked.append({"role": role, "content": [*items, {"type": "text", "text": "\n" * bool(images and opens) + words}]})
            (said,), _ = render_jinja_template([asked], chat_template=form, add_generation_prompt=opens)
            assert said == "".join("<I>" if piece.kind == "image" else piece.text for piece in pieces)


@pytest.mark.parametrize("node", [WEMMU, UAE, PRETRAINING], ids=["wemmu", "uae", "decoder"])
def test_a_method_that_makes_images_is_one_folder(node: dict[str, Any], tmp_path: Path) -> None:
    run = finished(tmp_path / "run", node)
    card = Export(run).write(tmp_path / "out")
    before, after = Method.load(run), Method.load(tmp_path / "out")
    assert equal(before.state_dict(), after.state_dict())
    assert torch.equal(*(torch.tensor(list(model.generate("a star", seed=3, steps=1).tobytes())) for model in (before, after)))
    contents = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert contents["codec"] == ["diffusers", "AutoencoderKL"]
    reads = "vlm" if "vlm" in node else "text_encoder"
    assert {part["folder"] for part in card["parts"]} == {reads, "decoder", "codec"}
    own = load_file(tmp_path / "out" / "method.safetensors")
    assert not any(key.startswith(("vlm.", "decoder.", "renderer.decoder.", "codec.", "text_encoder.")) for key in own)


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    Export(finished(tmp_path / "run", WEMMU)).write(tmp_path / "out")
    file = tmp_path / "out" / "codec" / "config.json"
    file.write_text(file.read_text().replace("0.18215", "0.28215") + " ")
    with pytest.raises(ValueError, match=r"found 'codec/config.json' that is missing or is not what was written"):
        load_checkpoint(tmp_path / "out")


LORA = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": 2, "alpha": 6.0, "targets": ["q_proj"]}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UAE with an adapter that changes what its model says."""
    folder = finished(tmp_path_factory.mktemp("adapted") / "run", {**UAE, "adapter": LORA})
    stir(folder)
    return folder


def stir(run: Path) -> None:
    """Let the adapters of a run say something."""
    file = run / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    for key, value in state["state_dict"].items():
        if key.endswith(".up"):
            value.normal_(generator=torch.Generator().manual_seed(len(key)))
    torch.save(state, file)


def hidden(model: Any) -> Tensor:
    inputs = model.vlm.embed([[{"role": "user", "text": "What colour is it?"}]], None, [0])
    with torch.no_grad():
        return model.vlm(inputs).hidden


def test_an_adapter_loads_in_peft(adapted: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    Export(adapted).write(tmp_path / "adapter", "adapter")
    here = Method.load(adapted)
    inputs = here.vlm.embed([[{"role": "user", "text": "What colour is it?"}]], None, [0])
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "adapter" / "base")
    ids = {"input_ids": inputs.token_ids, "attention_mask": inputs.attention_mask.long()}
    with torch.no_grad():
        plain = base(**ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "adapter")(**ids).logits
    expected = here.vlm.lm_head(hidden(here))
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(plain, expected, atol=1e-2)


def test_a_merged_adapter_says_the_same(adapted: Path, tmp_path: Path) -> None:
    card = Export(adapted, merge_adapter=True).write(tmp_path / "out")
    before, after = Method.load(adapted), Method.load(tmp_path / "out")
    assert after.adapter is None and torch.allclose(hidden(before), hidden(after), atol=1e-4)
    assert "merged" in card["adapter"] and "merged" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_that_is_not_merged_stands_beside_its_base_in_a_whole_method(adapted: Path, tmp_path: Path) -> None:
    card = Export(adapted).write(tmp_path / "out")
    assert torch.equal(hidden(Method.load(adapted)), hidden(Method.load(tmp_path / "out")))
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file() and "both together" in card["adapter"]


CAPTIONER = {
    "_target_": "umm_zoo.methods.uae.captioner_grpo.GenerationForUnderstanding",
    "vlm": UAE["vlm"],
    "adapter": LORA,
    "reward": {
        "_target_": "umm_zoo.rewards.ReconstructionReward",
        "encoder": {"_target_": "umm_zoo.backbones.features.CLIPVisionFeatures.from_config", "config": VISION, "image_size": 32},
    },
    "objective": {"_target_": "umm_zoo.objectives.grpo.GRPO", "kl_weight": 0.0},
}


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UAE with an adapter whose images a bridge makes that is loaded from a run with an adapter, both away from zero."""
    folder = tmp_path_factory.mktemp("inside")
    bridge = finished(folder / "bridge", WEMMU, adapters={"decoder": {**LORA, "targets": ["to_q"]}})
    stir(bridge)
    renderer = {"_target_": "umm_zoo.methods.uae.renderers.BridgeRenderer"}
    renderer |= {"bridge": {"_target_": "umm_zoo.methods.wemmu.WeMMU.load", "source": str(bridge)}}
    outer = finished(folder / "run", {**CAPTIONER, "renderer": renderer})
    stir(outer)
    return outer


def test_a_method_inside_keeps_its_adapters(captioner: Path, tmp_path: Path) -> None:
    Export(captioner).write(tmp_path / "out")
    before, after = Method.load(captioner), Method.load(tmp_path / "out")
    assert adapters_of(after) == adapters_of(before) and set(adapters_of(after)) == {"adapter", "renderer.bridge.adapters.decoder"}
    assert equal(before.state_dict(), after.state_dict())
    assert np.array_equal(*(np.asarray(model.generate("a", seed=1)) for model in (before, after)))


def test_adapters_of_a_method_inside_are_merged_too(captioner: Path, tmp_path: Path) -> None:
    Export(captioner, merge_adapter=True).write(tmp_path / "out")
    before, after = Method.load(captioner), Method.load(tmp_path / "out")
    assert not adapters_of(after) and torch.allclose(hidden(before), hidden(after), atol=1e-4)
    images = [np.asarray(model.generate("a", seed=1)).astype(int) for model in (before, after)]
    assert abs(images[0] - images[1]).max() <= 1 and images[0].std() > 5


def test_what_came_with_another_run_may_have_been_trained_there() -> None:
    node = {"renderer": {"_target_": "R", "bridge": {"_target_": "umm_zoo.methods.wemmu.WeMMU.load", "source": "runs/a"}}}
    assert is_of_run(node, ["renderer", "bridge", "decoder"]) and not is_of_run(node, ["renderer", "decoder"])


def test_where_no_script_can_be_written_it_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lumpy = {
        **UAE["renderer"],
        **{key: FLUX_WEMMU[key] for key in ("decoder", "codec", "image_size")},
    }  # it counts the text's tokens
    lumpy["connector"] = {**lumpy["connector"], "out_dim": 10}
    card = Export(finished(tmp_path / "run", {**UAE, "renderer": lumpy})).write(tmp_path / "out")
    assert "no generate.py is written" in capsys.readouterr().err and "script" not in card
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(("generate", "bridge", "connector"))]


def test_what_would_be_wrong_is_refused(run: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: Path, *options: str) -> str:
        assert main([str(source), str(tmp_path / "out"), *options]) == 2
        assert not list(tmp_path.glob("out*"))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    report = run / "metrics.json"
    kept = report.read_text()
    assert "found no checkpoint there" in refused(tmp_path / "nowhere")
    assert "found a run without an adapter" in refused(run, "--merge-adapter")
    assert "found 'paddle', expected one of ['tower']" in refused(run, "--part", "paddle")
    assert "found a part with an adapter beside it" in refused(adapted, "--part", "vlm")
    try:
        report.unlink()
        assert "found no metrics.json, expected a run that has finished" in refused(run)
        report.write_text(kept.replace('"steps": 2', '"steps": 1'))
        assert "found scores of step 1 and weights of step 2" in refused(run)
    finally:
        report.write_text(kept)


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder that you are in"), new_folder(Path(".")):
        pass


def test_what_is_there_already_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main([str(run), str(tmp_path / "mine"), "--again"]) == 2
    assert "found something that is there already, expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="No space left"), new_folder(out) as folder:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".writer").write_text("999999999")  # of a process that was killed
    for text in ("first", "second"):
        with new_folder(out, again=True) as folder:
            (folder / "card.json").write_text(text)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "card.json"] and (out / "card.json").read_text() == "second"
    with pytest.raises(ValueError, match=r"already.*--again puts"), new_folder(out):
        pass


def test_an_exported_method_has_the_scores_of_the_run(run: Path, tmp_path: Path) -> None:
    source = {"_target_": "data_pipelines.shards.data.ShardSource", "task": {"_target_": "data_pipelines.tasks.TextToImage"}}
    shards = f"{run.parents[2]}/world/val/text_to_image-*.tar"
    data = {"_target_": "data_pipelines.shards.data.ShardData", "image_size": 8, "val": {"a": {**source, "shards": shards}}}
    metrics = {"held_out": {"_target_": "umm_zoo.metrics.Means", "names": ["flow"]}}
    bridge = finished(tmp_path / "run", WEMMU, data=data, metrics=metrics)
    Export(bridge).write(tmp_path / "out")
    scores = [json.loads(evaluate(source).read_text())["metrics"] for source in (bridge, tmp_path / "out")]
    assert scores[0] == scores[1] and scores[0]["val/held_out/flow"] > 0


METAQUERY = {
    "vlm": WEMMU["vlm"],
    "decoder": {"_target_": "umm_zoo.backbones.discrete_decoders.StableDiffusionXL.from_config", "config": SDXL_CONFIG},
    "codec": {"_target_": "umm_zoo.backbones.codecs.KLCodec.from_config", "config": uae_parts.CODEC},
    "objective": {"_target_": "umm_zoo.objectives.discrete.DiscreteDiffusion", "num_steps": 2},
    "image_size": 16,
    "_target_": "umm_zoo.methods.metaquery.MetaQuery",
    "queries": {"_target_": "umm_zoo.blocks.queries.MarkedQueries", "width": 32, "num_queries": 6},
    "pathway": {"_target_": "umm_zoo.blocks.pathways.FrozenPathway"},
    "connector": {
        "_target_": "umm_zoo.blocks.metaquery_connector.MetaQueryConnector",
        **{"in_dim": 32, "out_dim": 10, "depth": 1, "heads": 2},
    },
}
FLUX_WEMMU = {
    **WEMMU,
    "vlm": {**WEMMU["vlm"], "dtype": "bfloat16"},
    "pathway": {**WEMMU["pathway"], "dtype": "float32"},
    "decoder": {"_target_": "umm_zoo.backbones.flux.Flux.from_config", "config": {**FLUX, "guidance_embeds": True}},
    "connector": {**WEMMU["connector"], "out_dim": 10},
    "codec": METAQUERY["codec"],
    "image_size": 16,
}


@pytest.mark.processes
def test_images_are_made_without_this_package(nursery: Nursery, tmp_path: Path) -> None:
    prompts, calls = ["a red circle", "b", "two", "a star; background: grey"], []
    nodes = {"wemmu": WEMMU, "metaquery": METAQUERY, "flux": FLUX_WEMMU, "uae": UAE}
    for prompt, (name, node) in zip(prompts, nodes.items(), strict=True):
        run = finished(tmp_path / name, node)
        file = run / "checkpoints" / "last.ckpt"
        state = torch.load(file, weights_only=True)
        for key, value in state["state_dict"].items():
            if value.ndim > 1 and key.startswith(("vlm.", "pathway.")):  # as large that a wrong mask or position shows
                value.normal_(std=value[0].numel() ** -0.5, generator=torch.Generator().manual_seed(len(key)))
        torch.save(state, file)
        assert Export(run).write(tmp_path / f"{name}-out")["script"] == "generate.py"
        calls.append(["generate.py", prompt, f"{name}-image.png", "3"])
    code = f"""
import runpy, sys
sys.modules |= {{name: None for name in [*sys.modules] if name.partition(".")[0] in ("umm_zoo", "data_pipelines", "tests")}}
for call in {calls!r}:
    sys.argv = call
    runpy.run_path(call[2].split("-")[0] + "-out/generate.py", run_name="__main__")
"""
    subprocess.run([nursery.python, "-c", code], cwd=tmp_path, check=True)
    for _, prompt, image, _ in calls:
        expected = np.asarray(Method.load(tmp_path / image.split("-")[0]).generate(prompt, seed=3)).astype(int)
        found = np.asarray(Image.open(tmp_path / image)).astype(int)
        assert abs(found - expected).max() <= 1 and expected.std() > 5
