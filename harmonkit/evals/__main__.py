"""Benchmarks: draw or answer, score, compare.

    python -m harmonkit.evals geneval --model wusize/Harmon-1_5B --size 512 --scorer ours   # draws, scores
    python -m harmonkit.evals pope gqa --pope-data POPE/ --gqa-data GQA/ …     # several in turn
    torchrun --nproc_per_node 8 -m harmonkit.evals geneval dpg …               # shares the work
    python -m harmonkit.evals score pope answers.jsonl --data POPE/            # what another model answered
    python -m harmonkit.evals table results/*                                  # all scores side by side
    python -m harmonkit.evals list                                             # what each benchmark needs
    python -m harmonkit.evals golden FILE …                                    # our rules on recorded cases
    python -m harmonkit.evals BENCHMARK --help                                 # its flags

Drawing:    geneval dpg wise mjhq coco
Answering:  pope mme mmbench seed gqa mmmu
Of the shapes world:  shapes classes reconstruction

A run that was killed goes on when the command is repeated. Several benchmarks of one command have a folder
each in --out. There a flag that means one of them alone is written with its name: --pope-data FOLDER.
"""
from harmonkit.interrupts import quits_at_once

with quits_at_once("harmonkit.evals"):
    import difflib
    import importlib
    import sys
    from collections import Counter

    from harmonkit.terminal import Parser, errors_in_one_line, file_path

COMMAND = "harmonkit.evals"
DRAWING = {"geneval": "geneval", "dpg": "dpg", "wise": "wise", "mjhq": "fid", "coco": "fid"}    # to modules
ANSWERING = {name: name for name in ("pope", "mme", "mmbench", "seed", "gqa", "mmmu")}
OF_THE_WORLD = {name: name for name in ("shapes", "classes", "reconstruction")}
BENCHMARKS = DRAWING | ANSWERING | OF_THE_WORLD


class PrefixParser(Parser):
    """A Parser. While `prefix` is set, a flag --data gets the second name --PREFIX-data."""
    prefix = None

    def add_argument(self, *flags, **options):
        if self.prefix:
            flags += tuple(f"--{self.prefix}-{flag[2:]}" for flag in flags if flag.startswith("--"))
        return super().add_argument(*flags, **options)


def module_of(name):
    """The module of a benchmark. A command imports those of its own benchmarks alone."""
    return importlib.import_module(f"harmonkit.evals.{BENCHMARKS[name]}")


def check_name(name, known):
    """Raise ValueError for a name that is not known, with the one that is nearest."""
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{name!r} is no benchmark; {hint}There are {', '.join(known)}")


# ---- run benchmarks --------------------------------------------------------------------------------------

def parser_of(name, has_others) -> Parser:
    """The parser of a benchmark's flags. has_others: they may also carry its name."""
    module = module_of(name)
    parser = PrefixParser(f"{COMMAND} {name}", module.__doc__)
    parser.allow_abbrev = not has_others
    parser.prefix = name if has_others else None
    module.add_arguments(parser)
    parser.prefix = None
    if name in OF_THE_WORLD:
        return parser
    from harmonkit.evals import benchmark

    benchmark.add_common_arguments(parser)
    if name in DRAWING:
        benchmark.add_drawing_arguments(parser)
    else:
        benchmark.add_answering_arguments(parser)
    return parser


def parse(names, flags) -> dict:
    """{benchmark: its arguments}. A flag is taken by all that know it; one that none knows is an error."""
    parsers = {name: parser_of(name, len(names) > 1) for name in names}
    if len(names) > 1 and {"-h", "--help"} & set(flags):
        print("\n".join(parser.format_help() for parser in parsers.values()))
        sys.exit(0)
    parsed, unknown = {}, None
    for name, parser in parsers.items():
        parsed[name], extra = parser.parse_known_args(flags)
        unknown = Counter(extra) if unknown is None else unknown & Counter(extra)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown.elements())}")
    return parsed


def run_benchmarks(names, flags):
    for name in names:
        check_name(name, BENCHMARKS)
    names = list(dict.fromkeys(names))
    world = [name for name in names if name in OF_THE_WORLD]
    if world and len(names) > 1 and any(flag.split("=")[0] == "--limit" for flag in flags):
        raise ValueError(f"--limit: {world[0]} has none; run it in a command of its own")
    parsed = parse(names, flags)
    from harmonkit.devices import connected

    if len(names) > 1:                  # a fault in the last one's data should not show after hours
        for name, args in parsed.items():
            if name not in OF_THE_WORLD:
                runner_of(name).check(module_of(name), args, folder_of(name, args, len(names)))
    loaded = None
    with connected():
        for name, args in parsed.items():
            args.loaded = loaded
            run_one(name, args, folder_of(name, args, len(names)))
            loaded = args.loaded


def runner_of(name):
    return importlib.import_module(f"harmonkit.evals.{'pictures' if name in DRAWING else 'answers'}")


def folder_of(name, args, count):
    """The folder of a benchmark's results, of `count` benchmarks in one command."""
    out = getattr(args, "out", None)
    if out is not None:
        return out / name if count > 1 else out
    if name in OF_THE_WORLD:
        return None
    from harmonkit.evals import benchmark

    return benchmark.default_folder(args, name)


def run_one(name, args, out):
    module = module_of(name)
    if name in OF_THE_WORLD:
        args.out = out
        module.run(args)
        return
    from harmonkit.evals import benchmark

    result = runner_of(name).run(name, module, args, out)
    if result is not None:
        benchmark.show(name, result)


# ---- other commands --------------------------------------------------------------------------------------

def score(argv):
    """score BENCHMARK FILE: the score of files that another model or an official scorer wrote."""
    known = [*DRAWING, *ANSWERING]
    if not argv or argv[0].startswith("-"):
        Parser(f"{COMMAND} score BENCHMARK FILE", score.__doc__).parse_args(argv)
        raise ValueError(f"score needs a benchmark, one of {', '.join(known)}, and a file")
    name, *flags = argv
    check_name(name, known)
    from harmonkit.evals import benchmark, manifest

    module = module_of(name)
    parser = Parser(f"{COMMAND} score {name}", module.__doc__)
    parser.add_argument("file", type=file_path, help="what the model answered, or what the scorer wrote")
    module.add_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts or questions alone")
    parser.add_argument("--out", type=file_path, help="a folder for scores.json and manifest.json")
    if name in DRAWING:
        parser.add_argument("--device", help="of a detector or of FID's network")
    parser.add_argument("--name", help="of the model in tables; default: the file's")
    args = parser.parse_args(flags)
    benchmark.check_common(args)
    if name in DRAWING:
        result = module.read_scores(args.file, args)
    else:
        questions = module.read(args)[:args.limit]
        result = module.score(questions, module.read_answers(args.file, questions, args))
    if args.limit is not None and result is not None:
        result = manifest.as_part(result, args.limit)
    if args.out is not None:
        manifest.write_scored(args.out, name, args, result, benchmark.data_files(module, args))
    benchmark.show(name, result)


def golden(argv):
    """golden FILE …: our rules on cases that the official code scored."""
    parser = Parser(f"{COMMAND} golden", golden.__doc__)
    parser.add_argument("files", nargs="+", type=file_path)
    sys.exit(importlib.import_module("harmonkit.evals.golden").main(parser.parse_args(argv).files))


def table(argv):
    """table FOLDER …: the scores in these folders side by side, beside the paper's."""
    module = importlib.import_module("harmonkit.evals.table")
    parser = Parser(f"{COMMAND} table", module.__doc__)
    parser.add_argument("folders", nargs="+", type=file_path)
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    module.main(args.folders, args)


def list_benchmarks(argv):
    """list: each benchmark, its data, and the time it takes."""
    Parser(f"{COMMAND} list", list_benchmarks.__doc__).parse_args(argv)
    print(importlib.import_module("harmonkit.evals.catalog").listing())


OTHERS = {"score": score, "golden": golden, "table": table, "list": list_benchmarks}


def main(argv=None):
    with errors_in_one_line(COMMAND):
        argv = list(sys.argv[1:] if argv is None else argv)
        if not argv or argv[0].startswith("-"):
            Parser(COMMAND, __doc__).parse_args(argv)
            raise ValueError(f"name a benchmark: {', '.join(BENCHMARKS)}; or {', '.join(OTHERS)}")
        if argv[0] in OTHERS:
            OTHERS[argv[0]](argv[1:])
            return
        first_flag = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
        check_name(argv[0], [*BENCHMARKS, *OTHERS])
        run_benchmarks(argv[:first_flag], argv[first_flag:])


if __name__ == "__main__":
    main()
