"""Prompt files in every form that people have, their pictures' names, and messages for broken ones."""
import json

import pytest

from harmonkit.prompts import MAX_NAME_BYTES, Prompt, read_prompts, safe_name, slug

STARS = [Prompt("a star", "00000-a-star"), Prompt("zwei Kreise", "00001-zwei-kreise")]
NAMED = [Prompt("a star", "s"), Prompt("zwei Kreise", "7")]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name, content", [
    ("list.json", '["a star", "zwei Kreise"]'),
    ("objects.json", '[{"prompt": "a star"}, {"prompt": "zwei Kreise", "id": null}]'),
    ("fields.json", '[{"text": "a star"}, {"caption": " zwei Kreise\\n", "prompt": null, "text": " "}]'),
    ("order.json", '[{"caption": "no", "text": "no", "prompt": "a star"},'
                   '{"caption": "no", "text": "zwei Kreise"}]'),
    ("inside.json", '{"version": 1, "prompts": ["a star", "zwei Kreise"]}'),
    ("data.json", '{"info": [], "data": [{"Prompt": "a star"}, {"Text": "zwei Kreise"}]}'),
    ("any.json", '{"version": "1.0", "my_list": ["a star", "zwei Kreise"]}'),
    ("lines.jsonl", '{"prompt": "a star"}\n\n{"text": "zwei Kreise"}\n'),
    ("strings.jsonl", '"a star"\r\n"zwei Kreise"\r\n'),
    ("array.jsonl", '[\n"a star",\n"zwei Kreise"]'),
    ("really-lines.json", '{"prompt": "a star"}\n{"prompt": "zwei Kreise"}'),
    ("text.txt", "a star\r\n\r\n  zwei Kreise"),
    ("no-suffix", "a star\nzwei Kreise\n"),
    ("no-suffix-json", '["a star", "zwei Kreise"]'),
    ("table.csv", "n,prompt\n1,a star\n\n2,zwei Kreise\n,\n"),
    ("excel.csv", "n;Prompt\r\n1;a star\r\n2;zwei Kreise\r\n"),
    ("drawbench.csv", "Prompts,Category\na star,Colors\nzwei Kreise,Counting\n"),
    ("parti.tsv", "Prompt\tCategory\na star\tBasic\nzwei Kreise\tBasic\n"),
])
def test_forms_without_ids(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == STARS
    assert read_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode())) == STARS, "byte order mark"
    assert read_prompts(write(tmp_path, name, content.encode("utf-16"))) == STARS, "Windows' Unicode"


@pytest.mark.parametrize("name, content", [
    ("id.json", '[{"id": "s", "prompt": "a star"}, {"id": 7, "text": "zwei Kreise"}]'),
    ("item_id.jsonl", '{"item_id": "s", "text": "a star"}\n{"item_id": "7", "text": "zwei Kreise"}'),
    ("wise.json", '[{"Prompt": "a star", "prompt_id": "s"}, {"Prompt": "zwei Kreise", "prompt_id": 7}]'),
    ("by-id.json", '{"s": "a star", "7": "zwei Kreise"}'),
    ("mjhq.json", '{"s": {"category": "x", "prompt": "a star"}, "7": {"prompt": "zwei Kreise"}}'),
    ("pandas.json", '{"caption": {"s": "a star", "7": "zwei Kreise"}}'),
    ("coco.json", '{"images": [1], "annotations": [{"id": "s", "caption": "a star"},'
                  '{"id": 7, "caption": "zwei Kreise"}]}'),
    ("metadata.jsonl", '{"file_name": "s.png", "text": "a star"}\n'
                       '{"file_name": "7.jpg", "text": "zwei Kreise"}'),
    ("name.csv", 'name,caption\ns,a star\n7,"zwei Kreise"\n'),
    ("dpg_bench.csv", "item_id,text,proposition_id\ns,a star,1\ns,a star,2\n7,zwei Kreise,1\n"),
])
def test_ids_name_the_pictures(tmp_path, name, content):
    assert read_prompts(write(tmp_path, name, content)) == NAMED


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    line = json.dumps({"prompt": text}, ensure_ascii=False)
    for name, content in ("a.jsonl", line), ("a.txt", text):
        path = write(tmp_path, name, f"{content}\n{content}\n")
        assert [prompt.text for prompt in read_prompts(path)] == [text] * 2


def test_quotes_in_tables(tmp_path):
    quoted = read_prompts(write(tmp_path, "a.csv", 'prompt,n\n"a ""red"" star,\nbig",1\na sign,2\n'))
    assert [prompt.text for prompt in quoted] == ['a "red" star,\nbig', "a sign"]
    plain = read_prompts(write(tmp_path, "a.tsv", 'prompt\tn\n"Deep" on a sign\t1\n"to be\t2\n'))
    assert [prompt.text for prompt in plain] == ['"Deep" on a sign', '"to be']


def test_a_folder_of_texts_is_named_by_its_files(tmp_path):
    for name, text in (("1", "a star\n"), ("partiprompts97", "zwei Kreise"), ("._1", "junk")):
        write(tmp_path, f"{name}.txt", text)
    write(tmp_path, "readme.md", "# no prompt")
    assert read_prompts(tmp_path) == [Prompt("a star", "1"), Prompt("zwei Kreise", "partiprompts97")]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty: a folder without .txt files"):
        read_prompts(empty)


BIG = '[{"prompt": "%s"},\n{"prompt": oops}]' % ("x" * 400_000)
BROKEN = [
    ("no.json", None, "no.json: no such file"),
    ("big.json", BIG, "big.json, line 2: not JSON (Expecting value)"),
    ("cut.json", '["a",\n"b"', "cut.json, line 2: not JSON (Expecting ',' delimiter)"),
    ("deep.json", "[" * 100_000, "deep.json, line 1: not JSON"),
    ("digits.json", "[" + "9" * 5000 + "]", "digits.json, line 1: not JSON"),
    ("bad.jsonl", '{"prompt": "a"}\n\n{"prompt": oops}', "bad.jsonl, line 3: not JSON (Expecting value)"),
    ("empty.json", '["a",\n " "]', "empty.json, entry 2 (line 2): the prompt is empty"),
    ("empty.jsonl", '{"prompt": "a"}\n{"prompt": "", "text": null}', "empty.jsonl, line 2: the prompt is"),
    ("empty.csv", "id,prompt\n1,a\n2, \n", "empty.csv, line 3: the prompt is empty"),
    ("none.json", "[]", "none.json: there is no prompt in it"),
    ("none.txt", "\n \n", "none.txt: there is no prompt in it"),
    ("none.csv", "prompt\n", "none.csv: there is no prompt in it"),
    ("zero.csv", "", "zero.csv, line 1: no column prompt, text or caption; the columns are: none"),
    ("number.json", "3", "number.json: expected a JSON list of prompts, but it holds a int"),
    ("numbers.json", "[3]", "entry 1 (line 1): a int where the prompt's text is expected"),
    ("list.jsonl", '{"prompt": ["a"]}', "list.jsonl, line 1: a list where the prompt's text is expected"),
    ("field.jsonl", '{"words": "a", "n": 1}', "line 1: no field prompt, text or caption; there is: words, n"),
    ("lists.json", '{"a": ["x"], "b": ["y"]}', "lists.json: several lists (a, b)"),
    ("id.jsonl", '{"id": [1], "text": "a"}', "id.jsonl, line 1: the id is a list"),
    ("head.csv", "words,n\na,1\n", "line 1: no column prompt, text or caption; the columns are: words, n"),
    ("comma.csv", "id,prompt\n1,a red, big star\n", "comma.csv, line 2: 3 cells under 2 columns"),
    ("quote.csv", 'id,prompt\n1,a\n2,"b\n3,c\n', "quote.csv, line 3: not a table (unexpected end of data)"),
    ("same.jsonl", '{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "line 1 and line 2 both have the id"),
    ("made.jsonl", '{"id": "a/b", "text": "a"}\n{"id": "a-b", "text": "b"}', "both have the id 'a-b'"),
    ("latin.txt", "a\nKäse".encode("latin-1"), "latin.txt, line 2: not text in UTF-8"),
    ("photo.json", b"\x89PNG\r\n\x1a\n", "photo.json, line 1: not text in UTF-8"),
    ("photo.png", "text", "photo.png: not a prompt file; known are .json"),
    ("half.json", '["a",\n"\\ud83d"]', "half.json, entry 2 (line 2): the prompt is not valid Unicode text"),
]


@pytest.mark.parametrize("name, content, message", BROKEN, ids=[name for name, _, _ in BROKEN])
def test_what_is_wrong_is_said_in_one_short_line(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_prompts(tmp_path / name)
    text = str(error.value)
    assert message in text and text.startswith(f"{tmp_path / name}")
    assert "\n" not in text and len(text) < len(str(tmp_path)) + 200


def test_ids_are_safe_file_names():
    assert safe_name("../../etc/passwd") == "etc-passwd"
    assert safe_name("train\\0001.JPG") == "train-0001"
    assert safe_name("..") == safe_name("/") == "image"
    assert safe_name(".hidden. ") == "hidden"
    assert safe_name('a:b*?"<c>|\x00d') == "a-b-c-d"
    assert (safe_name("CON"), safe_name("nul.1"), safe_name("cone")) == ("_CON", "_nul.1", "cone")
    first, second = safe_name("ü" * 300 + "1"), safe_name("ü" * 300 + "2")
    assert first != second and max(len(name.encode()) for name in (first, second)) <= MAX_NAME_BYTES


def test_slugs_fit_a_file_system():
    assert slug("Three Blue stars!") == "three-blue-stars"
    assert slug("★ ☆ ✨🎉") == "image"
    assert slug("con") == "_con"
    for text in ("三" * 200, "\U00020000" * 200, "ß" * 200):
        assert 60 < len(slug(text).encode()) <= 100 and text.startswith(slug(text))
