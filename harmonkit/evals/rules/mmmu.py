"""MMMU's rules: multiple-choice and open answers of the validation set.

Sources: MMMU-Benchmark/MMMU:mmmu/utils/eval_utils.py, mmmu/main_eval_only.py; VLMEvalKit's reading:
rules/mmbench.py.
"""
import random
import re
from string import ascii_uppercase

from harmonkit.evals.rules import mmbench
from harmonkit.evals.rules.yes_no import require_text

SEED = 42
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine",
                            "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering"),
}
SUBJECTS = [subject for subjects in DISCIPLINES.values() for subject in subjects]

END_MARKS = (",", ".", "!", "?", ";", ":", "'")
KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
GROUPS_OF_THREE = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
WITH_EXPONENT = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
PLAIN_NUMBER = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def read_choice(response, options):
    """A response and the option texts, of A, B, … -> the letter read, None where the official one draws.

    Marks come off both ends, one kind after the other. Letters in brackets count, else letters between
    spaces, else, in more than five words, the options' texts in any case; of several the one whose last
    place is last. So "B: a dog", "**B**", "b" and an option's text alone are not read.
    """
    text = require_text(response)
    for mark in END_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    letters = ascii_uppercase[:len(options)]
    places = last_places({letter: f"({letter})" for letter in letters}, text)
    if not places:
        places = last_places({letter: f" {letter} " for letter in letters}, text)
    if not places and len(text.split()) > 5:
        texts = {letter: str(option).lower() for letter, option in zip(letters, options)}
        places = last_places(texts, text.lower())
    return max(places, key=places.get) if places else None


def last_places(wanted, text):
    """{letter: string} -> {letter: last place of its string in `text`}, of those that are there."""
    return {letter: text.rfind(string) for letter, string in wanted.items() if string in text}


def draw(options, generator):
    """The letter that the official tool draws for an unread response; `generator`: random.Random(SEED)."""
    return generator.choice(ascii_uppercase[:len(options)])


def read_open(response):
    """A response -> (numbers to two places, texts in lower case): two sets of what it may mean."""
    return split_kinds(normalized(key_phrases(require_text(response))))


def right_open(response, answer):
    """True if a number read is one of the answer's numbers, or a text read contains one of its texts.

    `answer` is a text or a list of texts.
    """
    numbers, texts = read_open(response)
    answers = answer if isinstance(answer, list) else [answer]
    answer_numbers, answer_texts = split_kinds([value for text in answers for value in normalize(text)])
    if numbers & answer_numbers:
        return True
    return any(wanted in text for text in texts for wanted in answer_texts)


def key_phrases(response):
    """The parts of a response that may be its answer: what follows the key words, else the whole."""
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    phrases = []
    for number, line in enumerate(lines, 1):
        key_words = KEY_WORDS + ("=",) if number == len(lines) else KEY_WORDS
        phrase = shortest_rest(line, key_words)
        if phrase and phrase not in END_MARKS:
            phrases.append(phrase)
    return phrases or [response]


def shortest_rest(line, key_words):
    """The shortest text after the last place of a key word; an empty one gives way to the next key word's."""
    shortest = ""
    for word in key_words:
        if word in line:
            rest = line.split(word)[-1].strip()
            if not shortest or len(rest) < len(shortest):
                shortest = rest
    return shortest


def normalized(phrases):
    """Phrases, and the numbers in them, as normalize gives them."""
    numbers = [number for phrase in phrases for number in find_numbers(phrase)]
    return [value for text in phrases + numbers for value in normalize(text)]


def find_numbers(text):
    """The numbers in a text, as strings: groups of three with commas, with an exponent, plain."""
    return GROUPS_OF_THREE.findall(text) + WITH_EXPONENT.findall(text) + PLAIN_NUMBER.findall(text)


def normalize(text):
    """A text -> [number to two places], or [text in lower case]; a single character c -> [" c", "c "]."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    # The space keeps a lone letter from matching inside words.
    return [" " + text, text + " "] if len(text) == 1 else [text]


def split_kinds(values):
    numbers = {value for value in values if isinstance(value, float)}
    return numbers, {value for value in values if isinstance(value, str)}


def right_vlmevalkit(response, options, answer, march_2025=False):
    """VLMEvalKit's reading, as for MMBench. `options` None is an open question: its options are the answer
    and "Other Answers" (for a list of answers: not verified)."""
    if options is None:
        choices, letter = {"A": answer, "B": "Other Answers"}, "A"
    else:
        choices, letter = dict(zip(ascii_uppercase, options)), answer
    return mmbench.read(response, choices, march_2025) == letter


def subject_of(question_id):
    """validation_<Subject>_<n> -> Subject; ValueError for another form or an unknown subject."""
    subject = "_".join(str(question_id).split("_")[1:-1])
    if subject not in SUBJECTS:
        raise ValueError(f"MMMU: {question_id!r} is not an id of the form validation_<Subject>_<number>")
    return subject


def score(rows):
    """Rows (dicts of id, question_type, options, response, answer) -> verdicts and shares of right answers.

    {"judge": {id: "Correct" | "Wrong"}, "letters": {id: letter}, "drawn": [ids], "subjects", "domains",
    "overall", "main_eval_only"}; the last four hold {"num", "acc"}, with acc in 0..1, to three places in
    main_eval_only, which is what the official tool prints. Letters that could not be read are drawn in the
    rows' order. Raises ValueError for no row, an id that comes twice or has an unknown form.
    """
    if not rows:
        raise ValueError("MMMU: there is no question to score")
    generator = random.Random(SEED)
    judge, letters, drawn = {}, {}, []
    for row in rows:
        key = row["id"]
        if key in judge:
            raise ValueError(f"MMMU: question {key} comes twice")
        if row["question_type"] == "multiple-choice":
            letters[key] = read_choice(row["response"], row["options"])
            if letters[key] is None:
                letters[key] = draw(row["options"], generator)
                drawn.append(key)
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            correct = letters[key] in answers
        else:
            correct = right_open(row["response"], row["answer"])
        judge[key] = "Correct" if correct else "Wrong"
    return {"judge": judge, "letters": letters, "drawn": drawn, **shares(judge)}


def shares(judge):
    """{id: "Correct" | "Wrong"} -> subjects, domains, overall and main_eval_only, as in score."""
    verdicts = {}
    for key, verdict in judge.items():
        verdicts.setdefault(subject_of(key), []).append(verdict == "Correct")
    subjects = {name: {"num": len(right), "acc": sum(right) / len(right)} for name, right in verdicts.items()}
    domains, printed = {}, {}
    for discipline, names in DISCIPLINES.items():
        parts = {name: subjects[name] for name in names if name in subjects}
        if parts:
            domains[f"Overall-{discipline}"] = together(parts.values())
            printed |= {f"Overall-{discipline}": domains[f"Overall-{discipline}"], **parts}
    overall = together(subjects.values())
    printed["Overall"] = overall
    main_eval_only = {name: {**part, "acc": round(part["acc"], 3)} for name, part in printed.items()}
    return {"subjects": subjects, "domains": domains, "overall": overall, "main_eval_only": main_eval_only}


def together(parts):
    """The mean of the parts' accuracies, weighted by their numbers of questions."""
    parts = list(parts)
    num = sum(part["num"] for part in parts)
    return {"num": num, "acc": sum(part["acc"] * part["num"] for part in parts) / num}
