"""The paper's ablations in small, on the shapes world: what joint training does, what each stage does, what reconstruction alignment does.

    python train.py tiny                                  # first: the runs that the arms start from
    python ablate.py tasks --steps 2000 --seeds 0 1       # single-task against joint training (Figure 6)
    python ablate.py stages --steps 2000 --seeds 0 1      # without each of the three stages (Table 6)
    python ablate.py reca --steps 400 --seeds 0 1         # reconstruction alignment against as many steps of plain fine-tuning
    python ablate.py tasks --table                        # the table and the plot anew from docs/ablate-tasks.json

All arms of an experiment take the same number of steps of the same batch from the same weights on the same scenes, but for those named half; seeds change
the order and the draws.
Finished arms are kept in runs/ablate, with their scores, and not run again. At the end: docs/ablate-<experiment>.json, .md and .png (needs matplotlib).
"""
import argparse
import json
import sys
import time
from dataclasses import replace
from math import gcd
from pathlib import Path
from statistics import mean

from harmonkit.evals import shapes as evaluate
import train
from harmonkit import checkpoints
from harmonkit.training.recipes import ALL_TINY, RECIPES

GENTLE = {part: lr / 5 for part, lr in ALL_TINY.items()}
FINER = {"lr": GENTLE, "ratio": {"text2image": 16, "image2text": 3, "text": 1}}     # in the manner of stage III

# experiment -> (the run that every arm starts from, {arm: [(recipe, share of the steps, what is changed in it), …]})
EXPERIMENTS = {
    "tasks": ("tiny-mar", {
        "joint": [("tiny-joint", 1, {"ratio": {"text2image": 1, "image2text": 1}})],
        "generation alone": [("tiny-joint", 1, {"ratio": {"text2image": 1}})],
        "generation alone, half the steps": [("tiny-joint", 0.5, {"ratio": {"text2image": 1}})],         # as many pictures to draw as the joint arm has
        "understanding alone": [("tiny-joint", 1, {"ratio": {"image2text": 1}})],
        "understanding alone, half the steps": [("tiny-joint", 0.5, {"ratio": {"image2text": 1}})],
    }),
    "stages": ("tiny-mar", {
        "I, II, III": [("tiny-align", 0.2, {}), ("tiny-joint", 0.6, {}), ("tiny-joint", 0.2, FINER)],
        "without I": [("tiny-joint", 0.8, {}), ("tiny-joint", 0.2, FINER)],
        "without II": [("tiny-align", 0.8, {}), ("tiny-joint", 0.2, FINER)],
        "without III": [("tiny-align", 0.2, {}), ("tiny-joint", 0.8, {})],
    }),
    "reca": ("tiny-joint", {
        "before": [],
        "plain": [("tiny-joint", 1, {"lr": GENTLE, "ratio": {"text2image": 1, "image2text": 1}})],
        "reca": [("tiny-joint", 1, {"lr": GENTLE, "ratio": {"reca": 1, "image2text": 1}})],
    }),
}
LOSS = "drawing loss"          # of the head, on fresh scenes with their captions, mean over the shares of hidden tokens in HIDDEN: moves long before a picture is right
HIDDEN = (1.0, 0.9, 0.6, 0.3, 0.1)
LEGEND = """Mean over seeds, and their range; with few seeds and prompts a difference of some hundredths says nothing. Drawing loss: of the diffusion head, on 100 fresh scenes with
their captions. Generation: mini-GenEval, K = 16, guidance 3. Questions: answered exactly. Training: wall time of an arm."""
COLUMNS = (LOSS, "generation, seen", "generation, held-out", "questions, seen", "questions, held-out")


def run_arm(experiment, arm, seed, steps, batch, runs, prompts, questions):
    """Train one arm with one seed and evaluate it -> a dictionary of scores."""
    start, arms = EXPERIMENTS[experiment]
    folder, before, began = runs / "ablate" / experiment / f"{arm.replace(' ', '-').replace(',', '')}-{seed}-{steps}x{batch}", runs / start, time.time()
    for i, (name, share, changes) in enumerate(arms[arm]):
        recipe = replace(RECIPES[name], seed=seed, steps=max(1, round(share * steps)), batch=batch, micro_batch=gcd(batch, RECIPES[name].micro_batch), after=str(before.resolve()), **changes)
        mixture = folder / f"mixture-{i}.json"
        with checkpoints.atomic_write(mixture) as temporary:
            Path(temporary).write_text(json.dumps([{"path": "shapes-text" if task == "text" else "shapes", "task": task, "seed": "train-0", "count": recipe.scenes}
                                                   | ({} if task == "text" else {"latents": str((runs / f"latents-0-{recipe.scenes}").resolve())}) for task in recipe.ratio]))
        args = train.arguments([name, "--runs", str(folder), "--mixture", str(mixture), "--tokenizer", str(runs / start)])
        before = train.train(f"{i}-{name}", recipe, args).parent
    found = train.last_checkpoint(before)
    if found is None:
        raise FileNotFoundError(f"{before}: no checkpoint; run `python train.py tiny` first")
    trained = time.time() - began
    model = train.model_of(found[1]).eval()
    model.tokenizer = train.load_tokenizer(runs / start)
    scores = {"arm": arm, "seed": seed, "steps": steps, "batch": batch, "training_seconds": round(trained)}
    scores[LOSS] = round(mean(loss for _, loss, _ in evaluate.masked_losses(model, HIDDEN, 100)), 4)
    for split, count in (("seen", prompts), ("held-out", prompts * 2 // 3)):
        shares, _ = evaluate.generation_scores(model, split, count, 1000 * seed, 40, num_iter=16, cfg=3.0)
        scores[f"generation, {split}"] = round(mean(shares.values()), 4)
    answers, _ = evaluate.question_scores(model, questions)
    return scores | {f"questions, {split}": round(answers[split], 4) for split in ("seen", "held-out")} | {"prompts": prompts, "scenes asked about": questions}


def table(results):
    """Markdown: mean over seeds, and the range where there are several."""
    first = results[0]
    lines = [f"{first['steps']} steps of {first['batch']} samples an arm, {first['prompts']} prompts a category (two thirds as many held-out), {first['scenes asked about']} scenes asked about", "",
             "| | seeds | " + " | ".join(COLUMNS) + " | training |", "|---|---|" + "---|" * (len(COLUMNS) + 1)]
    for arm in dict.fromkeys(r["arm"] for r in results):
        rows = [r for r in results if r["arm"] == arm]
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in rows]
            cells.append(f"{mean(values):.3f}" + (f" ({min(values):.3f} – {max(values):.3f})" if len(values) > 1 else ""))
        lines.append(f"| {arm} | {', '.join(str(r['seed']) for r in rows)} | {' | '.join(cells)} | {mean(r['training_seconds'] for r in rows) / 60:.0f} min |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in results))
    figure, axes = plt.subplots(1, len(COLUMNS), figsize=(3.2 * len(COLUMNS), 0.5 * len(arms) + 1.2), sharey=True, layout="constrained")
    for axis, column in zip(axes, COLUMNS):
        for y, arm in enumerate(arms):
            values = [r[column] for r in results if r["arm"] == arm]
            axis.barh(y, mean(values), color="#9ec5e8")
            axis.plot(values, [y] * len(values), "k.", markersize=5)          # one dot a seed
        axis.set(title=f"{column} (lower is better)" if column == LOSS else column, xlim=(0, None if column == LOSS else 1))
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--steps", type=int, default=2000, help="of an arm in all")
    parser.add_argument("--batch", type=int, default=48, help="of every arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--prompts", type=int, default=30, help="a category; two thirds as many for each held-out category")
    parser.add_argument("--questions", type=int, default=100, help="scenes that are asked about")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).resolve().parent / "docs")
    parser.add_argument("--table", action="store_true", help="run nothing, only write table and plot of what --docs holds")
    args = parser.parse_args()
    published, kept = args.docs / f"ablate-{args.experiment}.json", args.runs / "ablate" / f"{args.experiment}.json"
    settings = {"steps": args.steps, "batch": args.batch, "prompts": args.prompts, "scenes asked about": args.questions}
    try:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("the plot at the end needs matplotlib: pip install matplotlib") from None
        file = published if args.table else kept
        results = json.loads(file.read_text()) if file.exists() else []
        if not args.table:
            alike = lambda r: all(r[k] == v for k, v in settings.items())  # noqa: E731
            for seed in args.seeds:
                for arm in EXPERIMENTS[args.experiment][1]:
                    if not any(alike(r) and (r["arm"], r["seed"]) == (arm, seed) for r in results):
                        results.append(run_arm(args.experiment, arm, seed, args.steps, args.batch, args.runs, args.prompts, args.questions))
                        print(json.dumps(results[-1]), flush=True)
                        with checkpoints.atomic_write(kept) as temporary:
                            Path(temporary).write_text(json.dumps(results, indent=1) + "\n")
            results = [r for r in results if alike(r) and r["seed"] in args.seeds]
            with checkpoints.atomic_write(published) as temporary:
                Path(temporary).write_text(json.dumps(results, indent=1) + "\n")
        if not results:
            raise ValueError(f"{file}: nothing has been run yet")
        seeds, first = " ".join(str(seed) for seed in dict.fromkeys(r["seed"] for r in results)), results[0]
        command = (f"python ablate.py {args.experiment} --steps {first['steps']} --batch {first['batch']} --seeds {seeds} --prompts {first['prompts']} "
                   f"--questions {first['scenes asked about']}")
        published.with_suffix(".md").write_text(f"# `{command}`\n\n{table(results)}\n{LEGEND}\n\n![The same as bars, one dot a seed]({published.stem}.png)\n")
        plot(results, published.with_suffix(".png"))
        print(table(results))
    except (ValueError, OSError) as error:
        print(f"ablate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
