"""Plain English words, in this file so that nothing is downloaded: names of needles, and lists of words."""

from __future__ import annotations

import random
from itertools import product

from cpinfer_tools.evaluation.longctx.recall_text import words

ADJECTIVES = tuple(
    words("""
    able ancient angry basic bitter blank bold brave brief bright broad calm careful cheap clean clear clever
    cloudy coarse cold common cosy crisp cruel curious curved damp dear decent deep dense distant double dry
    dull eager early easy elder empty equal exact faint fair famous fancy fierce final firm flat fluent foreign
    frail free fresh frosty funny gentle giant glad golden grand grave great greedy grim handy happy harsh hasty
    healthy heavy hidden hollow honest humble hungry idle inner ivory jolly keen kind large lazy lean level
    light likely little lively local lonely loose loud lovely loyal lucky mellow merry mild minor misty modern
    modest moral mossy muddy narrow neat nervous nimble noble noisy normal odd olive open outer painful pale
    patient perfect plain pleasant polite poor proper proud pure purple quick quiet rapid rare ready recent rich
    rigid ripe rocky rosy rough round royal rusty sacred salty sandy scarlet secret sharp shiny short shy silent
    silly silver simple sleepy slender slim slow small smooth snowy sober soft solid sour spare special steady
    steep stiff still stormy stout strange strict strong stubborn sturdy subtle sudden sunny sweet swift tall
    tame tart tender thick thin tidy timid tiny tired tough true typical upper urban useful usual vague vast
    velvet violet vivid warm weary wicked wild windy wise witty wooden worthy young zesty
    """)
)
NOUNS = tuple(
    words("""
    acorn actor alarm album almond amber anchor angle ankle answer antler apple apron arch arena armour arrow
    artist atlas attic author autumn bacon badge bakery balcony ballad bamboo banana banjo banner barley barrel
    basin basket beacon beaver bench berry bicycle biscuit blanket blossom bonnet border bottle branch bread
    breeze bridge broom brother bucket buckle bundle butter button cabin cactus camel camera canal candle canvas
    canyon caravan carbon cargo carpet carriage carrot castle cattle cedar cellar cement chalk chamber chapel
    chapter cherry chicken chimney cinder circle circus city clay cliff climate clock closet clover coast
    cobbler coffee collar colony column comet compass concert copper coral corner cottage cotton council cousin
    cradle crater crayon cricket crystal cuckoo cupboard curtain cushion daisy dancer dawn deer desert dessert
    diamond dinner doctor dolphin donkey dragon drawer drum eagle easel echo elbow ember engine errand estate
    evening falcon farmer feather fence fern ferry fiddle field figure finger fisher flag flame flannel flower
    flute forest fossil fountain fox fragment freight frigate frost fruit funnel furnace galaxy gallery garden
    garlic garment gate ginger giraffe glacier glove goblet goose gopher granite grape grass gravel grocer
    guitar gutter hammer hammock harbour harvest hatchet hazel heather hedge helmet hermit heron hill hinge
    honey horizon hornet horse hostel hunter icicle inkwell insect island ivy jacket jaguar jasmine jelly jewel
    jigsaw journal journey jungle kennel kernel kettle kitchen kitten knapsack ladder lagoon lantern lark
    laundry lava leather lemon lentil leopard letter library lilac lily linen lion lizard lobster locket locust
    lodge lumber lynx magnet magpie mammal mango mantle maple marble margin marina market marsh mason meadow
    medal melody melon menu merchant meteor mill mineral minnow mirror mitten monkey moor morning mortar mosaic
    moth motor mountain muffin mulberry museum musket mustard napkin necklace needle nest nettle nickel notebook
    nutmeg oak oasis oatmeal ocean office onion opera orbit orchard orchid organ otter oven owl oyster paddle
    palace panda panther paper parade parcel parlour parrot parsley pasture patrol pavement peach peacock pearl
    pebble pelican pencil penguin pepper petal piano pickle picnic pigeon pillar pillow pilot pioneer pirate
    piston pitcher planet plaster platter plaza plough plum pocket poem polka pond pony poppy porridge portrait
    possum postcard potato pottery powder prairie prawn pudding pulley pumpkin puppet puzzle pyramid quarry
    quartz quilt rabbit raccoon radish rafter railway raisin rattle raven razor recipe reef ribbon riddle river
    robin rocket rooster rudder ruby saddle saffron sailor salad salmon sandal sapphire satchel sauce saucer
    sausage scarf scholar school scissors scooter seagull season sentry shadow shawl shelf shepherd shield
    shovel shrimp shutter signal sister skeleton sketch slipper soldier sonnet sparrow spider spindle spinach
    sponge spruce squash squid stable stallion station statue steam steeple stove stream string suitcase summer
    sunset supper swallow swan sweater syrup tablet tailor tavern teacher teapot temple thimble thistle throne
    thunder ticket tiger timber tinsel toast tomato torch tower tractor trader trail trumpet trunk tulip tunnel
    turban turnip turtle uncle valley vanilla vault vessel village vinegar violin voyage waffle waggon walnut
    walrus warden weasel weather whale wheat whisker whistle widow willow window winter wizard wolf woodland
    workshop yarn yogurt zebra zephyr zipper
    """)
)


def distinct_words(rng: random.Random, n: int) -> list[str]:
    """`n` different words; past those of the lists, pairs of them (`brave-otter`), for as long as these last."""
    found = [*ADJECTIVES, *NOUNS]
    rng.shuffle(found)
    if n > len(found):
        pairs = ["-".join(pair) for pair in product(ADJECTIVES, NOUNS)]
        found += rng.sample(pairs, min(n - len(found), len(pairs)))
    return found[:n]


def distinct_pairs(rng: random.Random, n: int) -> list[str]:
    """`n` different names of the form `brave-otter`."""
    chosen = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), n)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]
