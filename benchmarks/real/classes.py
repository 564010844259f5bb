"""The classes of the data sets that have more of them than are used."""

from __future__ import annotations

#: The classes of emoji: subcategories with enough of them, some of them joined.
EMOJI_CLASSES = (
    *(("animal-mammal",), ("animal-bird",), ("animal-marine",), ("animal-bug",), ("food-fruit",), ("food-vegetable",)),
    *(("food-prepared",), ("food-sweet", "food-asian"), ("drink",), ("transport-ground",)),
    *(("transport-air", "transport-water"), ("place-building",), ("clothing",), ("tool",), ("sport",), ("household",)),
    *(("plant-other", "plant-flower"), ("sky & weather",), ("face",), ("heart",), ("computer", "phone")),
    ("musical-instrument",),
)
SECTIONS = ("utils", "science", "net", "devel", "admin", "games", "x11", "sound", "text", "graphics", "web", "fonts")
#: Twenty-two others, with ten emoji or more each; not the flags, which would be a third of all samples.
OTHER_EMOJI_CLASSES = (
    *(("person-role",), ("person-activity",), ("person-sport",), ("person-fantasy",), ("person-gesture",)),
    *(("person", "person-resting"), ("family",), ("body-parts",), ("cat-face", "monkey-face"), ("emotion",)),
    *(("alphanum", "keycap"), ("geometric",), ("time",), ("av-symbol", "arrow"), ("transport-sign", "warning")),
    *(("religion", "zodiac"), ("game", "award-medal"), ("event",), ("office", "writing"), ("book-paper", "mail")),
    *(("light & video",), ("hand-fingers-open", "hand-fingers-partial", "hand-fingers-closed", "hand-single-finger")),
)
#: The twelve largest others.
MORE_SECTIONS = (
    *("perl", "python", "libdevel", "golang", "javascript", "rust", "ruby", "java", "gnu-r", "haskell", "libs", "doc"),
)
