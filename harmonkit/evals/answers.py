"""The runner of the answering benchmarks: answer what is missing, write the official files, score.

An answering benchmark is a module with

    TEMPLATES                               {name: what it is}; --template chooses one
    add_arguments(parser)                   its own flags: --data, --template, perhaps --images
    read(args)                              -> [Question, …]
    write(folder, questions, answers)       the official scorer's files; answers: {key: text}
    read_answers(file, questions, args)     -> {key: text, None = failed} of somebody else's file
    score(questions, answers)               -> Result, or None where only a server has the right answers

and perhaps files(args), the data's files, whose digests the manifest holds; otherwise it is that of --data.

OUT/answers.jsonl holds the answers in the questions' order; until all are there, each process writes to a
part of its own (answer_parts.py). The batches are the same for any number of processes and after a kill, and
so are the answers. They are stripped, as LLaVA's runners do it
(haotian-liu/LLaVA:llava/eval/model_vqa_loader.py).
"""
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from harmonkit import outputs
from harmonkit.chat_template import prompt_ids
from harmonkit.devices import barrier, connected, from_first_process, rank_and_world_size
from harmonkit.drawing import parse_size
from harmonkit.evals import answer_files, answer_parts, benchmark, manifest
from harmonkit.evals.answer_parts import Answer
from harmonkit.images import open_image
from harmonkit.pipeline import CONTEXT_LENGTH, PROMPT_BLOCK, answer_batch, token_grid


def run(name, module, args, out):
    """Answer, score and write a benchmark in the folder `out` -> Result, or None where nothing can be scored.

    Raises ValueError or OSError before anything is answered, if the flags, the data or the folder are wrong.
    """
    out = Path(out)
    questions = check(module, args, out)
    total = len(questions)
    questions = questions[:args.limit]
    size = parse_size(args.size)
    with connected():
        loaded = benchmark.load(args)
        grid = token_grid(loaded.model, size)
        settings = {"size": [side * loaded.model.config.vae.stride for side in grid],
                    "max_new_tokens": args.max_new_tokens, "dtype": loaded.about["dtype"],
                    "mode": loaded.about["mode"]}
        about = manifest.start(out, name, args, loaded, settings=settings, protocol=args.template,
                               data=benchmark.data_files(module, args))
        answer(loaded.model, questions, grid, args, out)
        barrier()
        return finish(module, questions, total, args, out, about) if rank_and_world_size()[0] == 0 else None


def check(module, args, out) -> list:
    """All Questions. Raises ValueError or OSError for flags, data or a folder that cannot be used."""
    benchmark.check_common(args)
    parse_size(args.size)
    outputs.check_folder(out)
    questions = module.read(args)
    check_images(questions[:args.limit], args)
    return questions


def check_images(questions, args):
    """Raise ValueError unless the pictures' folder is given and holds at least one of the pictures."""
    if getattr(args, "images", "") is None:
        raise ValueError("give --images, the folder of the benchmark's pictures")
    paths = [question.image for question in questions if isinstance(question.image, (str, Path))]
    if paths and not any(map(Path.exists, map(Path, paths))):
        raise ValueError(f"{paths[0]}: no such file, and none of the other pictures is there; does --images "
                         "name the right folder?")


# ---- answer ----------------------------------------------------------------------------------------------

def answer(model, questions, grid, args, out):
    """Write this process's share of the missing answers to a part file."""
    rank = rank_and_world_size()[0]
    num_image_tokens = grid[0] * grid[1] + model.config.mar.buffer_size
    lengths = [len(prompt_ids(model.tokenizer, question.text,
                              num_image_tokens=0 if question.image is None else num_image_tokens))
               for question in questions]
    mine, done = share(questions, batches(lengths, args.batch_size), args, out)
    if done and rank == 0:
        print(f"{len(done)} of {len(questions)} questions are answered already; --overwrite answers them "
              "anew", file=sys.stderr)
    if not mine:
        return
    sides = [side * model.config.vae.stride for side in grid]
    bar = tqdm(total=sum(map(len, mine)), desc="questions", disable=None if rank == 0 else True)
    with answer_parts.open_part(out, rank) as file, bar:
        for batch in mine:
            asked = [questions[i] for i in batch]
            found = answer_questions(model, asked, [lengths[i] for i in batch], size=sides,
                                     max_new_tokens=args.max_new_tokens)
            lines = [known.line(question.key) for question, known in zip(asked, found)
                     if question.key not in done]
            file.write("".join(lines).encode())
            file.flush()
            bar.update(len(batch))


def batches(lengths, batch_size) -> list:
    """Cut the questions, of these many tokens, into lists of indices that are answered at once.

    Questions of one padded length share a batch, in their order, so that a picture that several questions ask
    about is often encoded once. The longest come first: the time left is not underestimated, and too little
    memory shows early.
    """
    by_length = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(-(-length // PROMPT_BLOCK), []).append(i)
    return [group[start:start + batch_size] for _, group in sorted(by_length.items(), reverse=True)
            for start in range(0, len(group), batch_size)]


def share(questions, cut, args, out) -> tuple:
    """(batches of this process that hold a question without an answer, keys that have one)."""
    rank, world_size = rank_and_world_size()

    def look():
        if args.overwrite:
            answer_parts.remove(out)
        known = answer_parts.read(out, questions)
        done = {key for key, answer in known.items() if answer.text is not None}
        left = [number for number, batch in enumerate(cut)
                if not done.issuperset(questions[i].key for i in batch)]
        return left, done
    shared = from_first_process(look)
    if shared is None:                              # processes that cannot talk to each other
        if args.overwrite:
            raise ValueError("--overwrite needs one process, or processes that torchrun starts")
        left, done = look()
        mine = [number for number in left if number % world_size == rank]
    else:
        left, done = shared
        mine = left[rank::world_size]
    return [cut[number] for number in mine], done


def answer_questions(model, questions, lengths, *, size, max_new_tokens) -> list:
    """An Answer for each question of a batch; lengths: of their prompts, in tokens. A question fails if its
    picture cannot be read or its prompt leaves no room for an answer.

    Raises ValueError for too little memory.
    """
    pictures, faults = {}, {}
    for question, length in zip(questions, lengths):
        if length + max_new_tokens > CONTEXT_LENGTH:
            faults[question.key] = f"{length} tokens leave no room for an answer"
        elif question.image is not None and question.image not in pictures:
            try:
                pictures[question.image] = open_image(question.image)
            except (ValueError, OSError) as error:
                faults[question.key] = " ".join(str(error).split())
    asked = [question for question in questions if question.key not in faults]
    try:
        texts = answer_batch(model, [question.text for question in asked],
                             [pictures.get(question.image) for question in asked],
                             size=size, max_new_tokens=max_new_tokens)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise ValueError(f"not enough memory for {len(asked)} questions at once; lower --batch-size or "
                         "--size") from None
    answers = {question.key: Answer(text.strip()) for question, text in zip(asked, texts)}
    return [answers.get(question.key) or Answer(None, faults[question.key]) for question in questions]


# ---- finish ----------------------------------------------------------------------------------------------

def finish(module, questions, total, args, out, about):
    """Merge the parts, write the official files and the scores -> Result or None."""
    found = answer_parts.read(out, questions)
    missing = sum(question.key not in found for question in questions)
    numbers = {"questions": len(questions), "of": total}
    if missing:                     # processes that cannot talk to each other do not wait for each other
        numbers |= {"answered": len(questions) - missing, "missing": missing}
        manifest.finish(out, about, numbers, status="answering")
        print(f"{out}: {missing} of {len(questions)} questions are not answered yet; the same command "
              "answers and scores them", file=sys.stderr)
        return None
    answer_parts.merge(out, questions, found)
    answers = {question.key: found[question.key].text for question in questions}
    numbers |= answer_files.count(questions, answers)
    if numbers["failed"]:
        why = next(known.why for known in found.values() if known.text is None)
        print(f"{out}: {numbers['failed']} questions failed ({why}); the official scorer's files are not "
              "written, because they need an answer to every question", file=sys.stderr)
    else:
        module.write(out, questions, answers)
    if not numbers["answered"]:
        manifest.finish(out, about, numbers, status="failed")
        raise ValueError(f"{out}: all {numbers['failed']} questions failed; there is nothing to score")
    result = module.score(questions, answers)
    if result is not None:
        asked = f"questions are put by the template {args.template}: {module.TEMPLATES[args.template]}"
        result = replace(result, notes=(asked, *result.notes))
    return manifest.finish(out, about, numbers, result)
