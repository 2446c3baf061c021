"""The named concepts of the demo: 64 things with the code points of their sprites, and stuff; their words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Concept:
    """A concept that captions can name: its words and, of a thing, the sprites that show it."""

    name: str
    codes: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    irregular_plural: str | None = None

    @property
    def plural(self) -> str:
        """The plural of the name."""
        if self.irregular_plural is not None:
            return self.irregular_plural
        if self.name.endswith(("s", "x", "ch", "sh")):
            return f"{self.name}es"
        if self.name.endswith("y"):
            return f"{self.name[:-1]}ies"
        return f"{self.name}s"


# In the order of class ids, from 1. Code points are hexadecimal, without the variation selector fe0f.
CONCEPTS: tuple[Concept, ...] = (
    Concept("dog", ("1f436", "1f415", "1f429"), ("puppy", "hound")),
    Concept("cat", ("1f431", "1f408"), ("kitten", "kitty")),
    Concept("rabbit", ("1f430", "1f407"), ("bunny", "hare")),
    Concept("fox", ("1f98a",)),
    Concept("panda", ("1f43c",)),
    Concept("tiger", ("1f42f", "1f405")),
    Concept("lion", ("1f981",)),
    Concept("cow", ("1f42e", "1f404"), ("cattle",)),
    Concept("pig", ("1f437", "1f416"), ("piglet", "hog")),
    Concept("frog", ("1f438",), ("toad",)),
    Concept("penguin", ("1f427",)),
    Concept("owl", ("1f989",)),
    Concept("horse", ("1f434", "1f40e"), ("pony",)),
    Concept("bee", ("1f41d",), ("bumblebee",)),
    Concept("butterfly", ("1f98b",)),
    Concept("snail", ("1f40c",)),
    Concept("turtle", ("1f422",), ("tortoise",)),
    Concept("octopus", ("1f419",)),
    Concept("crab", ("1f980",)),
    Concept("fish", ("1f41f", "1f420"), irregular_plural="fish"),
    Concept("dolphin", ("1f42c",)),
    Concept("elephant", ("1f418",)),
    Concept("giraffe", ("1f992",)),
    Concept("zebra", ("1f993",)),
    Concept("apple", ("1f34e", "1f34f")),
    Concept("lemon", ("1f34b",)),
    Concept("banana", ("1f34c",)),
    Concept("watermelon", ("1f349",)),
    Concept("grapes", ("1f347",), irregular_plural="grapes"),
    Concept("strawberry", ("1f353",)),
    Concept("pineapple", ("1f34d",)),
    Concept("carrot", ("1f955",)),
    Concept("corn", ("1f33d",), ("maize",), irregular_plural="corn"),
    Concept("broccoli", ("1f966",), irregular_plural="broccoli"),
    Concept("mushroom", ("1f344",), ("toadstool",)),
    Concept("cheese", ("1f9c0",)),
    Concept("hamburger", ("1f354",), ("burger",)),
    Concept("pizza", ("1f355",)),
    Concept("cake", ("1f382", "1f370")),
    Concept("donut", ("1f369",), ("doughnut",)),
    Concept("car", ("1f697", "1f698", "1f699"), ("automobile",)),
    Concept("bus", ("1f68c", "1f68d"), ("coach",)),
    Concept("bicycle", ("1f6b2",), ("bike",)),
    Concept("motorcycle", ("1f3cd",), ("motorbike",)),
    Concept("train", ("1f686", "1f682"), ("locomotive",)),
    Concept("airplane", ("2708", "1f6e9"), ("plane", "aircraft")),
    Concept("helicopter", ("1f681",), ("chopper",)),
    Concept("rocket", ("1f680",), ("spaceship",)),
    Concept("sailboat", ("26f5",), ("boat", "yacht")),
    Concept("umbrella", ("2602", "2614"), ("parasol",)),
    Concept("guitar", ("1f3b8",)),
    Concept("basketball", ("1f3c0",)),
    Concept("camera", ("1f4f7", "1f4f8")),
    Concept("clock", ("23f0", "1f570"), ("timepiece",)),
    Concept("book", ("1f4d5", "1f4d7", "1f4d8", "1f4d6"), ("novel",)),
    Concept("scissors", ("2702",), ("shears",), irregular_plural="scissors"),
    Concept("balloon", ("1f388",)),
    Concept("crown", ("1f451",), ("tiara",)),
    Concept("glasses", ("1f453",), ("spectacles",), irregular_plural="glasses"),
    Concept("house", ("1f3e0", "1f3e1"), ("home", "cottage")),
    Concept("tree", ("1f333", "1f332")),
    Concept("rose", ("1f339",)),
    Concept("sunflower", ("1f33b",)),
    Concept("cactus", ("1f335",), irregular_plural="cacti"),
)

# What fills a region instead of having an outline: backgrounds that captions can name. Class ids follow those
# of the things. Words are those of pipeline/prompts/background.txt where a texture of the kind can be drawn.
STUFF: tuple[Concept, ...] = (
    Concept("sky"),
    Concept("clouds", synonyms=("cloud",)),
    Concept("grass", synonyms=("lawn", "meadow")),
    Concept("soil", synonyms=("dirt", "earth")),
    Concept("sand", synonyms=("beach", "desert")),
    Concept("snow"),
    Concept("water", synonyms=("waves", "river", "sea", "ocean")),
    Concept("road", synonyms=("street", "asphalt")),
    Concept("pavement", synonyms=("sidewalk", "cobblestones")),
    Concept("gravel", synonyms=("pebbles", "stones")),
    Concept("floor", synonyms=("parquet", "planks")),
    Concept("carpet", synonyms=("rug",)),
    Concept("wall", synonyms=("brick wall", "bricks")),
    Concept("curtain", synonyms=("drapes", "curtains")),
    Concept("leaves", synonyms=("foliage", "bushes")),
    Concept("forest", synonyms=("woods", "jungle")),
    Concept("mountains", synonyms=("hill", "mountain", "hills")),
    Concept("building", synonyms=("facade", "skyscraper")),
)
FIRST_STUFF_ID = len(CONCEPTS) + 1
NAMED: tuple[Concept, ...] = CONCEPTS + STUFF

# Stuff that takes an article in the singular.
COUNTED_STUFF = frozenset(
    {
        "cloud",
        "lawn",
        "meadow",
        "beach",
        "desert",
        "river",
        "sea",
        "ocean",
        "road",
        "street",
        "sidewalk",
        "floor",
    }
    | {
        "carpet",
        "rug",
        "wall",
        "curtain",
        "forest",
        "jungle",
        "hill",
        "mountain",
        "building",
        "facade",
        "skyscraper",
    }
)

# Nouns that take no article in the singular.
MASS_NOUNS = frozenset({"grapes", "corn", "broccoli", "scissors", "glasses", "cheese", "cattle", "maize"}) | {
    "shears",
    "spectacles",
}

# Sprites that appear in scenes and are never named: key, bell, gem, gift, trophy, bulb, laptop, battery,
# magnet, telescope, drum, trumpet, hot beverage, cup with straw, croissant, egg, lollipop, shoe, hat,
# droplet, star, globe, joystick, anchor, hammer, fire.
DISTRACTOR_CODES: tuple[str, ...] = (
    *(
        "1f511",
        "1f514",
        "1f48e",
        "1f381",
        "1f3c6",
        "1f4a1",
        "1f4bb",
        "1f50b",
        "1f9f2",
        "1f52d",
        "1f941",
        "1f3ba",
        "2615",
    ),
    *(
        "1f964",
        "1f950",
        "1f373",
        "1f36d",
        "1f45f",
        "1f3a9",
        "1f4a7",
        "2b50",
        "1f30d",
        "1f579",
        "2693",
        "1f528",
        "1f525",
    ),
)
