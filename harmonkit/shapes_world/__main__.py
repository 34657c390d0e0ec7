"""Draw a contact sheet of training scenes with their captions to out/shapes.png."""
import random
from pathlib import Path

from harmonkit.shapes_world.world import caption, contact_sheet, render, training_scene

scenes = [training_scene("sheet", i) for i in range(32)]
pictures = [(render(scene), caption(scene, random.Random(i)), True) for i, scene in enumerate(scenes)]
Path("out").mkdir(exist_ok=True)
contact_sheet(pictures, scale=3).save("out/shapes.png")
print("out/shapes.png")
