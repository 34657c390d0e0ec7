"""Plant mistakes one by one in a copy of the project and name the tests that catch each: `make mutants`.

    python tests/mutants.py              # all; exit status 1 if a mistake survives
    python tests/mutants.py ema clip     # those whose name contains one of the words

A mistake is a replacement in one file. The tests that should catch it run in the copy; at least one has to
fail. The same tests pass without the mistake, which `make test` shows.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "out", "runs", ".pytest_cache",
                                  "*.egg-info")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    right: str            # stands in the file exactly once
    wrong: str
    tests: str            # arguments of pytest


MUTANTS = (
    Mutant("VAE: downsampling pads left and top", "vae.py",
           "F.pad(x, (0, 1, 0, 1))", "F.pad(x, (1, 0, 1, 0))", "tests/test_golden.py"),
    Mutant("MAR: tanh GELU", "mar.py",
           "F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")', "tests/test_golden.py"),
    Mutant("MAR: position embeddings resized with aligned corners", "mar.py",
           "align_corners=False", "align_corners=True", "tests/test_golden.py tests/test_mar.py"),
    Mutant("MAR: the schedule rounds up", "mar.py",
           "math.floor(num_tokens", "math.ceil(num_tokens", "tests/test_golden.py tests/test_mar.py"),
    Mutant("MAR: linear guidance reaches w", "mar.py",
           "max(1, num_masked)) / num_tokens", "num_masked) / num_tokens",
           "tests/test_golden.py tests/test_mar.py"),
    Mutant("MAR by class: encoded once and repeated", "mar.py",
           "self.encode(seen, mask.repeat(halves, 1), grid, classes)",
           "self.encode(seen[:B], mask, grid, labels).repeat(halves, 1, 1)", "tests/test_mar_by_class.py"),
    Mutant("MAR by class: the second half has no class either", "mar.py",
           "torch.cat([labels, torch.full_like(labels, -1)])", "torch.cat([labels, labels])",
           "tests/test_mar_by_class.py"),
    Mutant("MAR by class: the mask before the step weighs", "mar.py",
           "weight = settings.guidance(num_masked, N)", "weight = settings.guidance(int(mask[0].sum()), N)",
           "tests/test_mar_by_class.py"),
    Mutant("MAR by class: a surplus step draws nothing", "mar.py",
           "            if new.any():\n                # Guidance",
           "            if True:\n                # Guidance", "tests/test_mar_by_class.py"),
    Mutant("MAR by class: dropout while drawing", "mar.py",
           "        self.eval()  ", "        pass  ", "tests/test_mar_by_class.py"),
    Mutant("LLM: rotation in the other direction", "llm.py",
           "torch.cat([-b, a], dim=-1)", "torch.cat([b, -a], dim=-1)", "tests/test_llm.py"),
    Mutant("LLM: padding counts in positions", "llm.py",
           "(attention_mask.cumsum(1) - 1)", "(torch.ones_like(attention_mask).cumsum(1) - 1)",
           "tests/test_llm.py"),
    Mutant("LLM: key heads tiled", "llm.py",
           "k = k.repeat_interleave(self.groups, dim=1)", "k = k.repeat(1, self.groups, 1, 1)",
           "tests/test_llm.py"),
    Mutant("Harmon: image features stay in the cache", "harmon.py",
           "        cache.truncate(L)\n", "", "tests/test_harmon.py tests/test_golden.py"),
    Mutant("Harmon: buffers stay behind the image", "harmon.py",
           "torch.cat([residual[:, -n:], residual[:, :-n]], dim=1)", "residual",
           "tests/test_harmon.py tests/test_golden.py"),
    Mutant("Harmon: the whole gradient into the image", "harmon.py",
           "self.grad_scale * (z_enc - z_enc.detach())", "(z_enc - z_enc.detach())", "tests/test_harmon.py"),
    Mutant("head: the bound trains ε too", "diffusion_head.py",
           "eps.detach()", "eps", "tests/test_diffusion_head.py"),
    Mutant("head: variance of the unconditional rows", "diffusion_head.py",
           "v = v[:M]", "v = v[M:]", "tests/test_diffusion_head.py tests/test_golden.py"),
    Mutant("head: noise at the last step", "diffusion_head.py",
           "if i > 0: ", "if True: ", "tests/test_diffusion_head.py tests/test_golden.py"),
    Mutant("fast: the modulations of the wrong step", "harmonkit/fast.py",
           "range(max(0, i + 1 - steps_at_once), i + 1)", "range(max(1, i + 1 - steps_at_once), i + 1)",
           "tests/test_fast.py"),
    Mutant("inpainting: a token is redrawn if all of its pixels are", "harmonkit/inpainting.py",
           "F.adaptive_max_pool2d(redrawn, grid)", "-F.adaptive_max_pool2d(-redrawn, grid)",
           "tests/test_inpainting.py"),
    Mutant("reconstruction: guidance sees the picture too", "harmonkit/pipeline.py",
           "[prompt_ids(model.tokenizer, UNCONDITIONAL)] * len(prompts)", "rows", "tests/test_like.py"),
    Mutant("reconstruction: the picture's buffers come first", "harmonkit/reconstruction.py",
           "_, seen[id(picture)] = model.visual_features(latents)",
           "seen[id(picture)] = model.proj_in(model.visual_features(latents)[0])", "tests/test_like.py"),
    Mutant("reconstruction: the request is a caption", "harmonkit/pipeline.py",
           'template = "{caption}" if num_image_tokens else GENERATE', "template = GENERATE",
           "tests/test_like.py"),
    Mutant("reconstruction: the picture is pressed into the square", "harmonkit/reconstruction.py",
           "image_to_pixels(middle(picture, size), size)", "image_to_pixels(picture, size)",
           "tests/test_like.py"),
    Mutant("reconstruction: dropout while the model looks", "harmonkit/pipeline.py",
           "with evaluation_mode(model):\n            settings", "if True:\n            settings",
           "tests/test_like.py"),
    Mutant("reconstruction: the prompt's embeddings lack the picture", "harmon.py",
           "self.llm(input_ids, inputs_embeds=embeds,", "self.llm(input_ids.clamp(min=0),",
           "tests/test_like.py"),
    Mutant("reconstruction: a picture is seen once for each drawing", "harmonkit/reconstruction.py",
           "        if id(picture) not in seen:", "        if True:", "tests/test_like.py"),
    Mutant("evals: a reconstruction may lack things", "harmonkit/evals/reconstruction.py",
           "return len(found) == len(wanted) and all(", "return all(",
           "tests/test_evals_reconstruction.py"),
    Mutant("evals: a reconstruction's things may trade places", "harmonkit/evals/reconstruction.py",
           "near(a, b) and (a.color, a.shape) ==", "(a.color, a.shape) ==",
           "tests/test_evals_reconstruction.py"),
    Mutant("images: photos lie on their sides", "harmonkit/colors.py",
           "TRANSPOSITIONS.get(orientation(image))", "None", "tests/test_colors.py"),
    Mutant("data: text before caption", "harmonkit/data/words.py",
           '("caption", "captions", "text",', '("text", "caption", "captions",', "tests/test_words.py"),
    Mutant("repeatable: small products stay small", "harmonkit/repeatable.py",
           "if rows >= ROWS:", "if rows >= 0:", "tests/test_repeatable.py"),
    Mutant("repeatable: prompts are padded to the longest of the batch", "harmonkit/pipeline.py",
           "return pad(model.tokenizer, rows, multiple)", "return pad(model.tokenizer, rows, 1)",
           "tests/test_repeatable.py"),
    Mutant("repeatable: the VAE in all threads", "harmonkit/repeatable.py",
           "torch.set_num_threads(1)", "torch.set_num_threads(num_threads)", "tests/test_repeatable.py"),
    Mutant("training: autocast off", "train.py",
           "enabled=recipe.bf16", "enabled=False", "tests/test_train.py"),
    Mutant("training: EMA decay inverted", "harmonkit/training/optim.py",
           "1 - decay", "decay", "tests/test_train.py tests/test_runs.py"),
    Mutant("training: no clipping", "train.py",
           "recipe.clip)", 'float("inf"))', "tests/test_train.py"),
    Mutant("training: loss not divided by the number of micro-batches", "train.py",
           "(loss / micro_steps)", "loss", "tests/test_train.py"),
    Mutant("runs: a damaged checkpoint is loaded", "harmonkit/training/checkpoint_files.py",
           "            check_crc(path)", "            pass", "tests/test_checkpoint_files.py"),
    Mutant("runs: checkpoints in the order of letters", "harmonkit/training/checkpoint_files.py",
           "sorted(found, key=step_of)", "sorted(found)", "tests/test_checkpoint_files.py"),
    Mutant("runs: weights that are not finite are saved", "harmonkit/training/checkpoint_files.py",
           "        if name:\n", "        if False:\n", "tests/test_checkpoint_files.py"),
    Mutant("runs: the old learning rate stays", "harmonkit/training/optim.py",
           "        loaded.update(group)\n", "        pass\n", "tests/test_record.py tests/test_optim.py"),
    Mutant("runs: other data pass", "harmonkit/training/changes.py",
           'if had["fingerprint"] != has["fingerprint"]:', "if False:", "tests/test_record.py"),
    Mutant("runs: another start passes", "harmonkit/training/changes.py",
           "        if not same_path:\n", "        if False:\n", "tests/test_record.py"),
    Mutant("runs: a finished run takes other settings", "harmonkit/training/changes.py",
           "if is_finished and set(changed) - SAME_WEIGHTS:", "if False:", "tests/test_record.py"),
    Mutant("runs: the optimizer holds the mapped file", "harmonkit/training/runs.py",
           'copy.deepcopy(found["optimizer"])', 'found["optimizer"]', "tests/test_checkpoint_files.py"),
    Mutant("runs: two trainers in a folder", "harmonkit/training/processes.py",
           "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "tests/test_processes.py"),
    Mutant("runs: processes without a launcher go on", "harmonkit/training/processes.py",
           "return bool(self.received) or self.launcher not in (None, os.getppid())",
           "return bool(self.received)", "tests/test_processes.py"),
    Mutant("data: latents of another image are used", "harmonkit/data/latents.py",
           "        changed = difference(shard.origin(i), origin_of(sample))\n", '        changed = ""\n',
           "tests/test_latents.py"),
    Mutant("data: a changed time passes", "harmonkit/data/latents.py",
           "if now is None or now == before:", "if now is None or now[:2] == before[:2]:",
           "tests/test_latents.py"),
    Mutant("data: cached-as-broken samples do not count", "harmonkit/data/latents.py",
           "bad=bool(shard.bad[i])", "bad=False", "tests/test_caching.py"),
    Mutant("data: any square image serves any task", "harmonkit/data/latents.py",
           "        if rejected[0] != rejected[1]:", "        if False:", "tests/test_latents.py"),
    Mutant("data: checksums are not compared", "harmonkit/data/latents.py",
           "if shard.is_damaged(i, index):", "if False:", "tests/test_latents.py"),
    Mutant("data: a changed shard stays", "harmonkit/data/caching.py",
           "        if changed:\n", "        if False:\n", "tests/test_latents.py"),
    Mutant("data: bad samples count by name", "harmonkit/data/mixture.py",
           "if (s, index) not in self.seen:\n                self.seen.add((s, index))",
           "if error.name not in self.seen:\n                self.seen.add(error.name)",
           "tests/test_mixture.py"),
    Mutant("data: a sample without a label is used", "harmonkit/data/mixture.py",
           "if task in ANSWERS and not has_label:", "if False:", "tests/test_mixture.py"),
    Mutant("data: image tokens are cut", "harmonkit/chat_template.py",
           "    while end < len(ids) and ids[end] == IMAGE_TOKEN_ID:\n        end += 1\n", "",
           "tests/test_mixture.py"),
    Mutant("data: samples are permuted anew", "harmonkit/data/mixture.py",
           "if s not in self.epochs or self.epochs[s][0] != epoch:", "if True:", "tests/test_mixture.py"),
    Mutant("data: sources without a cycle begin early", "harmonkit/data/order.py",
           "(k + 0.5) / shares[s]", "(k + 0.0) / shares[s]", "tests/test_order.py"),
    Mutant("POPE: words are split at any white space", "harmonkit/evals/rules/pope.py",
           '.split(" ")', ".split()", "tests/test_evals_rules.py"),
    Mutant("MMBench: a letter among the last five words counts", "harmonkit/evals/rules/mmbench.py",
           "len(words) - 4", "len(words) - 5", "tests/test_evals_choice_rules.py"),
    Mutant("MMMU: of several letters the first counts", "harmonkit/evals/rules/mmmu.py",
           "max(places, key=places.get)", "min(places, key=places.get)", "tests/test_evals_choice_rules.py"),
    Mutant("golden: failures end with status 0", "harmonkit/evals/golden.py",
           "return 1 if failed else 0", "return 0", "tests/test_evals_golden.py"),
    Mutant("GenEval: a score equal to the threshold is kept", "harmonkit/evals/rules/geneval.py",
           "scores[i] > least]", "scores[i] >= least]", "tests/test_evals_geneval.py"),
    Mutant("DPG: crops column by column", "harmonkit/evals/dpg.py",
           "for y in (0, height) for x in (0, width)", "for x in (0, width) for y in (0, height)",
           "tests/test_evals_dpg.py"),
    Mutant("WISE: two editions in one file pass", "harmonkit/evals/wise_files.py",
           "    if len(editions) > 1:", "    if len(editions) > 2:", "tests/test_evals_wise.py"),
    Mutant("detector: no object is dropped before the softmax", "harmonkit/evals/detector.py",
           ".softmax(dim=-1)[:, :-1]", "[:, :-1].softmax(dim=-1)", "tests/test_evals_detector.py"),
    Mutant("benchmarks: a resumed batch holds the missing pictures alone", "harmonkit/drawing.py",
           "images = draw_batch(unit.pictures)",
           "images = draw_batch([p for p, lacks in zip(unit.pictures, lacking) if lacks])",
           "tests/test_evals_pictures.py"),
    Mutant("benchmarks: prompts share seeds", "harmonkit/evals/pictures.py",
           "first = seed + module.SEED_STRIDE * p", "first = seed + p", "tests/test_evals_pictures.py"),
    Mutant("benchmarks: --limit may shrink what is there", "harmonkit/evals/manifest.py",
           "if now is not None and (before is None or before > now):", "if False:",
           "tests/test_evals_manifest.py"),
    Mutant("FID: any number of pictures", "harmonkit/evals/fid.py",
           "    if found != expected:", "    if False:", "tests/test_evals_fid.py"),
    Mutant("judge: redirects are followed with the key", "harmonkit/evals/endpoint.py",
           "    def redirect_request(self, *_):\n        return None", "    pass",
           "tests/test_evals_endpoint.py"),
    Mutant("judge: asking again reads the cache", "harmonkit/evals/judge.py",
           'f"{self.endpoint.name}\\n{attempt}\\n".encode() + body',
           'f"{self.endpoint.name}\\n".encode() + body', "tests/test_evals_judge.py"),
    Mutant("table: unlike settings are not told", "harmonkit/evals/results.py",
           "if name in expected and value != expected[name]:", "if False:", "tests/test_evals_table.py"),
    Mutant("table: fractions beside the paper's percent", "harmonkit/evals/table.py",
           "round(pair[which] / entry.unit, 6)", "pair[which]", "tests/test_evals_table.py"),
    Mutant("answers: pictures of another question", "harmonkit/pipeline.py",
           "torch.cat(z_enc) if z_enc", "torch.cat(z_enc[::-1]) if z_enc", "tests/test_batched_answers.py"),
    Mutant("answers: a row that ended keeps its mask", "harmonkit/pipeline.py",
           "tokens[goes_on], attention_mask[goes_on]", "tokens[goes_on], attention_mask[:len(left)]",
           "tests/test_batched_answers.py"),
    Mutant("answers: a half-written line counts", "harmonkit/evals/answer_parts.py",
           '.split(b"\\n")[:-1]', ".splitlines()", "tests/test_evals_answers.py"),
    Mutant("answers: official files lack the failed ones", "harmonkit/evals/answers.py",
           'if numbers["failed"]:', "if False:", "tests/test_evals_answers.py"),
    Mutant("MME: two lines may be of two pictures", "harmonkit/evals/mme.py",
           "        if first != second:", "        if False:", "tests/test_evals_mme.py"),
)


def failing_tests(folder, tests):
    """Names of the tests that fail in a copy of the project. Raises RuntimeError if pytest cannot run."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *tests.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests}: status {run.returncode}\n{run.stdout[-2000:]}{run.stderr}")
    return re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", run.stdout, re.MULTILINE)


def main():
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word.lower() in m.name.lower() for word in words)]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for mutant in chosen:
            file = copy / mutant.file
            text = file.read_text()
            if text.count(mutant.right) != 1:
                raise SystemExit(f"{mutant.file}: {text.count(mutant.right)} times, not once: {mutant.right}")
            file.write_text(text.replace(mutant.right, mutant.wrong))
            began = time.time()
            caught_by = failing_tests(copy, mutant.tests)
            file.write_text(text)
            survived += not caught_by
            more = f" and {len(caught_by) - 3} more" if len(caught_by) > 3 else ""
            verdict = f"caught by {', '.join(caught_by[:3])}{more}" if caught_by else "SURVIVED"
            print(f"{mutant.name:58} {time.time() - began:4.0f} s  {verdict}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
