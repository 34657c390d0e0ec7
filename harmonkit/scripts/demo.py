"""The demo: harmon-tiny draws six prompts and answers questions about one of its pictures -> out/demo.png and stdout."""
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from harmon import Harmon
from sample import save_png

PROMPTS = ("three blue stars", "a green cross", "a yellow circle and a purple square", "a red star to the left of a cyan triangle",
           "two purple circles", "a blue triangle above a red square")
QUESTIONS = ("What color are the stars?", "How many stars are there?", "Describe the image.")


def main(per_prompt=4, scale=2, seed=0):
    model = Harmon.from_pretrained()
    images = model.generate_image([p for p in PROMPTS for _ in range(per_prompt)], num_iter=16, seed=seed, progress=True)
    side, gap = images[0].width * scale, 6
    cell = (per_prompt // 2 * (side + gap) + 18, 2 * (side + gap) + 30)
    sheet = Image.new("RGB", (3 * cell[0], 2 * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        p, s = divmod(i, per_prompt)
        x, y = p % 3 * cell[0] + 9, p // 3 * cell[1] + 6
        draw.text((x, y), PROMPTS[p], fill="black")
        sheet.paste(image.resize((side, side), Image.BICUBIC), (x + s % 2 * (side + gap), y + 18 + s // 2 * (side + gap)))
    path = Path("out/demo.png")
    save_png(path, sheet, prompts=" | ".join(PROMPTS), seed=seed)
    print(f"{path}: {len(images)} pictures of six prompts")
    for question in QUESTIONS:  # about the first picture
        print(f"{question}  {''.join(model.chat(question, images[0]))}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        sys.exit(2)
