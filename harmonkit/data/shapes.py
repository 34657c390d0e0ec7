"""The shapes world as a source."""
from functools import partial

from harmonkit.data.formats import Format
from harmonkit.data.records import Sample
from harmonkit.shapes_world import world


class Shapes(Format):
    """`count` training scenes of the shapes world."""
    kind = "shapes world"

    def __init__(self, seed="train-0", count=40_000):
        if not isinstance(count, int):
            raise ValueError(f"count is {count!r}; a whole number is expected")
        self.path = f"shapes {seed}"
        self.entries = range(count)
        self.seed = seed

    def parts(self):
        return [self.seed]

    def sample(self, name, i):
        scene = world.training_scene(self.seed, i)
        return Sample(name, partial(world.render, scene), partial(world.caption, scene),
                      partial(world.looking_turns, scene), world.label(scene),
                      origin=partial(tuple, (f"{self.seed}:{i + 1}", 0, 0)))


class ShapesText(Shapes):
    """The same scenes in words alone."""

    def sample(self, name, i):
        scene = world.training_scene(self.seed, i)
        return Sample(name, None, turns=partial(world.reading_turns, scene))
