"""Words to hide and to count; a table, so that no task needs a download."""

from __future__ import annotations

import random
from collections.abc import Iterator

ADJECTIVES = """
able ancient angry amber awake bald basic bitter bland blunt bold brave brief bright brisk broad brown calm careful
cheap cheerful chilly clean clever cloudy coarse cold common cool coral crisp curious curly damp daring dark deep dense
distant dizzy double dry dull dusty eager early elastic empty exact faint fair famous fancy fast fierce final flat
fluffy foggy fond formal fragile frank fresh friendly frozen full funny gentle giant gifted glad gleaming golden grand
grateful gray green grumpy happy hasty heavy hidden hollow honest huge humble hungry icy ideal idle immense jolly jumpy
keen kind large late lazy lean level light lively local lonely long loose loud loyal lucky mellow merry mighty mild
modern modest moist muddy narrow neat nervous nimble noble noisy novel odd orange ordinary pale patient plain pleasant
polite proud purple quaint quick quiet rapid rare ready red remote rigid ripe robust rough round royal rusty salty
scarce secret serene sharp shiny short shy silent silver simple sleepy slim slow small smooth soft solid sour spare
spicy square steady steep stiff still stormy strict sturdy subtle sudden sunny swift tall tame tasty tender thick thin
tidy tight tiny tough tranquil true upset urban vague vast velvet violet vivid warm wary weary wide wild windy wise
witty wooden yellow young zany
""".split()

NOUNS = """
acorn actor airport album anchor ankle apple apron arcade arrow artist atlas attic author autumn badge bagel bakery
balcony ballad bamboo banana banjo barrel basket beach beacon beaver bicycle biscuit blanket blossom bottle boulder
bracelet branch bridge broom brush bucket buffalo butter button cabin cactus camera canal candle canoe canyon captain
caravan carpet carrot castle cathedral cave cedar cellar chapel cherry chimney circus citizen clarinet cliff clock cloud
clover coach coast cobra coffee comet compass copper corner cottage cotton cousin cradle crayon cricket crystal cupboard
curtain cushion dancer deer desert diamond dinner doctor dolphin donkey dragon drawer drum eagle earth elbow elephant
engine envelope falcon farmer feather fence ferry fiddle finger flame flask flower flute forest fountain fox galaxy
garage garden garlic gate ghost ginger giraffe glacier glove goose gorilla grape gravel guitar hammer harbor harvest
hazel helmet heron hill honey horizon horse hospital hotel island ivory jacket jaguar jewel jungle kettle kitchen kite
koala ladder lagoon lake lamp lantern laundry lemon leopard letter library lily lion lizard lobster magnet mango maple
marble market meadow melon mirror mitten monkey mosaic mountain mouse museum mushroom napkin needle nephew nest notebook
oasis ocean olive onion orchard orchid otter oven owl oyster paddle palace panda panther paper parade parrot pasture
peach peacock pebble pelican pencil penguin pepper piano picnic pigeon pillow pilot pirate planet plaza pocket poet
pond pony potato powder prairie prince puddle pumpkin puppet puzzle pyramid quarry queen rabbit raccoon radio railway
rainbow raven ribbon river robin rocket roof rose saddle sailor salmon sandal saucer scarf school scooter seed shadow
shark shelf shovel shrimp sister skate sketch sleeve snail soldier spider spoon squirrel stable stadium statue stove
stream street summit sunset swan sweater table tailor teapot temple theater thimble thunder tiger timber toad tomato
tower tractor train treasure trumpet tulip tunnel turkey turtle umbrella uncle valley vase village violin volcano
waffle wagon wallet walnut walrus warrior weasel whale wheat whistle willow window winter wolf wombat wrist yogurt zebra
""".split()

CITIES = "Avignon Bergen Cusco Dakar Esfahan Freiburg Galway Hobart Izmir Jaipur Kyoto Lisbon Malmo Nairobi".split()
MEALS = ("a sandwich", "a bowl of soup", "two ripe peaches", "a cheese pie", "some warm bread", "a plate of rice")
PARKS = ("Dolores Park", "Linden Park", "the Old Orchard", "Harbor Gardens", "Willow Park", "the Botanic Garden")
WEATHERS = ("a sunny day", "a windy day", "a cloudy afternoon", "a cool morning", "a warm evening")

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def key(rng: random.Random) -> str:
    """An adjective and a noun, as in RULER: `quick-lizard`."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def uuid(rng: random.Random) -> str:
    """A random version 4 UUID."""
    digits = f"{rng.getrandbits(128):032x}"
    digits = f"{digits[:12]}4{digits[13:16]}{rng.choice('89ab')}{digits[17:]}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of that many digits."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def distinct(rng: random.Random) -> Iterator[str]:
    """Words without end, none twice: the table in random order, then made-up ones of four syllables."""
    table = sorted({*ADJECTIVES, *NOUNS})
    rng.shuffle(table)
    yield from table
    seen = set(table)
    while True:
        word = "".join(rng.choices(_SYLLABLES, k=4))
        if word not in seen:
            seen.add(word)
            yield word
