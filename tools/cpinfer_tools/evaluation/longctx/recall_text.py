"""The texts of the recall models: records to remember, filler around them, and no word in two roles.

`tools/dev/make_recall_tiny.py` makes models that know exactly these words; `recall.py` makes tasks of them.
"""

from __future__ import annotations

import random
import re


def words(text: str) -> list[str]:
    """The words of a literal list that reads like a text."""
    return text.split()


# A record reads "Remember: NAME DOES THINGS;". No word is in two of these lists, nor in the filler: each is followed by
# one thing only within a prompt, which is what lets induction, blind beyond one token of context, retrieve it honestly.
NAMES = words("""
    Alice Amos Anna Basil Bella Boris Carla Cyrus Diana Dora Edgar Elsa Emil Esther Felix Flora Frank Gemma
    Grace Gus Hanna Hector Helen Hugo Ida Igor Irene Ivan Jacob Jane Jonas Julia Karl Kate Klaus Laura Leo Linus
    Lucy Maria Max Mila Nadia Nina Noah Olga Omar Oscar Paula Peter Petra Quinn Rita Robin Rosa Ruth Simon Sofia
    Tess Tomas Ursula Victor Wanda Yara
""")
DOES = words("""
    admires arranges balances borrows breaks brings builds buys carries carves catches cleans collects copies
    counts covers designs draws drops fetches finds fixes folds forgets gathers gives guards hides holds
    inspects invents keeps knows lends lifts likes loses makes measures mends moves needs offers opens owns
    packs paints polishes prefers pulls pushes repairs sells sends sews shows sketches sorts steals studies
    takes throws wants washes
""")
THINGS = words("""
    anchors apples arrows baskets bells blankets boats books bottles boxes brushes buttons cakes candles carpets
    chairs clocks coats coins compasses cups curtains dolls drums feathers flags flutes gloves hammers hats
    helmets jars kettles keys kites ladders lamps lanterns letters maps masks mirrors nets paddles pearls
    pencils pillows pipes plates ribbons ropes saddles shells shoes spoons stamps tables tents toys umbrellas
    vases violins wagons watches
""")
FILLER = {
    "adj": words("""
        old quiet narrow distant pale golden silver wooden frozen gentle heavy empty broken hidden ancient
        bright dark soft cold warm tall small wide deep lonely misty dusty green grey white red blue young
        slow wild calm steep rough smooth hollow round hard thin thick strange famous northern southern
        eastern western
    """),
    "noun": words("""
        river bridge hill forest valley mountain village harbour garden meadow road path field stream lake
        shore island tower castle church market mill barn orchard wall gate window door roof street square
        station cliff cave desert moor marsh pond well fountain wind rain snow storm cloud moon sun fog tide
        wave fire shadow light horse dog fox owl crow heron farmer sailor miller shepherd stranger baker
        soldier teacher captain child goat cat wolf bear deer hawk crane swan tree oak willow boulder ferry
    """),
    "verb": words("""
        ran rested waited turned drifted wandered stood slept fell rose moved climbed sank lingered passed
        stopped settled leaned glowed faded trembled vanished returned hurried crept floated travelled
        danced slipped circled walked sang listened shivered flickered hovered tumbled laughed hesitated
        arrived
    """),
    "prep": words(
        "past over under beside near behind beyond above below toward across along around through against inside"
    ),
    "adv": words("""
        slowly quietly gently suddenly softly often again alone calmly still everywhere together
    """),
    "day": [str(n) for n in range(1, 105)],
}
TEMPLATES = (
    "The {adj} {noun} {verb} {prep} the {adj} {noun}.",
    "That {noun} {verb} {adv} {prep} the {noun}, and the {noun} {verb}.",
    "On day {day} the {noun} {verb} {prep} another {adj} {noun}.",
    "When the {noun} {verb}, another {adj} {noun} {verb} {adv}.",
    "It was {adj} and {adj} {prep} the {noun}, but the {adj} {noun} {verb} there.",
)
EXCERPT, STOP, PAD = "...", ";", "<pad>"  # every prompt starts with EXCERPT


def pieces(text: str) -> list[str]:
    """Splits text into one string per token, each with its leading space."""
    return re.findall(r" ?\w+|[.,:;]", text)


def filler_sentence(rng: random.Random) -> str:
    """A sentence of filler, without the space before it."""
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(FILLER[slot[1]]), rng.choice(TEMPLATES))
