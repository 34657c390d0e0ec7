"""The paper's ablations in small, on the shapes world: joint training, stages, reconstruction alignment.

    python train.py tiny                                  # first: the runs that the arms start from
    python -m harmonkit.scripts.ablate tasks              # joint against single-task training (Figure 6)
    python -m harmonkit.scripts.ablate stages             # without each of the three stages (Table 6)
    python -m harmonkit.scripts.ablate reca --steps 400   # alignment against as much plain fine-tuning
    python -m harmonkit.scripts.ablate tasks --table      # run nothing, only rewrite table and plot

All arms start from the same weights and take the same number of steps, unless named half. A seed has its own
scenes, order and draws. runs/ablate keeps finished arms and their scores. The results are written to
docs/ablate-<experiment>.json, .md and .png.
"""
import json
from dataclasses import replace
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from statistics import mean

import train
from harmonkit.checkpoints import write_text
from harmonkit.config import read_json
from harmonkit.evals.world_scores import generation_scores, masked_losses, question_scores
from harmonkit.scripts import argument_parser
from harmonkit.terminal import errors_in_one_line
from harmonkit.tokenizer import load_tokenizer
from harmonkit.training.checkpoint_files import last_checkpoint, model_from_checkpoint
from harmonkit.training.recipes import ALL_TINY, RECIPES

DRAW = {"ratio": {"text2image": 1}}
ASK = {"ratio": {"image2text": 1}}
BOTH = {"ratio": {"text2image": 1, "image2text": 1}}
GENTLE = {"lr": {part: rate / 5 for part, rate in ALL_TINY.items()}}
RECA = GENTLE | {"ratio": {"reca": 1, "image2text": 1}}
STAGE_3 = GENTLE | {"ratio": {"text2image": 16, "image2text": 3, "text": 1}}

# experiment -> the run that its arms start from, {arm: stages of (recipe, fraction of the steps, changes)}
EXPERIMENTS = {
    "tasks": ("tiny-mar", {
        "joint": [("tiny-joint", 1, BOTH)],
        "generation alone": [("tiny-joint", 1, DRAW)],
        "generation alone, half the steps": [("tiny-joint", 0.5, DRAW)],    # as many images as the joint arm
        "understanding alone": [("tiny-joint", 1, ASK)],
        "understanding alone, half the steps": [("tiny-joint", 0.5, ASK)],
    }),
    "stages": ("tiny-mar", {
        "I, II, III": [("tiny-align", 0.2, {}), ("tiny-joint", 0.6, {}), ("tiny-joint", 0.2, STAGE_3)],
        "without I": [("tiny-joint", 0.8, {}), ("tiny-joint", 0.2, STAGE_3)],
        "without II": [("tiny-align", 0.8, {}), ("tiny-joint", 0.2, STAGE_3)],
        "without III": [("tiny-align", 0.2, {}), ("tiny-joint", 0.8, {})],
    }),
    "reca": ("tiny-joint", {
        "before": [],
        "plain": [("tiny-joint", 1, GENTLE | BOTH)],
        "reca": [("tiny-joint", 1, RECA)],
    }),
}
LOSS = "drawing loss"
COLUMNS = (LOSS, "generation, seen", "generation, held-out", "questions, seen", "questions, held-out")
LEGEND = """Mean over seeds, and their range. Drawing loss: of the diffusion head on 100 fresh scenes, mean of
five masking ratios. Generation: mini-GenEval, K = 16, guidance 3. Questions: answered exactly."""


def run_arm(arm, seed, args) -> dict:
    """Train and evaluate an arm with a seed, unless that is done: its settings and {column: score}."""
    run, arms = EXPERIMENTS[args.experiment]
    slug = arm.replace(" ", "-").replace(",", "")
    folder = f"ablate/{args.experiment}/{slug}-{seed}-{args.steps}x{args.batch}"
    file = args.runs / folder / f"scores-{args.prompts}-{args.questions}.json"
    if file.exists():
        return read_json(file)
    for i, (name, fraction, changes) in enumerate(arms[arm]):
        recipe = replace(RECIPES[name], after=run, seed=seed, batch=args.batch, **changes)
        recipe = replace(recipe, steps=max(1, round(fraction * args.steps)),
                         micro_batch=gcd(args.batch, recipe.micro_batch))
        run = f"{folder}/{i}-{name}"
        train.train(run, recipe, train.arguments([name, "--runs", str(args.runs)]))
    found = last_checkpoint(args.runs / run)
    if found is None:
        raise FileNotFoundError(f"{args.runs / run}: no checkpoint; run `python train.py tiny` first")
    model = model_from_checkpoint(found[1]).eval()
    model.tokenizer = load_tokenizer(args.runs / run)
    row = {"arm": arm, "seed": seed, "steps": args.steps, "batch": args.batch, "prompts": args.prompts,
           "scenes asked about": args.questions} | scores_of(model, seed, args)
    print(row, flush=True)
    write_text(file, json.dumps(row))
    return row


def scores_of(model, seed, args) -> dict:
    """{column: score}"""
    losses = masked_losses(model, (1.0, 0.9, 0.6, 0.3, 0.1), 100)
    scores = {LOSS: mean(loss for _, loss, _ in losses)}
    answered, _ = question_scores(model, args.questions)
    for split, count in (("seen", args.prompts), ("held-out", args.prompts * 2 // 3)):
        drawn = generation_scores(model, split, count, 1000 * seed, 40, num_iter=16, cfg=3.0)
        scores[f"generation, {split}"] = mean(drawn.values())
        scores[f"questions, {split}"] = answered[split]
    return {column: round(scores[column], 4) for column in COLUMNS}


def table(arms) -> str:
    """Markdown: means over seeds, with ranges if there are several. arms: {arm: a row for each seed}."""
    lines = [f"| | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for arm, rows in arms.items():
        cells = [arm, ", ".join(str(row["seed"]) for row in rows)]
        for column in COLUMNS:
            values = [row[column] for row in rows]
            spread = f" ({min(values):.3f} – {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(arms, path):
    """The table as bars, with a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(COLUMNS), 0.5 * len(arms) + 1.2), layout="constrained")
    for axis, column in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS, strict=True):
        for arm, rows in arms.items():
            values = [row[column] for row in rows]
            axis.barh(arm, mean(values), color="#9ec5e8")
            axis.plot(values, [arm] * len(values), "k.", markersize=5)
        axis.set(title=column, xlim=(0, None if column == LOSS else 1))
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def main(argv=None):
    parser = argument_parser(__doc__)
    flag = parser.add_argument
    flag("experiment", choices=EXPERIMENTS)
    flag("--steps", type=int, default=2000, help="of an arm in all")
    flag("--batch", type=int, default=48)
    flag("--seeds", type=int, nargs="+", default=[0, 1])
    flag("--prompts", type=int, default=30, help="a category; two thirds of it held-out")
    flag("--questions", type=int, default=100, help="scenes that are asked about")
    flag("--runs", type=Path, default=Path("runs"))
    flag("--docs", type=Path, default=Path("docs"))
    flag("--table", action="store_true", help="only rewrite table and plot of the JSON in --docs")
    args = parser.parse_args(argv)
    path = args.docs / f"ablate-{args.experiment}.json"
    with errors_in_one_line("ablate"):
        if not find_spec("matplotlib"):
            raise ValueError("the plot at the end needs matplotlib: pip install matplotlib")
        if not args.table:
            arms = EXPERIMENTS[args.experiment][1]
            rows = [run_arm(arm, seed, args) for seed in args.seeds for arm in arms]
            write_text(path, json.dumps(rows, indent=1) + "\n")
        arms = {}
        for row in read_json(path):
            arms.setdefault(row["arm"], []).append(row)
        seeds = " ".join(str(row["seed"]) for row in arms[row["arm"]])
        command = (f"{args.experiment} --steps {row['steps']} --batch {row['batch']} --seeds {seeds} "
                   f"--prompts {row['prompts']} --questions {row['scenes asked about']}")
        heading = f"# `python -m harmonkit.scripts.ablate {command}`"
        figure = f"![A dot for each seed]({path.stem}.png)"
        write_text(path.with_suffix(".md"), f"{heading}\n\n{table(arms)}\n\n{LEGEND}\n\n{figure}\n")
        plot(arms, path.with_suffix(".png"))
        print(table(arms))


if __name__ == "__main__":
    main()
