"""How questions are put to a model, by name.

    janus      VLMEvalKit's prompts for Janus (open-compass/VLMEvalKit:vlmeval/vlm/janus.py). Harmon's authors
               most likely used these (not verified), so they are the default.
    llava      LLaVA's (haotian-liu/LLaVA:docs/Evaluation.md)
    official   the benchmark's own
    plain      the question as it stands in the data
"""

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
JANUS, LLAVA, OFFICIAL, PLAIN = "janus", "llava", "official", "plain"


def add_template(parser, names):
    """The flag --template; the first name is the default."""
    parser.add_argument("--template", choices=names, default=names[0],
                        help=f"how questions are put; default: {names[0]}")


def word(question) -> str:
    """A question that is answered with a word."""
    return f"{question}\n{WORD}"


def lettered(options, form="{letter}. {text}") -> str:
    """Lines of {letter: text}."""
    return "\n".join(form.format(letter=letter, text=text) for letter, text in options.items())


def janus_choice(question, options, hint="") -> str:
    """A question with options {letter: text} that is answered with a letter."""
    label = f"Hint: {hint}\n" if hint else ""
    return f"{label}{question}\n{lettered(options)}\n\n{LETTER}"


def llava_choice(question, options, hint="") -> str:
    label = f"{hint}\n" if hint else ""
    return f"{label}{question}\n{lettered(options)}\n{LETTER}"
