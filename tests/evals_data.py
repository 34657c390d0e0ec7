"""Small data files of the answering benchmarks, in the layouts in which they are distributed."""
import base64
import csv
import io
import json
from argparse import ArgumentParser
from pathlib import Path

import pytest

from harmonkit.evals.rules.mme import SUBTASKS
from harmonkit.images import save_png
from harmonkit.shapes_world import world

PARTS = ("random", "popular", "adversarial")


def picture(number):
    """A PIL image; pictures of different numbers differ."""
    return world.render(world.scene("evals_data", number))


def image_bytes(number, format="JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, format=format)
    return buffer.getvalue()


def write_image(path, number):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        save_png(path, picture(number))
    else:
        path.write_bytes(image_bytes(number))


def write_lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pope(folder, num_images=3) -> Path:
    """POPE's three parts of 2 questions an image, and coco/val2014. Returns the folder of the parts."""
    data, images = folder / "POPE", folder / "val2014"
    data.mkdir()
    for part in PARTS:
        rows = []
        for image in range(num_images):
            name = f"COCO_val2014_{image + 7:012}.jpg"
            write_image(images / name, image)
            for thing, label in (("circle", "yes"), ("snowboard", "no")):
                article = f"{part} {thing}" if part != "random" else thing
                rows.append({"question_id": len(rows) + 1, "image": name,
                             "text": f"Is there a {article} in the image?", "label": label})
        write_lines(data / f"coco_pope_{part}.json", rows)
    return data


def mme(folder, pairs=1) -> Path:
    """MME as SUBTASK.txt beside the subtasks' folders of pictures, half of them in images/."""
    data = folder / "MME"
    data.mkdir()
    for number, name in enumerate(SUBTASKS):
        lines = []
        for pair in range(pairs):
            file = f"{pair:06}.jpg"
            place = data / name / "images" if number % 2 else data / name
            write_image(place / file, number + pair)
            lines += [f"{file}\tIs there a circle {pair}? Please answer yes or no.\tYes\n",
                      f"{file}\tIs there a snowboard {pair}? Please answer yes or no.\tNo\n"]
        (data / f"{name}.txt").write_text("".join(lines))
    return data


def mme_release(folder) -> Path:
    """MME as the folder of pictures alone, each with its own text file."""
    data = folder / "MME_Benchmark_release_version"
    for number, name in enumerate(SUBTASKS):
        pictures, texts = data / name, data / name
        if number % 2:
            pictures, texts = data / name / "images", data / name / "questions_answers_YN"
        write_image(pictures / "0001.png", number)
        texts.mkdir(parents=True, exist_ok=True)
        (texts / "0001.txt").write_text("Is there a circle? Please answer yes or no.\tYes\n"
                                        "Is there a dog? Please answer yes or no.\tNo")
    return data


MMBENCH_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
                   "l2-category", "comment", "split")


def mmbench_rows() -> list:
    """Two questions: one of four options, with a hint and a line break, in four rotations; one of two options
    in two.
    """
    rows = []
    for index, options, hint, category, level in (
            (7, ["circle", "square", "star", "cross"], "Look\nclosely", "object_localization",
             "finegrained_perception (instance-level)"),
            (12, ["yes", "no"], "", "image_scene", "coarse_perception")):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            cells = dict.fromkeys(MMBENCH_COLUMNS, "")
            cells |= {"index": str(index + turn * 1_000_000), "question": f"What is \"it\"? ({index})",
                      "hint": hint, **dict(zip("ABCD", turned)), "answer": "ABCD"[turned.index(options[0])],
                      "category": category, "l2-category": level, "source": "ours", "split": "dev",
                      "image": base64.b64encode(image_bytes(index)).decode() if turn == 0 else str(index)}
            rows.append(cells)
    return rows


def write_table(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mmbench(folder, rows=None) -> Path:
    """MMBENCH_COLUMNS as a TSV."""
    path = folder / "MMBench_DEV_EN.tsv"
    write_table(path, rows or mmbench_rows())
    return path


def seed(folder) -> Path:
    """SEED-Bench.json with four questions about images and one about a video, and the folder of images."""
    questions = []
    asked = [(1, "101_1"), (5, "102_2"), (5, "102_2"), (9, "103_3"), (10, "v.mp4")]
    for number, (kind, name) in enumerate(asked):
        media = "video" if kind > 9 else "image"
        questions.append({
            "answer": "ABCD"[number % 4], "choice_a": "One", "choice_b": "Two", "choice_c": "Three",
            "choice_d": "Four", "data_id": name, "data_type": media, "question_id": str(900 + number),
            "question": f"How many circles, {number}?", "question_type_id": kind})
        if media == "image":
            write_image(folder / "SEED-Bench-image" / name, kind)
    names = {"Scene Understanding": 1, "Counting": 5, "Text Understanding": 9, "Action Recognition": 10}
    path = folder / "SEED-Bench.json"
    path.write_text(json.dumps({"questions": questions, "question_type": names}))
    return path


def gqa(folder) -> Path:
    """testdev_balanced_questions.json with three balanced questions and one that is not."""
    rows = {}
    asked = [("verify", "yes", True), ("query", "red", True), ("choose", "left", True),
             ("query", "dog", False)]
    for number, (structural, answer, balanced) in enumerate(asked):
        write_image(folder / "images" / f"n{number}.jpg", number)
        rows[str(20_000 + number)] = {
            "imageId": f"n{number}", "question": f"What is it, number {number}?", "answer": answer,
            "isBalanced": balanced, "groups": {"global": "color" if number == 1 else None, "local": "l"},
            "types": {"structural": structural, "semantic": "attr", "detailed": "d"},
            "semantic": [{"operation": "select", "dependencies": [], "argument": "circle"},
                         {"operation": "query", "dependencies": [0], "argument": "color"}],
            "entailed": [], "equivalent": [], "semanticStr": "", "annotations": {}, "fullAnswer": "It is."}
    path = folder / "testdev_balanced_questions.json"
    path.write_text(json.dumps(rows))
    return path


def mmmu_rows() -> list:
    """A choice question, one with two pictures and list options in quotes, and two open ones."""
    def row(subject, number, question, options, answer, kind, pictures=1):
        images = dict.fromkeys([f"image_{n}" for n in range(1, 8)])
        for n in range(1, pictures + 1):
            images[f"image_{n}"] = {"bytes": image_bytes(n, "PNG"), "path": f"{n}.png"}
        return {"id": f"validation_{subject}_{number}", "question": question, "options": str(options),
                "explanation": "", **images, "img_type": "['Diagrams']", "answer": answer,
                "topic_difficulty": "Easy", "question_type": kind, "subfield": "x"}
    return [
        row("Accounting", 1, "Which shape is in <image 1>?", ["a circle", "it's a star", "a cross"], "B",
            "multiple-choice"),
        row("Math", 1, "Which one? <image 1>", ["<image 1>", "<image 2>"], "A", "multiple-choice", 2),
        row("Math", 2, "How many circles does <image 1> show?", [], "['24/7', '3.429']", "open"),
        row("Physics", 3, "What is its color in <image 1>?", [], "red", "open")]


def mmmu(folder) -> Path:
    """A folder for each subject, as on Hugging Face, and another split. Needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    data = folder / "MMMU"
    rows = mmmu_rows()
    for subject in ("Accounting", "Math", "Physics"):
        (data / subject).mkdir(parents=True)
        of_subject = [row for row in rows if row["id"].split("_")[1] == subject]
        file = data / subject / "validation-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of_subject), file)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of_subject), data / subject / "dev-0.parquet")
    return data


# ---- what tests of the benchmarks share ------------------------------------------------------------------

def arguments(module, data, *flags):
    """The module's own arguments."""
    parser = ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(["--data", str(data), *map(str, flags)])


def refused(module, args) -> str:
    """The message of `read`, which must refuse the data in one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        module.read(args)
    assert "\n" not in str(error.value)
    return str(error.value)
