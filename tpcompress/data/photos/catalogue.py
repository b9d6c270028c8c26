"""Which photographs make which class, and which of them only test scenes show.

Paths lead into two Debian packages, see `scripts/photos/sources.py`. Every class has photographs of its own for test
scenes: a model is asked about pictures that it was never trained on.
"""

from __future__ import annotations

from typing import Final

OBJECTS: Final = {
    # class: (photographs of training scenes, photographs of test scenes); `folder: name name; folder: name`
    "bird": (
        "animals/birds: adelaide-rosella albino_peahen crow crowned_crane cuckoo drake gander guineafowl "
        "heron_greatblue lark magellanic_penguin magpie nandou ostrich pelican penguin pink_flamingo rainbow-lorikeet "
        "rooster silver-gull tucan turkey vulture",
        "animals/birds: blackbird duck little-penguin pigeon seagull",
    ),
    "flower": (
        "plants/flowers: adeenia anemone_red bolsom chemparathi daffodil flower1 flower10 flower2 flower3 flower4 "
        "flower8 flower9 marigold pigface red-gazania",
        "plants/flowers: flower5 flower6 whitestar-petunia yellow-flower",
    ),
    "fruit": (
        "food/fruit: apple_fuji apple_green apple_sierra_beauty apricot lemon mandarine mango pomegranate; "
        "food/vegetables: tomato",
        "food/fruit: Apricot_whole apple_granny_smith apple_red orange",
    ),
    "grave": (
        "seasonal/halloween: grave-a grave-b grave-d grave-e grave-f grave-g grave-i",
        "seasonal/halloween: grave-h grave-j",
    ),
    "hoofed": (
        "animals/mammals/bovines: bison bull cow gnu-baby gnu-stand goat indian_blackbuck mountaingoat yak zebu; "
        "animals/mammals/camel: camel; animals/mammals/deer: caribou deer doe; "
        "animals/mammals/equines: donkey_eating horse zebra",
        "animals/mammals/bovines: cow_white gnu-baby-stand; animals/mammals/camel: dromedary; "
        "animals/mammals/deer: wapiti; animals/mammals/equines: donkey",
    ),
    "instrument": (
        "hobbies/music/string: guitar2 guitar_classical guitar_electric violin",
        "hobbies/music/string: guitar_electric_bass cello",
    ),
    "planet": (
        "space/planets: 1_mercury 2_venus 4_mars 5_jupiter 8_neptune; space/moon: moon_3qt",
        "space/planets: 9_pluto; space/moon: moon_full",
    ),
    "tool": (
        "household/tools: hammer plyers saw wrench wrench_plumbers; household/arttools: scissors_small_open; "
        "household/dishes/utensils: nutcracker",
        "household/tools: mallet_metal wrench_adjustable; household/arttools: scissors_small_closed",
    ),
    "tree": (
        "plants/trees: birch holly_leaves liberia-palm tree336; plants: eggplant lettuce_bolted thyme",
        "plants/trees: holm_oak; plants: lavender",
    ),
    "vehicle": (
        "vehicles/auto: beetle sedan truck; vehicles/emergency: firetruck; vehicles/masstransit: green_korean_bus; "
        "vehicles/construction: dumper; military/vehicles: bradley ww2_german_gun; vehicles/race: indycar",
        "vehicles/auto: sportscar2; vehicles: garbagetruck; military/vehicles: infantry-stryker",
    ),
}

PLACES: Final = {
    # place: the same for backgrounds; the first part of a folder is the resource file
    "building": (
        "categorization/monuments: operaHouse zimniPalace arcDeTriomphe IndiaGate leMusee cathedral parthenon "
        "usCapitol monument1 monument3 brandenburgGate; explore_monuments/india: charminar hawaMahal mysorePalace; "
        "explore_monuments/france: chateaudeChambord palaisdesPapes arlesAmphitheater; "
        "explore_monuments/germany: berlinCathedral schwerinPalace",
        "categorization/monuments: monument2 victoriaMemorial; explore_monuments/germany: aulaPalatina; "
        "explore_monuments/france: reimsCathedral; explore_monuments/usa: lincolnMemorial",
    ),
    "panels": ("categorization/renewable: solar4 solar6 solar7", "categorization/renewable: solar5 solar8"),
    "pyramid": (
        "explore_monuments/egypt: greatPyramidOfGiza meidumPyramid redPyramid",
        "explore_monuments/egypt: bentPyramid",
    ),
    "sea": ("clickgame: sea1 sea2 sea4 sea5", "clickgame: sea3 sea6"),
    "windmill": (
        "categorization/renewable: windmill windmill1 windmill2 windmill3 windmill4 windmill5 windmill7 windmill8 "
        "windmill9 windmill11 windmill12",
        "categorization/renewable: windmill13 windmill14 windmill15",
    ),
}

COLOURS: Final = {
    "red": (220, 20, 30),
    "blue": (30, 60, 230),
    "green": (20, 150, 40),
    "yellow": (250, 220, 20),
    "pink": (250, 110, 190),
    "white": (250, 250, 250),
}
"""Colours of dots and signs."""

CELLS: Final = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
"""Thirds of the picture, row by row."""

SIDES: Final = ("left", "right", "above", "below")
COUNTS: Final = ("one", "two", "three", "four")
SPLITS: Final = ("train", "validation", "test")
"""`validation` shows other scenes of the photographs of `train`; `test` shows photographs of its own."""


def files_of(listing: str) -> list[str]:
    """The paths that `folder: name name; folder: name` lists."""
    found = []
    for group in listing.split(";"):
        folder, _, names = group.partition(":")
        found += [f"{folder.strip()}/{name}" for name in names.split()]
    return found
