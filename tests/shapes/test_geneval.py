import pytest
from oracles import BIG, lies

from umm_zoo.shapes import World, make_sample
from umm_zoo.shapes.geneval import CATEGORIES, COUPLES, make_prompt
from umm_zoo.shapes.relations import RELATIONS
from umm_zoo.shapes.scenes import sample_stream


def holds(scene: dict, world: World, requirement: dict) -> bool:
    """The requirement read again, from the scene's own json."""
    chosen = []
    for wanted in requirement["include"]:
        items = [i for i in scene["objects"] if all(i[name] == wanted[name] for name in ("shape", "colour") if name in wanted)]
        if len(items) < wanted["count"] or (wanted["exact"] and len(items) != wanted["count"]):
            return False
        chosen.append(items)
    if "relation" not in requirement:
        return True
    first, second = (items[0] for items in chosen)
    return lies(first, second, requirement["relation"], world)


@pytest.mark.parametrize("world", [World(), BIG])
def test_every_target_fulfils_its_prompt_and_shows_nothing_else(world: World) -> None:
    for i in range(60):
        row = make_sample(world, 3, "train", "geneval", i).row
        wanted = row["requirement"]["include"]
        assert row["kind"] == CATEGORIES[i % 6] and holds(row["target_scene"], world, row["requirement"])
        assert len(row["target_scene"]["objects"]) == sum(item["count"] for item in wanted)
        prompt = row["conversations"][0]["text"]
        for item in wanted:
            assert item["shape"] in prompt and item.get("colour", "") in prompt
        assert row["requirement"].get("relation", "") in prompt


def test_prompts_by_category() -> None:
    texts = {category: [] for category in CATEGORIES}
    for i in range(60):
        sample = make_sample(World(), 3, "train", "geneval", i)
        texts[sample.row["kind"]].append(sample.row["conversations"][0]["text"])
    assert set(texts["single_object"]) == {"a circle", "a square"}
    assert set(texts["two_objects"]) == {"a circle and a square", "a square and a circle"}
    assert set(texts["counting"]) == {f"{n} {shape}s" for n in ("two", "three") for shape in ("circle", "square")}
    assert all(any(f" {relation} " in text for relation in RELATIONS) for text in texts["position"])
    assert len(set(texts["colour_attribution"])) > 5 and len(set(texts["colours"])) > 4


def test_an_unknown_category_is_named() -> None:
    with pytest.raises(ValueError, match="category: found 'colors'"):
        make_prompt(World(), "train", "colors", sample_stream(0, "train", "x", 0))


def test_couples_are_the_categories_with_two_shapes_in_turn() -> None:
    world = World()
    for i in range(30):
        row = make_sample(world, 3, "train", "couples", i).row
        assert row["kind"] == COUPLES[i % 3] and holds(row["target_scene"], world, row["requirement"])
        assert len({item["shape"] for item in row["target_scene"]["objects"]}) == 2
