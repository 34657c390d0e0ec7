"""Training: one loop and a table of recipes, on a laptop and on many GPUs.

    python train.py tiny                             # harmon-tiny from nothing, on a CPU: its stages in order
    python train.py stage3 --dry-run                 # print the rates, the batch and the memory it takes
    torchrun --nproc_per_node=8 train.py finetune --init wusize/Harmon-1_5B --mixture mixture.json
    torchrun --nproc_per_node=8 --nnodes=4 train.py stage1 --config harmon-1.5b --init-llm Qwen2.5-1.5B \\
        --init-mar mar_huge.pth --vae kl16.ckpt --mixture mixture.json

A run lives in runs/<recipe>. The same command resumes it from its last checkpoint, or, without its flags,
`train.py resume runs/<recipe>`. Data and random draws of a micro-batch are functions of (seed, number of the
micro-batch). So n steps, a kill and n more steps give the weights of 2n steps, on a CPU to the bit, and the
number of processes changes only the order of sums. Ctrl-C and SIGTERM save before they end the run;
torchrun's flag --shutdown-timeout 1800 gives them time.
"""
import contextlib
import random
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harmonkit import fast
from harmonkit.data.mixture import SampleCounts, loss_arguments
from harmonkit.devices import any_rank, barrier, choose_device, rank_and_world_size
from harmonkit.terminal import Parser
from harmonkit.training import processes, record, runs
from harmonkit.training.dry_run import dry_run
from harmonkit.training.losses import Losses, wrap_blocks
from harmonkit.training.monitor import Monitor, plot
from harmonkit.training.optim import PARTS, schedule
from harmonkit.training.recipes import CHAINS, RECIPES, accumulation, add_flags


def train(name, recipe, args, stop_at=None):
    """Run a recipe to its end, or to step stop_at -> the last checkpoint's path. args: of `arguments`."""
    device, rank, world_size = args.device, args.rank, args.world_size
    run = runs.Run(name, recipe, args)
    last_step = stop_at or recipe.steps
    if run.step >= last_step:
        return run.say_finished()
    model, optimizer, ema = run.start()

    # Micro-batch number (s · micro_steps + i) · world_size + rank is micro-step i of step s.
    micro_steps = accumulation(recipe, world_size)
    per_step = micro_steps * world_size
    numbers = range(run.step * per_step + rank, last_step * per_step, world_size)
    loader = torch.utils.data.DataLoader(
        run.dataset, batch_size=None, sampler=numbers, num_workers=args.workers,
        pin_memory=device.type == "cuda", worker_init_fn=processes.ignore_signals)
    batches = zip(numbers, loader, strict=True)
    counts = SampleCounts(run.dataset.sources)

    # Optimisations are put on from outside. DistributedDataParallel averages gradients over the processes.
    fast.patch_attention(device)
    fast.chunk_next_token_loss(model)
    wrap_blocks(model, recipe)
    losses = Losses(model, recipe)
    if world_size > 1:
        losses = DistributedDataParallel(
            losses, device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=True, gradient_as_bucket_view=True)

    monitor = Monitor(run.folder, name, recipe.ratio, run.step, last_step, rank, world_size)
    with processes.collect_signals() as stop_asked:
        for step in range(run.step, last_step):
            # Accumulate gradients over micro-batches. Processes exchange them in the last micro-step only.
            for i in range(micro_steps):
                with monitor.waiting():
                    number, batch = next(batches)
                counts.add(batch, monitor.say)
                inputs = loss_arguments(model, batch)
                torch.manual_seed(seed_of(recipe.seed, number))             # masks, t, noise, dropout
                exchange = world_size == 1 or i + 1 == micro_steps
                with contextlib.nullcontext() if exchange else losses.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                        loss = losses(batch["task"], inputs)
                    (loss / micro_steps).backward()
                monitor.micro_batch(batch["task"], inputs, loss)

            # Clip the gradient's norm.
            norm = torch.nn.utils.clip_grad_norm_(ema.trainable.values(), recipe.clip)

            # Step at the schedule's learning rates, and average. A gradient that is not finite is dropped.
            lr = schedule(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["peak"]
            finite = torch.isfinite(norm).item()
            if finite:
                optimizer.step()
                ema.update(step)
            optimizer.zero_grad(set_to_none=True)

            # Log. Raises ValueError after ten steps in a row without a finite gradient.
            monitor.step(step + 1, norm, lr, finite, counts.totals())

            # Save, also when any process got a signal to stop.
            stop = any_rank(bool(stop_asked), device)
            if rank == 0 and (stop or step + 1 == last_step or (step + 1) % recipe.save_every == 0):
                run.save(step + 1)
            if stop:
                monitor.say(f"stopped and saved at step {step + 1}; the same command goes on from here")
                sys.exit(130)

            # Sample.
            if rank == 0 and recipe.sample_every and (step + 1) % recipe.sample_every == 0:
                monitor.samples(step + 1, model, ema, recipe.size)

    monitor.close()
    barrier()
    return run.last_path()


def seed_of(seed, number):
    """The seed of all random draws in micro-batch `number` of a run with this seed."""
    return random.Random(f"{seed}/{number}").getrandbits(63)


def make_parser():
    parser = Parser("train.py", __doc__)
    flag = parser.add_argument
    flag("recipe", choices=[*CHAINS, *RECIPES], help="or: resume RUN, the folder of a run")
    flag("--mixture", type=Path, help="JSON or TOML file that lists the data; default: the shapes world")
    flag("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    flag("--init", help="start from this model (name, folder, .pth, hub id) or run, not the recipe before")
    flag("--init-llm", help="start from this Qwen2.5 folder or file")
    flag("--init-mar", help="start from this MAR checkpoint")
    flag("--vae", help="kl16.ckpt")
    flag("--tokenizer", help="tokenizer.json or its folder")
    flag("--config", help="sizes of --init-llm, --init-mar, --dry-run: harmon-0.5b, harmon-1.5b or a folder")
    flag("--only", choices=PARTS, help="train this part alone")
    flag("--device", help="default: cuda if there is one; under torchrun each process has its own")
    flag("--workers", type=int, help="data readers of each process (default: 8 on a GPU, else 0)")
    flag("--export", type=Path, help="at the end, write the EMA weights to this model folder, as float16")
    flag("--dry-run", action="store_true", help="print the rates, the batch and the memory it takes")
    flag("--plot", action="store_true", help="draw the losses so far to runs/<recipe>/loss.png")
    add_flags(parser)
    return parser


def arguments(argv=None):
    """The flags of a command. `resume RUN` stands for the recipe and all flags of that run."""
    argv = sys.argv[1:] if argv is None else argv
    resumed = argv[1:2] if argv[:1] == ["resume"] else None
    if resumed is None:
        args = make_parser().parse_args(argv)
    else:
        recorded = make_parser().parse_args(record.command_of(resumed))
        args = make_parser().parse_args([recorded.recipe, *argv[2:]], recorded)
    args.given = dict(vars(args))
    args.command = ["train.py", *argv]
    args.resume = resumed and Path(*resumed)
    args.rank, args.world_size = rank_and_world_size()
    args.device = choose_device(args.device)
    if args.workers is None:
        args.workers = 8 if args.device.type == "cuda" else 0
    return args


def main():
    with processes.orderly_end("train.py"):
        args = arguments()
        recipes = record.runs_of(args)
        if args.dry_run or args.plot:
            for name, recipe in recipes.items():
                dry_run(name, recipe, args) if args.dry_run else print(plot(args.runs / name))
            return
        if args.world_size > 1:
            is_gpu = args.device.type == "cuda"
            # An hour, since the others wait while rank 0 writes a large checkpoint.
            dist.init_process_group("nccl" if is_gpu else "gloo", timeout=timedelta(hours=1),
                                    device_id=args.device if is_gpu else None)
        for name, recipe in recipes.items():
            path = train(name, recipe, args)
            record.forget_start(args)                                       # the next starts from this one
        if args.export and args.rank == 0:
            runs.export(path.parent, args.export)
            print(args.export)


if __name__ == "__main__":
    main()
