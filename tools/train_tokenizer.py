"""Train the shipped tokenizer: python tools/train_tokenizer.py [FOLDER]. The corpus is made here, so the result is reproducible.

Byte-level BPE: every byte is a token of its own, so any text survives a round trip; the merges make the sentences of this
repository's synthetic worlds short. The special tokens carry the names that Qwen2.5-VL and LLaVA checkpoints use.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1024


def words(text: str) -> list[str]:
    """The words of a block of text."""
    return text.split()


SPECIAL = [f"<|{name}|>" for name in words("pad endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad")]
SPECIAL.append("<image>")
COLOURS = words("red green blue yellow orange purple pink cyan brown white black grey gray magenta teal lime violet")
SHAPES = words("circle square triangle diamond star cross ring hexagon pentagon heart ellipse rectangle bar disc object shape")
SIZES = words("small large tiny big medium")
VERTICAL, HORIZONTAL = words("top middle bottom"), words("left centre right")
PLACES = [f"{v} {h}" for v, h in itertools.product(VERTICAL, HORIZONTAL)] + words("top bottom left right centre middle center")
MARKS = words("mark dot stripe stripes glyph corner notch spot line plain dotted striped horizontal vertical diagonal letter")
NUMBERS = words("zero one two three four five six seven eight nine ten")
ROLES = words("system user assistant USER ASSISTANT")
PHOTO_CLASSES = words("""
airplane automobile car bird cat deer dog frog horse ship truck boat bus bicycle motorcycle train person man woman child face
house building tree flower rose tulip daisy sunflower dandelion grass forest mountain sea river beach sky street road bridge
apple banana orange pear bread cake pizza cup bottle bowl chair table sofa bed lamp clock book phone computer keyboard elephant
bear lion tiger zebra giraffe monkey sheep cow pig goat rabbit fox wolf mouse rat fish shark whale turtle snake spider bee
butterfly beetle snail goldfish church golf ball parachute gas pump chain saw horn cassette player garbage springer tench ant
plane pasture desert airport harbor stadium farmland residential highway
""")
EDITS = [
    "Make the {shape} {colour}.",
    "Change the colour of the {shape} to {colour}.",
    "Turn the {colour} {shape} into a {shape2}.",
    "Move the {colour} {shape} to the {place}.",
    "Add a {size} {colour} {shape} at the {place}.",
    "Remove the {colour} {shape}.",
    "Make the background {colour}.",
    "Put the {shape} of the second image into the first image at the {place}.",
    "Make the {shape} {colour} and move it to the {place}.",
    "Give the {shape} the colour of the {shape2} in the second image.",
]
QUESTIONS = [
    "What colour is the {shape}?",
    "What color is the {size} {shape}?",
    "What shape is at the {place}?",
    "What shape is the {colour} object?",
    "What size is the {colour} {shape}?",
    "Where is the {colour} {shape}?",
    "How many objects are there?",
    "How many {colour} objects are in the image?",
    "How many {shape}s are there?",
    "Is there a {colour} {shape} in the image?",
    "Is there a {size} {colour} {shape}?",
    "Is the {shape} {colour}?",
    "Where is the mark on the {colour} {shape}?",
    "At which corner of the {shape} is the {mark}?",
    "What is the colour of the background?",
    "What is in this photo?",
    "What is shown in the picture?",
    "Which object is {place} of the {shape}?",
    "What changed between the two images?",
    "What is different in the second image?",
]
CAPTIONS = [
    "{place}: a {size} {colour} {shape}",
    "{place}: a {colour} {shape}",
    "There is a {size} {colour} {shape} at the {place}.",
    "An image of a {colour} {shape} on a {colour2} background.",
    "A photo of a {photo}.",
    "a photo of the {photo}",
    "background {colour}",
    "The {shape} became {colour}. The {colour2} {shape2} was removed. The {shape} moved to the {place}.",
    "A {size} {colour} {shape} was added at the {place}.",
    "The background is {colour}; the {shape} has a {mark} at the {place}.",
]
PROMPTS = [
    "Describe the image.",
    "Describe the image briefly.",
    "Describe the image in detail.",
    "Describe the edit.",
    "Give a short caption.",
    "Answer with yes or no.",
    "Answer with one word.",
    "Draw a {size} {colour} {shape} at the {place} on a {colour2} background.",
    "You are a helpful assistant.",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions.",
]
ENGLISH = """The picture shows a person walking along the street in the early morning. There are several trees behind the house,
and the sky is clear. She opened the book and began to read it to her children before they went to sleep. We would
like to know whether the model can see what is in front of it, how it was made, and why some of these answers are
not right. It is often said that a good question is half of the answer. Please look at both images and say which
one has been changed. This is because they have been here for more than a hundred years, but nobody knows where all
of them came from. First take the water from the fire, then add salt, oil and rice. He did not think about it until
after the end of the day. You can use this method with other data if you want to."""


def corpus(seed: int = 0, sentences: int = 60_000) -> Iterator[str]:
    """Sentences of the synthetic worlds, photo class names and some general English."""
    draw = random.Random(seed)
    templates = CAPTIONS * 2 + QUESTIONS + EDITS + PROMPTS
    words = COLOURS + SHAPES + SIZES + PLACES + MARKS + NUMBERS + PHOTO_CLASSES + ["yes", "no", "none", *ROLES]
    slots = {"colour": COLOURS, "colour2": COLOURS, "shape": SHAPES, "shape2": SHAPES, "size": SIZES, "place": PLACES}
    slots |= {"mark": MARKS, "photo": PHOTO_CLASSES}
    for _ in range(sentences):
        filling = {name: draw.choice(values) for name, values in slots.items()}
        yield "\n" + draw.choice(templates).format(**filling)
    for word in words * 200:  # answers of one word stand after a line break or after a space
        yield f"\n{word}"
        yield f"{word} {word}"
    for number in range(200):
        yield f"{number} {number // 10}.{number % 10}"
    yield from [ENGLISH] * 30
    yield re.sub(r"[^A-Za-z .,\n]", "", (ROOT / "LICENSE").read_text(encoding="utf-8"))


def train() -> Tokenizer:
    """The trained tokenizer; digits are single tokens, as in Qwen2's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def main() -> None:
    """Write tokenizer.json and say how long some sentences became."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "umm_zoo" / "assets" / "tokenizer")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(folder / "tokenizer.json"))
    print(f"{folder / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens")
    for text in ("top left: a small red circle", "What colour is the circle?", "Is there a green star in the image?", ENGLISH[:99]):
        print(len(tokenizer.encode(text).ids), "tokens:", text)


if __name__ == "__main__":
    main()
