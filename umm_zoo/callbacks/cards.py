"""Samples as cards: images above, question, answer and truth below. PIL only."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER, DESK = (25, 25, 30), (120, 120, 128), (255, 255, 255), (232, 233, 237)
RIGHT, WRONG, OPEN = (22, 135, 70), (205, 45, 40), (150, 152, 160)

MARGIN = 8
BORDER = 4
LINE = 18
MAX_LINES = 7
MIN_TEXT_WIDTH = 200
MAX_WIDTH = 1800


@dataclass
class Card:
    """One sample: named images beside each other and the texts below. ``right`` is None where there is no verdict.

    ``scores`` are lines of values of this sample alone, such as its reward.
    """

    title: str
    question: str
    answer: str | None
    truth: str
    right: bool | None
    images: dict[str, Image.Image]
    scores: list[str] = field(default_factory=list)


def legible(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text with escapes for what the font lacks and would draw as one and the same box."""
    box = bytes(font.getmask("\uffff"))
    lacking = {letter for letter in set(text) - {" "} if not letter.isascii() and bytes(font.getmask(letter)) == box}
    return "".join(letter.encode("ascii", "backslashreplace").decode() if letter in lacking else letter for letter in text)


def wrap(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, max_lines: int = MAX_LINES) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, long words too; what exceeds ``max_lines`` ends in an ellipsis."""
    lines: list[str] = []
    line = ""
    for word in legible(text, font).split():
        trial = f"{line} {word}" if line else word
        if font.getlength(trial) <= width:
            line = trial
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(f"{last} …") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], f"{last.rstrip()} …"]
    return lines


def resized(image: Image.Image, side: int) -> Image.Image:
    """Enlarged by the largest whole factor that keeps it within ``side`` (hard pixels), or shrunk smoothly to it."""
    longest = max(image.size)
    if longest <= side:
        factor = side // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, image.width * side // longest), max(1, image.height * side // longest))
    return image.resize(size, Image.Resampling.LANCZOS)


def _draw_card(card: Card, side: int, width: int) -> Image.Image:
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    inner = width - 2 * (MARGIN + BORDER)
    texts: list[tuple[str, tuple[int, int, int]]] = []
    texts += [(line, INK) for line in wrap(card.question, inner, font)] if card.question else []
    if card.answer is not None:
        verdict = {True: ("right: ", RIGHT), False: ("wrong: ", WRONG), None: ("answer: ", INK)}[card.right]
        shown = card.answer.strip() or "(nothing)"
        texts += [(line, verdict[1]) for line in wrap(verdict[0] + shown, inner, font)]
    if card.truth:
        texts += [(line, INK) for line in wrap("truth: " + card.truth, inner, font)]
    texts += [(line, FAINT) for score in card.scores for line in wrap(score, inner, font)]
    top = BORDER + MARGIN + LINE
    images = {name: resized(image, side) for name, image in card.images.items()}
    image_height = max((image.height for image in images.values()), default=0)
    named = len(images) > 1
    text_top = top + image_height + (LINE if named else 0) + MARGIN // 2
    sheet = Image.new("RGB", (width, text_top + LINE * len(texts) + MARGIN + BORDER), PAPER)
    pen = ImageDraw.Draw(sheet)
    colour = OPEN if card.right is None else RIGHT if card.right else WRONG
    pen.rectangle((0, 0, sheet.width - 1, sheet.height - 1), outline=colour, width=BORDER)
    left = BORDER + MARGIN
    pen.text((left, BORDER + MARGIN // 2), wrap(card.title, inner, small, max_lines=1)[0], FAINT, small)
    for name, image in images.items():
        sheet.paste(image, (left, top))
        if named:
            pen.text((left, top + image_height + 1), wrap(name, side, small, max_lines=1)[0], FAINT, small)
        left += side + MARGIN
    for index, (line, ink) in enumerate(texts):
        pen.text((BORDER + MARGIN, text_top + index * LINE), line, ink, font)
    return sheet


def draw_cards(cards: list[Card], side: int, cards_per_row: int) -> Image.Image:
    """Lay cards out in rows of equal width, at most so many beside each other, and as many as fit in ``MAX_WIDTH`` pixels."""
    most = max(len(card.images) for card in cards)
    width = max(most * (side + MARGIN) - MARGIN, MIN_TEXT_WIDTH) + 2 * (MARGIN + BORDER)
    cards_per_row = max(1, min(cards_per_row, len(cards), MAX_WIDTH // (width + MARGIN)))
    drawn = [_draw_card(card, side, width) for card in cards]
    rows = [drawn[start : start + cards_per_row] for start in range(0, len(drawn), cards_per_row)]
    heights = [max(card.height for card in row) for row in rows]
    size = (MARGIN + cards_per_row * (width + MARGIN), MARGIN + sum(height + MARGIN for height in heights))
    desk = Image.new("RGB", size, DESK)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            desk.paste(card, (MARGIN + column * (width + MARGIN), y))
        y += height + MARGIN
    return desk
