"""What goes well into one batch: by shape, by length, by modality; from an index to batches, and what a run says of it."""

import io
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_measures import former
from test_shards import Recorder, fit, write_tar

from data_pipelines.caption_tasks import FullCaptions, ImagesOfCaptions
from data_pipelines.generation_tasks import Reconstruction, Unconditional
from data_pipelines.shards.bucketing import Bucketing, ByLength, ByModality, ByShape, Combined, Outline
from data_pipelines.shards.buckets import SampleBuckets, outlines
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.dealing import BucketedOrder
from data_pipelines.shards.index import load_index
from data_pipelines.shards.measures import COLUMNS, digest
from data_pipelines.shards.order import ShardOrder
from data_pipelines.tasks import Captions, Conversations, Editing, TextToImage
from data_pipelines.transforms.image_transform import ImageTransform
from data_pipelines.transforms.resize import Square
from data_pipelines.transforms.shaped import Bucket, Native
from umm_zoo.errors import UserError
from umm_zoo.fit import main

SQUARES = ImageTransform(8, 8, Square())
BUCKETS = Bucket(multiple=4)
#: Width and height of the images of a source, and what `BUCKETS` makes of them at 16 pixels.
SIZES = ((40, 10), (16, 16), (11, 30))


def jpg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "JPEG")
    return file.getvalue()


def pairs(folder, shards: int = 4, each: int = 30, first: int = 0):
    """Pairs of an image of one of three shapes, and a text of another length."""
    for shard in range(shards):
        numbers = range(first + shard * each, first + (shard + 1) * each)
        rows = {f"k{n:04d}": {"jpg": jpg(SIZES[shape(n)]), "txt": b"word " * (1 + n * 13 % 40)} for n in numbers}
        write_tar(folder / f"p-{shard}.tar", rows)
    return folder


def generating(folder, **options) -> ShardData:
    """Images to generate of three shapes."""
    source = ShardSource(str(folder), TextToImage())
    given = {"train": {"a": source}, "batch_size": 8, "image_size": 16, "target_resize": BUCKETS, "bucketing": ByShape()}
    return ShardData(**{**given, **options})


class Drawer(Recorder):
    """Records the keys of batches of images to generate."""

    def training_step(self, batch, batch_idx):
        self.seen += batch.keys
        return self.weight.sum()


def keys_of(data: ShardData, count: int) -> list[list[int]]:
    """The sample numbers of the first batches."""
    return data.stream.take(0, count * data.batch_size).reshape(count, -1).tolist()


def test_lengths_fall_into_classes_with_the_edge_inside():
    bucketing = ByLength(edges=[16, 64])
    keys = [bucketing.key(Outline((), None, length), SQUARES) for length in (0, 16, 17, 64, 65, 9999)]
    assert keys == [(0,), (0,), (1,), (1,), (2,), (2,)]
    assert [bucketing.describe(key) for key in ((0,), (1,), (2,))] == [
        "0 to 16 characters",
        "17 to 64 characters",
        "over 64 characters",
    ]


def test_classes_reach_as_many_times_further_each():
    assert ByLength(classes=17).edges == [2**n for n in range(1, 17)]
    assert ByLength(classes=3).edges == [256, 65_536] and len(ByLength(classes=256).edges) < 256
    edges = ByLength().edges
    assert all(b <= 1.1 * a + 1 for a, b in pairwise(edges)) and edges[-1] == 65_536


@pytest.mark.parametrize("arguments", [{"edges": []}, {"edges": [5, 3]}, {"edges": [0, 3]}, {"edges": [3, 3]}, {"classes": 1}])
def test_classes_of_nothing_are_refused(arguments):
    with pytest.raises(UserError, match=r"edges|classes"):
        ByLength(**arguments)


def test_shapes_are_those_of_the_policies_for_the_image_that_counts():
    transform = ImageTransform(56, 16, Native(), BUCKETS)
    key = ByShape().key
    assert key(Outline(((300, 100),), (40, 10), 0), transform) == BUCKETS.output_size(40, 10, 16) == (32, 8)
    assert key(Outline(((300, 100), (5, 5)), None, 0), transform) == Native().output_size(300, 100, 56)
    assert key(Outline((), None, 0), transform) == key(Outline(((0, 0),), None, 0), transform) == (0, 0)
    assert key(Outline(((0, 7),), (9, 0), 0), transform) == (0, 0)


def test_modalities_and_combinations():
    parts = Combined([ByModality(), ByLength(edges=[4])])
    outlined = [Outline((), None, 3), Outline(((8, 8),), None, 5), Outline(((8, 8),), (8, 8), 3), Outline((), (8, 8), 3)]
    keys = [parts.key(outline, SQUARES) for outline in outlined]
    assert keys == [((0,), (0,)), ((1,), (1,)), ((2,), (0,)), ((2,), (0,))]
    assert parts.describe(keys[1]) == "input images, over 4 characters"
    with pytest.raises(UserError, match="no bucketing"):
        Combined([])


#: Members of a sample and the number of markers in its text, and who takes it.
TAKEN = {
    "pair": (["jpg", "txt"], 0, [TextToImage(), Captions(), Reconstruction(), Unconditional()]),
    "edit": (["1.png", "json", "0.jpg", "target.png"], 2, [Conversations(), Editing(), Reconstruction()]),
    "question": (["json", "0.png"], 1, [Conversations(), TextToImage(), Reconstruction(), Unconditional()]),
    "words": (["json"], 0, [Conversations()]),
    "prompt": (["target.webp", "json"], 0, [Conversations(), TextToImage(), Reconstruction(), Unconditional()]),
}


@pytest.mark.parametrize(("kind", "task"), [(kind, task) for kind, taken in TAKEN.items() for task in taken[2]])
def test_tasks_name_the_images_that_they_take(kind, task):
    names, markers, _ = TAKEN[kind]
    turns = [{"role": "user", "text": "<image>" * markers + "Which?"}, {"role": "assistant", "text": "This."}]
    members = {name: name.encode() for name in names if name != "json"}
    sample = task("k", members | ({"json": json.dumps({"conversations": turns}).encode()} if "json" in names else {}))
    shown, target = task.image_names(names)
    assert [name.encode() for name in shown] == sample.images
    assert (None if target is None else target.encode()) == sample.target


def test_a_described_scene_names_the_image_to_generate():
    assert ImagesOfCaptions(FullCaptions()).image_names(["json", "0.png"]) == ([], "0.png")


def test_outlines_follow_the_layout_of_each_sample(tmp_path):
    rows = {
        "a": {"target.jpg": jpg((40, 10)), "json": b"{}", "0.jpg": jpg((9, 8))},
        "b": {"json": b"{}"},
        "c": {"mask.jpg": jpg((5, 5)), "1.jpg": jpg((6, 7)), "0.jpg": jpg((8, 9)), "txt": b"abc"},
    }
    write_tar(tmp_path / "a.tar", rows)
    made = outlines(Conversations(), load_index(str(tmp_path / "a.tar")))
    assert made == [Outline(((9, 8),), (40, 10), 0), Outline((), None, 0), Outline(((8, 9), (6, 7)), None, 3)]


def shape(sample: int) -> int:
    """The number of the shape of a sample of ``pairs``."""
    return sample * 7 % 5 % 3


def test_batches_are_of_one_shape_and_every_sample_comes_once(tmp_path):
    batches = keys_of(generating(pairs(tmp_path)), 15)
    assert sum(len({shape(sample) for sample in batch}) == 1 for batch in batches) >= 13
    assert sorted(sample for batch in batches for sample in batch) == list(range(120))


def test_mixed_batches_are_read_whole(tmp_path):
    loader = iter(
        generating(pairs(tmp_path), batch_size=24, bucketing=Combined([ByLength([50, 99]), ByShape()])).train_dataloader()
    )
    batches = [next(loader) for _ in range(5)]
    shapes = [{tuple(target.shape[1:]) for target in batch.targets} for batch in batches]
    assert len({key for batch in batches for key in batch.keys}) == 120 and {len(found) for found in shapes} != {1}
    assert set().union(*shapes) == {(8, 32), (16, 16), (24, 8)}


def test_without_buckets_it_is_the_order_of_before(tmp_path):
    data = generating(pairs(tmp_path), bucketing=None, seed=3, window=2)
    assert data.stream.take(0, 300).tolist() == ShardOrder([30] * 4, 3, 2).take(0, 300).tolist()


def test_batches_of_one_bucket_mix_sources_with_weights(tmp_path):
    sources = {"b": ShardSource(str(pairs(tmp_path / "b", 2)), TextToImage(), 3.0)}
    sources["c"] = ShardSource(str(pairs(tmp_path / "c", 3, first=500)), TextToImage(), 1.0)
    data = generating(tmp_path, train=sources)
    pure, count = data.stream.pure_groups(0)
    assert count == 512 and pure >= 509
    batches = np.asarray(keys_of(data, 64))
    assert data.stream.counts(4096) == [3072, 1024]
    assert ((batches < 60).any(axis=1) & (batches >= 60).any(axis=1)).mean() > 0.5


def test_an_index_is_read_when_its_samples_are_asked_for(tmp_path, monkeypatch):
    data = generating(pairs(tmp_path, shards=8), window=2)
    asked = []
    real = SampleBuckets._shard
    monkeypatch.setattr(SampleBuckets, "_shard", lambda self, shard: asked.append(shard) or real(self, shard))
    data.stream.take(10**6, 10**6 + 8)
    assert len(set(asked)) <= 4


def lie(folder) -> None:
    """Exchange all sizes in the indexes of a folder, so that they agree with themselves and not with the tars."""
    for place in folder.glob("*.index.json"):
        content = json.loads(place.read_text())
        changed = {
            "widths": content["heights"][::-1],
            "heights": [5] * len(content["heights"]),
            "lengths": content["lengths"][::-1],
        }
        assert set(changed) == set(COLUMNS)
        place.write_text(json.dumps({**content, **changed, "measured": digest(changed)}, separators=(",", ":")))


def test_sizes_that_lie_make_mixed_batches_and_lose_nothing(tmp_path):
    generating(pairs(tmp_path)).check()
    honest = keys_of(generating(tmp_path), 15)
    lie(tmp_path)
    lying = keys_of(generating(tmp_path), 15)
    assert lying != honest and sorted(sample for batch in lying for sample in batch) == list(range(120))


def test_a_resume_with_other_sizes_in_the_indexes_is_refused(tmp_path):
    data = generating(pairs(tmp_path))
    state = data.state_dict()
    generating(tmp_path).load_state_dict(state)
    lie(tmp_path)
    with pytest.raises(UserError, match="sizes in the indexes"):
        generating(tmp_path).load_state_dict(state)


CHANGES = {
    "no buckets": ({"bucketing": None}, "made with bucketing"),
    "other buckets": ({"bucketing": ByModality()}, "made with bucketing"),
    "other edges": ({"bucketing": Combined([ByShape(), ByLength([9])])}, "made with bucketing"),
    "another policy": ({"target_resize": Bucket(multiple=8)}, "made with bucketing"),
    "another size": ({"target_size": 32}, "made with bucketing"),
    "another batch": ({"batch_size": 4}, "made with batch_size 8, found 4"),
    "smaller groups": ({"bucket_size": 4}, "made with bucket_size 8, found 4"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_buckets_is_refused_on_resume(tmp_path, change):
    options, message = CHANGES[change]
    state = generating(pairs(tmp_path)).state_dict()
    with pytest.raises(UserError, match=message):
        generating(tmp_path, **options).load_state_dict(state)


def test_an_order_by_buckets_of_the_version_before_is_refused_on_resume(tmp_path):
    state = generating(pairs(tmp_path)).state_dict()
    del state["order"]["bucket_size"]
    with pytest.raises(UserError, match="made with bucket_size None, found 8"):
        generating(tmp_path).load_state_dict(state)


@pytest.mark.parametrize("options", [{"bucket_size": 3}, {"bucket_size": 16}, {"bucket_size": 4, "bucketing": None}])
def test_groups_that_make_no_whole_batches_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=r"data.bucket_size: found \d+, expected a divisor of the 8 of data.batch_size"):
        generating(tmp_path, **options)


def test_buckets_are_refused_where_a_run_began_without(tmp_path):
    began = generating(pairs(tmp_path), bucketing=None).state_dict()
    for state in (began, {**began, "order": {name: value for name, value in began["order"].items() if name != "bucketing"}}):
        generating(tmp_path, bucketing=None).load_state_dict(state)
        with pytest.raises(UserError, match="made with bucketing None"):
            generating(tmp_path).load_state_dict(state)


def test_the_written_order_has_no_buckets(tmp_path):
    with pytest.raises(UserError, match=r"data.window: found 0.*expected 1 or more"):
        generating(tmp_path, window=0)


BY_SHAPE = "data.bucketing={_target_: data_pipelines.shards.bucketing.ByShape}"


def policy(multiple: int) -> str:
    return f"data.target_resize={{_target_: data_pipelines.transforms.shaped.Bucket, multiple: {multiple}}}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([policy(12), BY_SHAPE], r"images of \[36, 24\] pixels, expected multiples of 8"),  # the square fits
        ([policy(4), BY_SHAPE], r"images of \[44, 20\] pixels, expected multiples of 8"),
        ([policy(8), BY_SHAPE], ""),
        ([BY_SHAPE, "data.window=0"], "data.window: found 0"),
        (["data.bucketing={_target_: data_pipelines.shards.bucketing.Combined, parts: []}"], "no bucketing"),
    ],
)
def test_the_check_refuses_shapes_that_do_not_fit(changes, message, capsys):
    code = main(["experiments/tiny/sana.yaml", "--check", *changes])
    assert code == (2 if message else 0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == code // 2 and all(re.search(message, line) for line in errors)


def test_streamed_shards_have_no_buckets(tmp_path, capsys):
    text = Path("experiments/tiny/sana.yaml").read_text(encoding="utf-8").replace("data.ShardData", "streaming.StreamData")
    (tmp_path / "streamed.yaml").write_text(text, encoding="utf-8")
    assert main([str(tmp_path / "streamed.yaml"), "--check", BY_SHAPE]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "data.bucketing: found an unknown argument 'bucketing'" in line


def test_an_index_of_the_version_before_is_made_again_with_a_note(tmp_path, capsys):
    generating(pairs(tmp_path), bucketing=None).check()
    for tar in tmp_path.glob("*.tar"):
        former(tar)
    generating(tmp_path, bucketing=None).check()
    assert "made again" not in capsys.readouterr().err
    generating(tmp_path).check()
    assert capsys.readouterr().err.count("made again") == 1


def test_the_buckets_are_printed_and_recorded_before_training(tmp_path, capsys):
    fit(generating(pairs(tmp_path / "w")), tmp_path / "run", 2, model=Drawer())
    printed = capsys.readouterr().err
    assert "8 x 24 px" in printed and "of the first 15 groups of 8 samples are of one bucket" in printed
    rows = json.loads((tmp_path / "run/data.json").read_text())["buckets"]
    counts = [sum(shape(n) == number for n in range(120)) for number in (2, 1, 0)]
    assert [(row["bucket"], row["samples"]) for row in rows] == list(
        zip(("8 x 24 px", "16 x 16 px", "32 x 8 px"), counts, strict=True)
    )
    assert [row["share"] for row in rows] == [pytest.approx(count / 120) for count in counts]
    # 11 x 30 is made 9 x 24, of which 8 columns are kept; of the others nothing is cut away
    assert [row["lost"] for row in rows] == [pytest.approx(1 / 9, abs=1e-6), 0, 0]


def test_shares_of_buckets_follow_the_weights_and_few_shards_are_looked_at(tmp_path, monkeypatch):
    tall, wide = tmp_path / "tall", tmp_path / "wide"
    for folder, size, shards in ((tall, (10, 30), 5), (wide, (40, 10), 1)):
        for shard in range(shards):
            write_tar(folder / f"{shard}.tar", {f"k{shard}-{n}": {"jpg": jpg(size), "txt": b"x"} for n in range(10)})
    sources = {"t": ShardSource(str(tall), TextToImage(), 1.0), "w": ShardSource(str(wide), TextToImage(), 3.0)}
    monkeypatch.setattr("data_pipelines.shards.buckets._LOOKED_AT", 40)
    data = generating(tmp_path, train=sources)
    rows, looked_at = data.buckets.shares(data._shares())
    assert [row.share for row in rows] == [pytest.approx(0.25), pytest.approx(0.75)] and looked_at == 30


def test_lengths_waste_less_padding():
    rng = np.random.default_rng(0)
    tokens = np.exp(rng.uniform(0, np.log(400), 4000)).astype(int)
    keys = [ByLength().key(Outline((), None, int(4 * count)), SQUARES)[0] for count in tokens]
    plain = ShardOrder([1000] * 4)
    order = BucketedOrder(plain, 32, lambda samples: np.asarray(keys)[samples], [4000])

    def computed(stream) -> int:
        """Tokens of ten epochs of batches that are padded to their longest row."""
        return int(tokens[stream.take(0, 40_000)].reshape(-1, 32).max(axis=1).sum()) * 32

    useful = 10 * int(tokens.sum())
    assert computed(plain) > 3 * computed(order)
    assert computed(order) < 1.1 * useful


class Own(Bucketing):
    """Buckets of a user's own, by whether the text has an odd length."""

    def __init__(self, keys) -> None:
        self.keys = keys

    def key(self, sample, transform):
        return self.keys[sample.length % 2]


@pytest.mark.parametrize("keys", [(0, 1), ("even", "odd"), ((0, 5), (1, 5))])
def test_buckets_of_a_users_own(tmp_path, keys):
    data = generating(pairs(tmp_path), bucketing=Own(keys))
    lengths = {n: (5 * (1 + n * 13 % 40) - 1) % 2 for n in range(120)}
    assert sum(len({lengths[sample] for sample in batch}) == 1 for batch in keys_of(data, 15)) >= 13
    assert len(data.buckets.shares([1.0])[0]) == 2


def test_keys_that_cannot_be_ordered_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data.bucketing: found keys that cannot be ordered"):
        generating(pairs(tmp_path), bucketing=Own((0, None))).stream.take(0, 8)
