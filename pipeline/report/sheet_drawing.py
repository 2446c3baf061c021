"""How a contact sheet looks: panels, overlays, text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFilter

from legrad.pictures import font, heat_over

CARDS_PER_LINE = 2
PANEL_SIDE = 208
PANEL_GAP = 8
CARD_GAP = 48
MARGIN = 32
HEADING_HEIGHT = 40
TEXT_TOP = 10
PROMPT_SIZE, DETAIL_SIZE, NOTE_SIZE = 24, 19, 17
PROMPT_LINE_HEIGHT, DETAIL_LINE_HEIGHT = 31, 27
PROMPT_LINES = 2
LINE_GAP = 26
PAPER, FRAME = (255, 255, 255), (241, 243, 246)
INK, FAINT = (17, 24, 39), (107, 114, 128)
MASK_COLOUR, TRUTH_COLOUR = (255, 122, 0), (0, 184, 148)
HEADINGS = ("image", "heat map", "mask", "ground truth")


@dataclass(frozen=True)
class Card:
    """One (sample, prompt) of the sheet.

    Attributes:
        image: the original image, RGB.
        prompt: the text.
        similarity: cosine of image and prompt.
        relevance: normalised relevance grid, 0 to 1; None where the job did not store it.
        mask: the mask, in any frame of the image's aspect.
        truth: pixels of the object; None without ground truth.
        iou: foreground IoU of mask and truth; None without ground truth.
    """

    image: Image.Image
    prompt: str
    similarity: float
    relevance: Float[np.ndarray, "grid_height grid_width"] | None
    mask: Bool[np.ndarray, "mask_height mask_width"]
    truth: Bool[np.ndarray, "truth_height truth_width"] | None
    iou: float | None


def draw_sheet(cards: Sequence[Card], *, note: str) -> Image.Image:
    """Draw the cards, two on a line, in their order.

    Args:
        cards: at least one. A kind of panel that no card has is left out.
        note: a small line at the bottom.
    """
    shown = _shown_panels(cards)
    card_width = len(shown) * (PANEL_SIDE + PANEL_GAP) - PANEL_GAP
    prompt_lines = [_wrapped(card.prompt, card_width) for card in cards]
    text_height = TEXT_TOP + max(map(len, prompt_lines)) * PROMPT_LINE_HEIGHT + DETAIL_LINE_HEIGHT
    line_height = PANEL_SIDE + text_height + LINE_GAP
    columns = min(CARDS_PER_LINE, len(cards))
    lines = -(-len(cards) // CARDS_PER_LINE)
    width = 2 * MARGIN + columns * (card_width + CARD_GAP) - CARD_GAP
    height = 2 * MARGIN + HEADING_HEIGHT + lines * line_height + NOTE_SIZE
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + column * (card_width + CARD_GAP) for column in range(columns)]
    for left in lefts:
        _draw_headings(draw, left, [HEADINGS[panel] for panel in shown])
    for position, card in enumerate(cards):
        left = lefts[position % CARDS_PER_LINE]
        top = MARGIN + HEADING_HEIGHT + position // CARDS_PER_LINE * line_height
        panels = _panels(card)
        for column, panel in enumerate(shown):
            sheet.paste(panels[panel], (left + column * (PANEL_SIDE + PANEL_GAP), top))
        _draw_text(draw, left, top + PANEL_SIDE + TEXT_TOP, prompt_lines[position], _details(card))
    draw.text((MARGIN, height - MARGIN - NOTE_SIZE), note, FAINT, font("DejaVuSans", NOTE_SIZE))
    return sheet


def _shown_panels(cards: Sequence[Card]) -> list[int]:
    has_heat = any(card.relevance is not None for card in cards)
    has_truth = any(card.truth is not None for card in cards)
    return [panel for panel, shown in enumerate((True, has_heat, True, has_truth)) if shown]


def _panels(card: Card) -> tuple[Image.Image, ...]:
    photo = _fitted(card.image)
    blank = np.zeros_like(photo)
    blank[...] = FRAME
    heat = blank if card.relevance is None else heat_over(photo, torch.from_numpy(card.relevance))
    truth = blank if card.truth is None else _mask_overlay(photo, card.truth, TRUTH_COLOUR)
    parts = (photo, heat, _mask_overlay(photo, card.mask, MASK_COLOUR), truth)
    return tuple(_framed(part) for part in parts)


def _fitted(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """The image scaled so that its longer side fills a panel."""
    scale = PANEL_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.array(image.resize(size, Image.Resampling.LANCZOS))


def _framed(pixels: UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    panel = Image.new("RGB", (PANEL_SIDE, PANEL_SIDE), FRAME)
    height, width = pixels.shape[:2]
    panel.paste(Image.fromarray(pixels), ((PANEL_SIDE - width) // 2, (PANEL_SIDE - height) // 2))
    return panel


def _mask_overlay(
    photo: UInt8[np.ndarray, "height width 3"],
    mask: Bool[np.ndarray, "rows columns"],
    colour: tuple[int, int, int],
) -> UInt8[np.ndarray, "height width 3"]:
    """The object in its colours within an outline, the rest grey and pale."""
    height, width = photo.shape[:2]
    smooth = Image.fromarray(mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BICUBIC)
    inside = np.array(smooth) >= 128
    outline = np.array(Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5))) > 0
    pale = 0.35 * photo.mean(axis=2, keepdims=True) + 0.65 * 245
    overlay = np.where(inside[..., None], photo, pale)
    overlay[outline & ~inside] = colour
    return np.rint(overlay).astype(np.uint8)


def _draw_headings(draw: ImageDraw.ImageDraw, left: int, headings: Sequence[str]) -> None:
    for column, heading in enumerate(headings):
        position = (left + column * (PANEL_SIDE + PANEL_GAP), MARGIN)
        draw.text(position, heading, FAINT, font("DejaVuSans", DETAIL_SIZE))


def _draw_text(
    draw: ImageDraw.ImageDraw, left: int, top: int, prompt_lines: Sequence[str], details: str
) -> None:
    for line in prompt_lines:
        draw.text((left, top), line, INK, font("DejaVuSans-Bold", PROMPT_SIZE))
        top += PROMPT_LINE_HEIGHT
    draw.text((left, top), details, FAINT, font("DejaVuSans", DETAIL_SIZE))


def _details(card: Card) -> str:
    covered = f"mask {100 * card.mask.mean():.0f} % of the image"
    parts = [f"similarity {card.similarity:.2f}", covered]
    return "   ".join(parts if card.iou is None else [*parts, f"IoU {card.iou:.2f}"])


def _wrapped(prompt: str, width: int) -> list[str]:
    """The prompt in at most PROMPT_LINES lines of a width in pixels; an ellipsis stands for what is cut."""
    lines: list[str] = []
    rest = " ".join(prompt.split())
    while rest and len(lines) < PROMPT_LINES:
        line = _longest_start(rest, width)
        rest = rest[len(line) :].lstrip()
        lines.append(line)
    if rest:
        lines[-1] = _longest_start(lines[-1], width - _text_width("…")) + "…"
    return lines or [""]


def _longest_start(text: str, width: float) -> str:
    """As many whole words as fit, or as many characters where not even the first word does."""
    if _text_width(text) <= width:
        return text
    fitting = next(end for end in range(len(text), 0, -1) if end == 1 or _text_width(text[:end]) <= width)
    last_space = text.rfind(" ", 0, fitting + 1)
    return text[:last_space] if last_space > 0 else text[:fitting]


def _text_width(text: str) -> float:
    return font("DejaVuSans-Bold", PROMPT_SIZE).getlength(text)
