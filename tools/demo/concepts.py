"""Which emoji the model learns, what a caption calls them, and which are held out."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

OPEN_CATEGORIES = frozenset(
    {
        "Activities",
        "Animals & Nature",
        "Food & Drink",
        "Objects",
        "Smileys & Emotion",
        "Travel & Places",
    }
)
DROPPED = re.compile(
    r"-oclock$|-thirty$|^keycap|^japanese-(?!castle|dolls|post)|^input-|-button$|^letter-"
    r"|-skin-tone|-arrow$|^regional|^face-with-symbols|facing-right$|^hundred-points$"
    r"|^heart-(exclamation|suit)$|^(club|diamond|spade)-suit$|^map-of-japan$"
)
_BODY = """
    anatomical-heart baby backhand-index-pointing-down backhand-index-pointing-left
    backhand-index-pointing-right backhand-index-pointing-up biting-lip bone boy brain
    bust-in-silhouette clapping-hands crossed-fingers ear eye eyes fingerprint flexed-biceps
    folded-hands foot footprints girl hand-with-fingers-splayed handshake heart-hands
    index-pointing-up leg love-you-gesture lungs man mechanical-arm mechanical-leg mouth
    nail-polish nose ok-hand old-man old-woman open-hands palms-up-together pinched-fingers
    pinching-hand raised-fist raised-hand raising-hands santa-claus sign-of-the-horns thumbs-down
    thumbs-up tongue tooth victory-hand vulcan-salute waving-hand woman writing-hand
"""
BODY = frozenset(_BODY.split())
SYMBOLS = re.compile(
    r"^(black|blue|brown|green|orange|purple|red|white|yellow)-(circle|square)$"
    r"|^(large|small)-(blue|orange)-diamond$|^(hollow-red-circle|check-mark|cross-mark|warning)$"
    r"|^(no-entry|prohibited|recycling-symbol|radioactive|biohazard|peace-symbol|yin-yang)$"
    r"|^(red|white)-(question|exclamation)-mark$|^red-triangle-pointed-(up|down)$"
    r"|^(infinity|plus|minus|multiply|divide|atom-symbol|star-of-david|fleur-de-lis)$"
    r"|^(trident-emblem|menorah|sparkle|female-sign|male-sign|heavy-dollar-sign)$"
)
_EVERYDAY = """
    airplane alarm-clock alien ambulance anchor automobile avocado balloon banana baseball
    basketball bear bell bicycle birthday-cake black-cat blue-book blue-circle blue-heart bread
    broccoli butterfly cactus camera candle carrot castle cat cat-face cherries cherry-blossom
    christmas-tree closed-umbrella cloud clown-face cookie cow-face crab crescent-moon crown
    crying-face cupcake deciduous-tree dog dog-face dolphin doughnut duck eggplant elephant
    evergreen-tree eye face-with-tears-of-joy fire fire-engine fish flag-in-hole flamingo
    four-leaf-clover fox french-fries frog full-moon ghost grapes green-apple green-book
    green-heart grinning-face guitar hamburger hammer hedgehog hibiscus high-voltage hot-beverage
    house ice-cream jack-o-lantern key koala lady-beetle lemon light-bulb lion lollipop locomotive
    loudly-crying-face maple-leaf mouse-face mushroom octopus orange-heart owl panda parrot peach
    pear pencil penguin pig-face pile-of-poo pineapple pizza potted-plant purple-heart
    rabbit-face rainbow red-apple red-circle red-heart robot rocket rose sailboat scissors
    skull slightly-smiling-face smiling-face-with-heart-eyes smiling-face-with-sunglasses snail
    snowflake snowman soccer-ball spider star strawberry sun sun-with-face sunflower
    tangerine taxi teddy-bear tennis thinking-face thumbs-up tiger-face tomato tractor trophy
    tropical-fish tulip turtle umbrella unicorn volcano watermelon whale winking-face wrapped-gift
    yellow-heart
"""
EVERYDAY = frozenset(_EVERYDAY.split())
_SIMPLE = """
    angry-face baby-chick beaming-face-with-smiling-eyes black-circle black-heart blossom
    blue-square blueberries bomb bone broken-heart brown-circle brown-heart brown-square bullseye
    bus candy check-mark coconut cold-face cowboy-hat-face croissant cross-mark crystal-ball door
    droplet egg envelope face-with-open-mouth face-with-tongue fallen-leaf flushed-face
    frowning-face gem-stone globe-with-meridians glowing-star green-circle green-square
    grimacing-face grinning-cat hamster horse-face hot-face kiwi-fruit light-blue-heart mango
    melon monkey-face mount-fuji mountain nerd-face neutral-face new-moon no-entry onion open-book
    orange-book orange-circle orange-square palm-tree peace-symbol pig-nose pink-heart polar-bear
    police-car pool-8-ball potato purple-circle purple-square raccoon red-square ringed-planet
    seedling sleeping-face smiling-face-with-halo smiling-face-with-horns star-struck stop-sign
    sunglasses t-shirt television two-hearts upside-down-face volleyball white-heart wolf
    yellow-circle yellow-square
"""
SIMPLE = frozenset(_SIMPLE.split())
COUNTRY = re.compile(r"^(?:flag-for-flag-|flag-for-|flag-(?!in-hole))")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A nameable thing: what captions call it and what kind of thing it is."""

    words: str
    category: str  # Unicode's group; "Flags" for country flags
    everyday: bool = False  # shown more often in training
    simple: bool = False  # easily named; with the everyday ones, all that a small world holds


def concept(key: str, category: str | None) -> Concept | None:
    """The concept behind an icon's key, or None where the model does not learn it.

    >>> concept("red-apple", "Food & Drink").words
    'red apple'
    >>> concept("man-cook", "People & Body") is None
    True
    """
    if COUNTRY.match(key):
        return Concept(words="flag of " + _words(COUNTRY.sub("", key)), category="Flags")
    if not _wanted(key, category):
        return None
    return Concept(
        words=_words(key), category=str(category), everyday=key in EVERYDAY, simple=key in SIMPLE
    )


def _wanted(key: str, category: str | None) -> bool:
    if category == "People & Body":
        return key in BODY
    if category == "Symbols":
        return bool(SYMBOLS.match(key))
    if category == "Flags":
        return True
    return category in OPEN_CATEGORIES and not DROPPED.search(key)


def _words(key: str) -> str:
    return key.replace("-", " ").strip()


def caption(style: str, words: str) -> str:
    """The text the model is trained on.

    >>> caption("twitter", "red apple")
    'twitter emoji, red apple'
    """
    return f"{style} emoji, {words}"


def parse_caption(text: str) -> tuple[str, str]:
    """(style, concept words) of a caption; inverse of `caption`."""
    style, separator, words = text.partition(" emoji, ")
    if not separator:
        raise ValueError(f'expected "STYLE emoji, CONCEPT", got "{text}"')
    return style, words


def is_held_out(style: str, words: str, percent: int) -> bool:
    """Whether the pair is kept out of training; depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{style}|{words}".encode()).digest()
    return int.from_bytes(digest, "big") % 100 < percent
