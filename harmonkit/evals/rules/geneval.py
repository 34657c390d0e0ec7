"""GenEval: which detections count, whether a picture shows its prompt, and the scores of many pictures.

The rules of djghosh13/geneval:evaluation/evaluate_images.py and summary_scores.py @af4902f. A detection is
{"box": (x1, y1, x2, y2), "score": float, "color": str}, color only where it is asked for. The official tool
computes in float32; so does this file, by rounding the result of every operation.
"""
import math
import struct

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16                        # of one class
DEAD_ZONE = 0.1                         # of both boxes' widths or heights
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def float32(x) -> float:
    """The float32 nearest to x, as a Python float."""
    return struct.unpack("f", struct.pack("f", x))[0]


def kept(detections, tag) -> dict:
    """{class: indices of the detections that count, the most confident first}; no class without any.

    detections: {class: [detection, …]}. The score must exceed 0.3, for tag "counting" 0.9. At most 16 of
    a class count. Overlapping boxes are all kept. Of equal scores the later detection comes first.
    """
    least = float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    indices = {name: confident(found, least) for name, found in detections.items()}
    return {name: chosen for name, chosen in indices.items() if chosen}


def confident(found, least) -> list:
    """Indices of the at most 16 detections whose score exceeds `least`, the highest score first."""
    scores = [float32(detection["score"]) for detection in found]
    order = sorted(range(len(found)), key=lambda i: (scores[i], i), reverse=True)
    return [i for i in order if scores[i] > least][:MAX_OBJECTS]


def center_and_size(box) -> tuple:
    """((center x, center y), (width, height)) of a box (x1, y1, x2, y2), in float32."""
    x1, y1, x2, y2 = map(float32, box)
    center = (float32(float32(x1 + x2) / 2), float32(float32(y1 + y2) / 2))
    return center, (abs(float32(x2 - x1)), abs(float32(y2 - y1)))


def relations(a, b) -> list:
    """How box a lies to box b: none, one or two of "left of", "right of", "above", "below". y grows downward.

    The offset of the centers is reduced toward zero by a tenth of both sizes; each of its parts must then
    exceed half the length of the unreduced offset.
    """
    centers, sizes = zip(center_and_size(a), center_and_size(b))
    offset = [float32(p - q) for p, q in zip(*centers)]
    reduced = []
    for distance, size_a, size_b in zip(offset, *sizes):
        slack = float32(float32(DEAD_ZONE) * float32(size_a + size_b))
        reduced.append(math.copysign(max(float32(abs(distance) - slack), 0), distance))
    if all(abs(part) < float32(1e-3) for part in reduced):
        return []
    squares = float32(float32(offset[0] * offset[0]) + float32(offset[1] * offset[1]))
    x, y = (float32(part / float32(math.sqrt(squares))) for part in reduced)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return [name for name, is_true in holds.items() if is_true]


def named_color(detections, name, i) -> str:
    """The color of detection i of a class, as its field says it."""
    try:
        return detections[name][i]["color"]
    except KeyError:
        raise ValueError(f"detection {i} of {name!r} has no color, which the prompt asks for") from None


def verdict(metadata, detections, color_of=named_color) -> dict:
    """{"correct": whether a picture shows its prompt, "reason": one fault a line, "kept": see `kept`}.

    metadata: a line of the prompt file. color_of(detections, class, index) -> the color's name, called only
    where a color is asked for. Raises ValueError if a clause refers to a later one, where the official tool
    stops.
    """
    indices = kept(detections, metadata.get("tag"))
    matched, faults = [], []                            # matched: boxes of each clause, None if it fails
    for clause in metadata.get("include", []):
        found = indices.get(clause["class"], [])[:clause["count"]]
        fault = fault_of(clause, found, matched, detections, color_of)
        boxes = [detections[clause["class"]][i]["box"] for i in found]
        matched.append(boxes if fault is None else None)
        faults += [] if fault is None else [fault]
    for clause in metadata.get("exclude", []):
        number = len(indices.get(clause["class"], []))
        if number >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return {"correct": not faults, "reason": "\n".join(faults), "kept": indices}


def fault_of(clause, found, matched, detections, color_of):
    """Why a clause of `include` fails, or None. found: its indices; matched: the earlier clauses' boxes."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in clause:
        wanted = clause["color"]
        colors = [color_of(detections, name, i) for i in found]
        if colors.count(wanted) < count:
            others = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
            return f"expected {wanted} {name}>={count}, found {colors.count(wanted)} {wanted}; and {others}"
    if "position" in clause:
        relation, target = clause["position"]
        if not -len(matched) <= target < len(matched):
            raise ValueError(f"the position of {name!r} refers to clause {target}; only the {len(matched)} "
                             "before it can be referred to")
        if matched[target] is None:
            return f"no target for {name} to be {relation}"
        for i in found:
            for box in matched[target]:
                true = relations(detections[name][i]["box"], box)
                if relation not in true:
                    return f"expected {name} {relation} target, found {' and '.join(true)} target"
    return None


def aggregate(results) -> dict:
    """The summary of result lines {"tag", "metadata": str, "correct": bool, …}, in the official order.

    {"total_images", "total_prompts", "correct_images_percent", "correct_prompts_percent" (at least one right
    picture), "tasks": {tag: {"percent", "correct", "of"}}, "overall": mean of the tasks' shares}, all
    unrounded. Prompts are told apart by the text of their metadata: equal ones count as one.
    Raises ValueError without any line.
    """
    if not results:
        raise ValueError("GenEval: no results to score")
    prompts, tasks = {}, {}
    for line in results:
        prompts[line["metadata"]] = prompts.get(line["metadata"], False) or bool(line["correct"])
        tasks.setdefault(line["tag"], []).append(bool(line["correct"]))
    right = sum(map(sum, tasks.values()))
    return {"total_images": len(results), "total_prompts": len(prompts),
            "correct_images_percent": 100 * right / len(results),
            "correct_prompts_percent": 100 * sum(prompts.values()) / len(prompts),
            "tasks": {tag: {"percent": 100 * sum(verdicts) / len(verdicts), "correct": sum(verdicts),
                            "of": len(verdicts)} for tag, verdicts in tasks.items()},
            "overall": sum(sum(verdicts) / len(verdicts) for verdicts in tasks.values()) / len(tasks)}
