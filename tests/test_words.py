"""The words of a row: which field they are in, and the forms of conversations."""
import json
import random

import pytest
from data_files import CONVERSATION, MESSAGES, TURNS, first_row, png

from harmonkit.data.records import SkipSample


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1))
    return tmp_path


@pytest.mark.parametrize("row, expected", [
    ({"caption": "a", "text": "b", "prompt": "c"}, "a"), ({"prompt": "c", "text": "b"}, "b"),
    ({"caption": None, "text": "b"}, "b"), ({"caption": " ", "prompt": "c"}, "c"),
    ({"caption": [], "text": "b"}, "b"), ({"caption": ["", None], "text": "b"}, "b"),
    ({"caption": float("nan"), "prompt": "c"}, "c"), ({"Caption": "a"}, "a"), ({"caption": [" a\n"]}, "a"),
    ({"texts": ["a"]}, "a"), ({"txt": "a"}, "a"),
    ({"captions": ["a"]}, "a"), ({"caption": '["a"]'}, "a"), ({"caption": "['a']"}, "a"),
    ({"caption": "[a]"}, "[a]"), ({"caption": 7}, "7"), ({"caption": "nan"}, "nan"),
])
def test_the_order_of_the_fields(folder, row, expected):
    assert first_row(folder, {"image": "0.png", **row}).caption(None) == expected


def test_a_chosen_field(folder):
    row = {"image": "0.png", "caption": "a", "prompt": "c", "note": "d", "empty": "", "messages": MESSAGES}
    for text, expected in {"prompt": "c", "note": "d"}.items():
        sample = first_row(folder, row, text=text)
        assert (sample.caption(None), sample.turns) == (expected, None)
    assert first_row(folder, row, text=["empty", "nothing", "note"]).caption(None) == "d"
    sample = first_row(folder, row, text="messages")
    assert (sample.caption, sample.turns(None)) == (None, TURNS)
    with pytest.raises(SkipSample, match="no 'nothing' in it, or it is empty; its fields are image, caption"):
        first_row(folder, row, text="nothing")
    with pytest.raises(SkipSample, match="no 'empty' in it, or it is empty"):
        first_row(folder, row, text="empty")
    for text in (3, [], [3], {"a": 1}):
        with pytest.raises(ValueError, match="a.json: text is .*; the name of a field is expected"):
            first_row(folder, row, text=text)


def test_one_of_several_captions_is_drawn(folder):
    sample = first_row(folder, {"image": "0.png", "captions": ["a", " ", "b", None, "c"]})
    drawn = [sample.caption(random.Random(seed)) for seed in range(60)]
    assert {drawn.count(letter) > 10 for letter in "abc"} == {True} and set(drawn) == {"a", "b", "c"}
    assert drawn == [sample.caption(random.Random(seed)) for seed in range(60)]


@pytest.mark.parametrize("row, turns, dropped", [
    ({"conversations": CONVERSATION}, TURNS, 0),
    ({"conversations": json.dumps(CONVERSATION)}, TURNS, 0),
    ({"messages": MESSAGES}, TURNS, 1),
    ({"conversations": [{"from": "system", "value": "x"}, *CONVERSATION]}, TURNS, 1),
    ({"conversations": [*CONVERSATION, CONVERSATION[0]]}, TURNS, 0),
    ({"conversations": CONVERSATION[:3]}, TURNS[:1], 0),
    ({"conversations": [*CONVERSATION[:3], {"from": "gpt", "value": ""}]}, TURNS[:1], 0),
    ({"conversations": [{"from": "User", "value": "a"}, {"from": "GPT", "value": "b"}]}, [("a", "b")], 0),
    ({"conversations": [{"from": "human", "text": "a"}, {"from": "bot", "text": "b"}]}, [("a", "b")], 0),
    ({"conversation": [{"role": "user", "text": "a"}, {"role": "model", "text": "b"}]}, [("a", "b")], 0),
    ({"texts": [{"user": "a", "assistant": "b", "source": "x"}, {"user": "c", "assistant": "d"}]},
     [("a", "b"), ("c", "d")], 0),
    ({"conversations": [{"human": "a", "gpt": "b"}]}, [("a", "b")], 0),
    ({"texts": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": ""}]}, [("a", "b")], 0),
    ({"question": "a", "answer": "b"}, [("a", "b")], 0),
    ({"system": "x", "conversations": CONVERSATION}, TURNS, 1),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *MESSAGES[1:]]}, TURNS, 0),
    ({"question": "a", "answers": ["c", "b", "b"]}, [("a", "b")], 0),
    ({"question": "a", "answers": [{"answer": "b", "answer_id": 1}, {"answer": "c"}]}, [("a", "b")], 0),
    ({"question": "a", "answer": 4}, [("a", "4")], 0),
    ({"instruction": "a", "input": "b", "output": "c"}, [("a\nb", "c")], 0),
    ({"instruction": "a", "input": "", "output": "c"}, [("a", "c")], 0),
    ({"prompt": "a", "completion": "c"}, [("a", "c")], 0),
])
@pytest.mark.parametrize("image", [{}, {"image": "images/1.png"}])
def test_forms_of_conversations(folder, row, turns, dropped, image):
    sample = first_row(folder, row | image)
    assert sample.turns(None) == turns
    assert sample.dropped_system == dropped
    assert (sample.image is not None) == bool(image)


@pytest.mark.parametrize("turns, reason", [
    ([("user", "a"), ("tool", "b"), ("assistant", "c")], "unknown speaker 'tool'"),
    ([("user", "a"), ("user", "b"), ("assistant", "c")], "questions and answers do not alternate"),
    ([("assistant", "a"), ("user", "b"), ("assistant", "c")], "questions and answers do not alternate"),
    ([("user", "<image>\n"), ("assistant", "c")], "a turn without text"),
    ([("user", "a"), ("assistant", None), ("user", "b"), ("assistant", "c")], "a turn without text"),
    ([("system", "a"), ("user", "b")], "no answered question in it"),
    ([("user", [{"type": "video"}]), ("assistant", "c")], "a part of type 'video'"),
    ([("user", {"a": 1}), ("assistant", "c")], "a turn without text"),
    ([("user", 5), ("assistant", True)], "a text is expected, not bool"),
])
def test_conversations_that_are_refused(folder, turns, reason):
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(SkipSample, match=f"a.json:1: {reason}"):
        first_row(folder, {"messages": messages})


def test_a_row_with_conversation_and_caption_has_both(folder):
    sample = first_row(folder, {"image": "images/0.png", "caption": "a", "conversations": CONVERSATION})
    assert (sample.caption(None), sample.turns(None)) == ("a", TURNS)
