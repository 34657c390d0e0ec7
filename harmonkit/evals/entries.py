"""The twelve benchmarks as data: what each asks, where its data come from, what to expect, known traps.

Numbers are those of the paper (arXiv 2503.21979, Tables 2 to 4) as printed there, at 512 pixels, for drawing
with 64 steps and guidance 3; and what others got with the same weights. "Not verified" says that nobody could
check it.
"""
from dataclasses import dataclass, field

SMALL, LARGE = "Harmon-0.5B", "Harmon-1.5B"


@dataclass(frozen=True)
class Entry:
    name: str
    title: str
    asks: str                       # two lines: what is asked, and what is counted
    needs: str                      # files, and another model if one is needed
    source: str
    licence: str
    number: int                     # of prompts or questions
    number_is_known: bool = True    # False: as commonly stated, not verified
    per_prompt: int = 0             # pictures of a prompt; 0: the benchmark asks questions
    rotations: int = 1              # at most so many forms of a question
    flags: str = ""                 # of the command, besides the model's
    unit: float = 1                 # the paper's number / our score: 100 where ours is a share
    paper: dict = field(default_factory=dict)       # {our score's name: (0.5B, 1.5B)}, None = not given
    not_the_papers: tuple = ()      # names of our protocols beside which the paper's number must not stand
    others: tuple = ()              # (who, our score's name, 0.5B, 1.5B)
    traps: tuple = ()

    @property
    def draws(self) -> bool:
        return self.per_prompt > 0

    @property
    def conditions(self) -> dict:
        """{name: text} under which a score is the benchmark's and comparable with the paper's number."""
        conditions = {"part": "all"}
        if self.number_is_known and self.rotations == 1:        # rotations are counted one by one
            conditions |= {"number": str(self.number)}
        if self.paper:
            conditions |= {"size": "512×512"}
        if self.paper and self.draws:
            conditions |= {"num_iter": "64", "cfg": "3", "cfg_schedule": "constant", "temperature": "1"}
        return conditions


def pairs(names, small, large) -> dict:
    return dict(zip(names.split(), zip(small, large)))


ENTRIES = (
    Entry(
        "geneval", "GenEval",
        "Do pictures show the objects, numbers, colors and places that their prompts name?\n"
        "A detector and CLIP judge four pictures a prompt; overall is the mean over six tasks.",
        needs='the official scorer, or --scorer ours (pip install "harmon[evals]"); the prompts are bundled',
        source="djghosh13/geneval", licence="MIT", number=553, per_prompt=4, flags="--scorer ours",
        paper=pairs("overall single_object two_object counting colors position color_attr",
                    (.71, .99, .80, .57, .87, .55, .48), (.76, .99, .86, .66, .85, .74, .48)),
        others=(("RecA's authors, the prompts as they are", "overall", .676, .729),
                ("RecA's authors, after their training", "overall", .787, .857),
                ("harmon_1.5b-o, by Harmon's authors", "overall", None, .85)),
        traps=("`--scorer ours` is another training of the detector: agreement with the official scorer is "
               "not verified, and its scores are marked.",
               "The paper's position score may come from rewritten prompts (not verified), so an overall of "
               "0.73 is no sign of a fault.",
               "An mmcv built for another GPU finds next to nothing; this shows as \"nothing found\".")),
    Entry(
        "dpg", "DPG-Bench",
        "Do pictures show everything that a prompt of several sentences says?\n"
        "A judge answers yes-no questions about four pictures a prompt, which lie in one grid.",
        needs="dpg_bench.csv and a judge: mPLUG-large, or --judge-url; the prompts are bundled",
        source="TencentQQGYLab/ELLA, dpg_bench", licence="Apache 2.0", number=1065, per_prompt=4,
        flags="--questions dpg_bench.csv --judge-url URL --judge-model NAME",
        others=(("RecA's authors, changed scorer", "overall", 80.12, 80.93),
                ("RecA's authors, changed scorer, after their training", "overall", 84.67, 87.21)),
        traps=("The official tool leaves out the first prompt (partiprompts97); both means are printed.",
               "Numbers of different judges are not comparable; the judge stands beside the score.",
               "The changed scorer of RecA's authors takes four JPEG files a prompt instead of a grid.")),
    Entry(
        "wise", "WISE",
        "Do pictures show what a prompt implies by knowledge of culture, time, space and science?\n"
        "A judge gives consistency, realism and aesthetics; WiScore weights them 0.7, 0.2 and 0.1.",
        needs="three JSON files of prompts, and a judge: GPT-4o-2024-05-13, or --judge-url",
        source="PKU-YuanGroup/WISE", licence="none found, so nothing is bundled", number=1000, per_prompt=1,
        flags="--data WISE/data/ --judge-url URL --judge-model NAME",
        paper=pairs("overall cultural time space biology physics chemistry", (None,) * 7,
                    (.41, .38, .48, .52, .37, .44, .29)),
        not_the_papers=("verified", "original, a part", "verified, a part", "plain mean, as RecA and BAGEL"),
        traps=('The edition of 2026, "verified", has other categories and weights: it is another benchmark.',
               "RecA's and BAGEL's script takes the plain mean of the categories; it is printed beside.",
               "The requests to another judge are worded here, so its scores are not WISE's own.")),
    Entry(
        "mjhq", "MJHQ-30K",
        "How near are pictures of aesthetic prompts to Midjourney's, as two distributions?\n"
        "FID to 30,000 reference pictures; lower is better.",
        needs='meta_data.json, the reference pictures, and clean-fid (pip install "harmon[evals]")',
        source="playgroundai/MJHQ-30K on Hugging Face", licence="not verified", number=30000,
        number_is_known=False, per_prompt=1,
        flags="--data MJHQ/meta_data.json --reference MJHQ/mjhq30k_imgs/", paper={"FID": (6.08, 5.15)},
        traps=("FIDs of different resizing, or of JPEG files, are not comparable; the authors' library, "
               "resizing and format are not verified.",
               "FID falls with the number of pictures; below 10,000 it says little.")),
    Entry(
        "coco", "COCO-30K",
        "How near are pictures of captions to photos, as two distributions?\n"
        "FID to photos of COCO val2014; lower is better.",
        needs='30,000 captions, the photos or their statistics, and clean-fid (pip install "harmon[evals]")',
        source="cocodataset.org; captions as in boomb0om/text2image-benchmark", licence="not verified",
        number=30000, number_is_known=False, per_prompt=1,
        flags="--data captions.json --reference coco/val2014/",
        paper={"FID": (8.86, 8.39)},
        traps=("Which captions, library and resizing the authors used is not verified. Show-o, in the same "
               "table, used the captions and statistics of boomb0om/text2image-benchmark.",)),
    Entry(
        "shapes", "Shapes world",
        "Do pictures of harmon-tiny's world show their prompts, in GenEval's six categories?\n"
        "A judge without a network looks at the pictures; held-out prompts have unseen combinations.",
        needs="nothing", source="this repository", licence="MIT", number=520, per_prompt=1,
        traps=("Only harmon-tiny and models trained in its world can draw these prompts.",)),
    Entry(
        "pope", "POPE",
        "Is this object in the picture, yes or no?\n"
        "Accuracy, F1 and the share of yes, by part: random, popular, adversarial.",
        needs="the three coco_pope_PART.json, and COCO's val2014 pictures",
        source="RUCAIBox/POPE, output/coco", licence="MIT", number=9000,
        flags="--data POPE/ --images coco/val2014/", unit=100, paper={"accuracy": (86.5, 87.6)},
        traps=("Whether the paper gives accuracy or F1, and of which part, is not verified.",
               "An older random part has 2,910 questions; the number of questions is printed.",
               'The official rule takes all for yes but "No", "no" and "not": "", "NO" and "No!" are yes. '
               "Read the yes ratio beside the score.")),
    Entry(
        "mme", "MME",
        "Two yes-no questions about each picture, in fourteen subtasks.\n"
        "Accuracy plus share of pictures with both right: perception up to 2000, cognition up to 800.",
        needs="SUBTASK.txt of all fourteen and the pictures, from the authors",
        source="BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation", licence="none found",
        number=2374, flags="--data MME/", paper={"perception": (1148, 1155), "cognition": (260, 321)},
        traps=("Two lines in a row are one picture, by place; the official tool compares no names.",
               'The official rule reads four characters: "The answer is yes" is neither, "Snow" is no.')),
    Entry(
        "mmbench", "MMBench",
        "Which of two to four options answers a question about a picture?\n"
        "Circular: the answer must be right for every rotation of the options. Dev part.",
        needs="the TSV of the dev part, with pictures in base64", source="open-compass/MMBench",
        licence="Apache 2.0", number=1164, rotations=4, flags="--data MMBench_DEV_EN.tsv",
        unit=100, paper={"circular": (59.8, 65.5)},
        traps=("Whether the paper's number is circular is not verified; that of Janus-1.3B beside it is not.",
               "How a letter is read changed in August 2025 and June 2026; both versions are printed.",
               "MMBench V1.1 is another edition. The test part is scored on the authors' server alone.")),
    Entry(
        "seed", "SEED-Bench",
        "Which of four options answers a question about a picture? Image part.\n"
        "The model names the letter, as papers do it; the official tool ranks options by likelihood.",
        needs="SEED-Bench.json and the pictures", source="AILab-CVC/SEED-Bench",
        licence="code Apache 2.0, data not verified", number=14232, number_is_known=False,
        flags="--data SEED-Bench.json --images SEED-Bench-image/", paper={"accuracy": (62.5, 67.1)},
        traps=('By LLaVA\'s rule "B." is wrong, by lmms-eval\'s it is right: the rule stands beside the '
               "score.",)),
    Entry(
        "gqa", "GQA",
        "Questions about a picture that were made from a graph of its objects and relations.\n"
        "The answer must equal the gold answer. Part: testdev, balanced.",
        needs="testdev_balanced_questions.json and the pictures", source="cs.stanford.edu/people/dorarad/gqa",
        licence="not verified", number=12578, number_is_known=False,
        flags="--data testdev_balanced_questions.json --images GQA/images/", paper={"accuracy": (56.3, 58.9)},
        traps=('LLaVA removes final periods before it compares; VLMEvalKit does not, so "Yes." is wrong.',)),
    Entry(
        "mmmu", "MMMU",
        "College questions about pictures in thirty subjects, with options or open. Validation part.\n"
        "The official parser reads the answer and draws a letter where it finds none.",
        needs='the parquet files, and pyarrow (pip install "harmon[data]")',
        source="MMMU/MMMU on Hugging Face", licence="Apache 2.0", number=900, flags="--data MMMU/",
        unit=100, paper={"accuracy": (34.2, 38.9)},
        traps=("`B. a dog`, `**B**` and `b` are not read, and a letter is drawn: the number of draws "
               "stands beside the score.",
               "A question with several pictures gets the first alone, as in the official LLaVA runner; "
               "their number is printed. The layout of the parquet files is not verified.")),
)
CATALOG = {entry.name: entry for entry in ENTRIES}
