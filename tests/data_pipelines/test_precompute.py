import csv
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_shards import png, write_tar, write_world
from torch import nn

from data_pipelines.precompute import main, parser
from data_pipelines.shards import storing
from data_pipelines.shards.data import ShardData
from data_pipelines.shards.storing import store_outputs
from umm_zoo import fit
from umm_zoo.backbones.precomputable import weights_hash
from umm_zoo.experiment.file import load_experiment

ROSS = "experiments/ross/toy/d-stage1.yaml"


def options(world: Path, *more: str) -> list[str]:
    shards = [f"data.{stage}.captions.shards={world}" for stage in ("train", "val")]
    sizes = ["data.batch_size=4", "data.val_batch_size=5", "trainer.accelerator=cpu", "trainer.max_steps=3"]
    return [ROSS, *shards, *sizes, "trainer.val_check_interval=3", "callbacks.validation.max_new_tokens=0", *more]


def losses(arguments: list[str], runs: Path) -> list[float]:
    assert fit.main([*arguments, "--runs", str(runs), "trainer.log_every_n_steps=1"]) == 0
    rows = csv.DictReader(next(runs.rglob("metrics.csv")).open())
    return [float(value) for row in rows for name, value in sorted(row.items()) if value and "reconstruction_loss" in name]


def error_of(arguments: list[str], runs: Path, capsys) -> str:
    capsys.readouterr()
    assert fit.main([*arguments, "--runs", str(runs)]) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1]


def test_training_reads_what_was_stored_with_the_same_losses_and_refuses_it_when_stale(tmp_path, capsys, monkeypatch):
    world = write_world(tmp_path / "world", [5, 6])
    rows = {"bad": {"json": b"{}"}, "good": {**_caption(), "0.png": png(9, 32)}, "text": _caption("Say 5.")}
    write_tar(world / "part-002.tar", rows)
    before = {path.name: path.read_bytes() for path in world.glob("*.tar")}
    computed = losses(options(world), tmp_path / "plain")
    assert main([*options(world), "--measure", "1"]) == 0
    printed = capsys.readouterr().out
    assert "reconstruction_target: 13 samples" in printed and "times as fast" in printed
    assert "1 samples cannot be used" in printed  # the shards of train are those of val, and are looked at once
    assert {path.name: path.read_bytes() for path in world.glob("*.tar")} == before

    from umm_zoo.blocks.targets import CodecLatents

    with monkeypatch.context() as patch:  # neither training nor validation encodes an image with content again
        encoded = []
        real = CodecLatents.to_store
        patch.setattr(CodecLatents, "compute", lambda *arguments: pytest.fail("a target was computed"))
        patch.setattr(CodecLatents, "to_store", lambda self, images: encoded.append(len(images)) or real(self, images))
        patch.setattr(CodecLatents, "round_trip", lambda self, images: images)
        stored = losses(options(world), tmp_path / "stored")
    assert len(stored) == 3 and stored == pytest.approx(computed, rel=1e-5) and set(encoded) <= {1}

    codec = tmp_path / "codec"
    codec.mkdir()
    for path in Path("experiments/tiny/weights/codec").iterdir():
        (codec / path.name).write_bytes(path.read_bytes())
    weights = codec / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state[min(state)] += 1e-3
    save_file(state, weights, {"format": "pt"})
    line = error_of(options(world, f"method.target.codec.source={codec}"), tmp_path / "a", capsys)
    assert "found stored 'reconstruction_target' of other weights or another transform" in line and "precompute" in line
    squeezed = options(world, "data.resize._target_=data_pipelines.transforms.resize.Squeeze")
    assert "other weights" in error_of(squeezed, tmp_path / "b", capsys)
    assert losses(options(world, f"method.target.codec.source={codec}", "data.precomputed=ignore"), tmp_path / "c")

    write_world(world / "more", [3])
    (world / "more/part-000.tar").rename(world / "part-003.tar")
    line = error_of(options(world), tmp_path / "d", capsys)
    assert "for 3 of 4 shards, not for" in line and "part-003.tar" in line


def _caption(answer: str = "five") -> dict[str, bytes]:
    question = "Which?" if answer != "five" else "<image>\nWhich?"
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return {"json": json.dumps({"conversations": turns}).encode()}


def test_a_stopped_run_goes_on_and_a_finished_one_computes_nothing(tmp_path, monkeypatch):
    world = write_world(tmp_path, [5, 4])
    arguments = parser().parse_args([*options(world), "--measure", "0", "--half"])
    real, calls = storing._store_shard, []

    def stop_at_second(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(storing, "_store_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        store_outputs(arguments)
    [first] = (tmp_path / "precomputed").glob("*/*.tar")
    written = first.stat().st_mtime_ns
    store_outputs(arguments)
    assert len(calls) == 3 and first.stat().st_mtime_ns == written and len(list((tmp_path / "precomputed").glob("*/*.tar"))) == 2
    store_outputs(arguments)
    assert len(calls) == 3


def test_the_hash_is_of_weights_buffers_and_types():
    part = nn.BatchNorm1d(3)
    first = weights_hash(part)
    part.running_mean += 1
    second = weights_hash(part)
    assert len({first, second, weights_hash(part.double())}) == 3 and weights_hash(nn.BatchNorm1d(3)) == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "latents"], "--only: found 'latents', expected reconstruction_target"),
        (
            ["callbacks.flip={_target_: umm_zoo.callbacks.augment.ShiftAndFlip, max_shift: 2}"],
            "callbacks.flip: found one that changes",
        ),
        (["data.train.captions.shards=nowhere"], "no shard"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, more, message):
    assert main(options(write_world(tmp_path, [2]), *more)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_method_without_frozen_outputs_says_so(tmp_path, capsys):
    arguments = ["experiments/llava/shapes.yaml", f"vars.data={write_world(tmp_path / 'x/train', [2]).parent}"]
    data = load_experiment("experiments/llava/shapes.yaml").data
    shards = [f"data.{stage}.{name}.shards={tmp_path}/x/train" for stage in ("train", "val") for name in data[stage]]
    assert main([*arguments, *shards]) == 2
    assert "no frozen output that is worth storing" in capsys.readouterr().err


def test_the_transform_tells_policies_and_sizes_apart(tmp_path):
    from data_pipelines.transforms.resize import PadToSquare, Square

    resizes = [None, PadToSquare(3), PadToSquare(4), Square("nearest")]
    modules = [ShardData(image_size=32, resize=resize) for resize in resizes]
    modules += [ShardData(image_size=33), ShardData(image_size=32, target_size=64)]
    assert len({str(module.transform.to_json()) for module in modules}) == 6
