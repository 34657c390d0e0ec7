"""harmon-tiny draws six prompts -> out/demo.png, and answers questions about the first image -> stdout."""
import json

from PIL import Image, ImageDraw

from harmon import Harmon
from harmonkit.images import save_png
from harmonkit.outputs import fingerprint
from harmonkit.terminal import errors_in_one_line

PROMPTS = ("three blue stars", "a green cross", "a yellow circle and a purple square",
           "a red star to the left of a cyan triangle", "two purple circles",
           "a blue triangle above a red square")
QUESTIONS = ("What color are the stars?", "How many stars are there?", "Describe the image.")
GAP = 6                                                                     # pixels between images


def contact_sheet(images) -> Image.Image:
    """Four images of each prompt, two by two and twice their size, under the prompt; three prompts a row."""
    side = 2 * images[0].width
    width, height = 2 * (side + GAP) + 18, 2 * (side + GAP) + 30            # of a prompt's cell
    sheet = Image.new("RGB", (3 * width, 2 * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i // 4, 3)
        x, y = column * width + 9, row * height + 6
        ImageDraw.Draw(sheet).text((x, y), PROMPTS[i // 4], fill="black")
        down, right = divmod(i % 4, 2)
        place = (x + right * (side + GAP), y + 18 + down * (side + GAP))
        sheet.paste(image.resize((side, side), Image.BICUBIC), place)
    return sheet


def main():
    with errors_in_one_line("demo"):
        model = Harmon.from_pretrained()
        images = model.generate_image([p for p in PROMPTS for _ in range(4)], num_iter=16, progress=True)
        settings = json.dumps({"num_iter": 16, "model": "harmon-tiny", "weights": fingerprint(model)})
        sheet = contact_sheet(images)
        save_png("out/demo.png", sheet, prompts=json.dumps(PROMPTS), seed=0, settings=settings)
        print(f"out/demo.png: {len(images)} images of six prompts")
        for question in QUESTIONS:
            print(f"{question}  {''.join(model.chat(question, images[0]))}")


if __name__ == "__main__":
    main()
