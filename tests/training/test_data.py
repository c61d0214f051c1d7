"""Training examples: what each kind of line becomes, and where the loss is."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salr.training.data import IGNORED, collate, read_training_data
from salr.training.errors import DataError

TEMPLATE = (
    "{% for m in messages %}w{{ 100 + m.role|length }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w109 {% endif %}"
)


@pytest.fixture
def tokenizer():
    """Return a tokenizer of the words w0, w1 ... with the end token w9."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w9", chat_template=TEMPLATE)


@pytest.fixture
def read(tmp_path, tokenizer):
    """Return a function: (lines, maximum) -> the data of a file of these lines."""

    def run(*lines, max_length=64, template=True):
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        if not template:
            tokenizer.chat_template = None
        return read_training_data(path, tokenizer, max_length)

    return run


def test_a_prompt_gets_no_loss_and_its_completion_and_the_end_do(read):
    data = read({"prompt": "w1 w2 ", "completion": "w3 w4"})
    assert data.examples[0] == ([1, 2, 3, 4, 9], [IGNORED, IGNORED, 3, 4, 9])
    assert data.describe() == "1 prompts with completions; loss on answers only (3 of 5 tokens)"


def test_questions_go_through_the_chat_template_where_there_is_one(read):
    line = {"question": "w1 w2", "answer": "w3"}
    assert read(line).examples[0] == ([104, 1, 2, 109, 3], [IGNORED] * 4 + [3])
    assert read(line, template=False).examples[0] == ([1, 2, 3, 9], [IGNORED, IGNORED, 3, 9])


def test_in_a_conversation_everything_the_assistant_says_is_learned(read):
    talk = [("system", "w7"), ("user", "w1"), ("assistant", "w2 w3"), ("user", "w4"), ("assistant", "w5")]
    data = read({"messages": [{"role": role, "content": content} for role, content in talk]})
    assert data.examples[0].input_ids == [106, 7, 104, 1, 109, 2, 3, 104, 4, 109, 5]
    assert [label for label in data.examples[0].labels if label != IGNORED] == [2, 3, 5]
    assert data.describe().startswith("1 conversations, through the chat template; loss on answers only (3 of 11")


def test_of_a_text_every_token_is_learned(read):
    data = read({"text": "w1 w2"}, "", {"text": "w3"})
    assert [example.input_ids for example in data.examples] == [[1, 2, 9], [3, 9]]
    assert data.examples[0].labels == [1, 2, 9] and "loss on all tokens (3 of 5 tokens)" in data.describe()


def test_long_examples_are_cut_and_those_with_nothing_left_to_learn_counted(read):
    long = {"prompt": "w1 w2 w3 w4 ", "completion": "w5"}
    data = read({"prompt": "w1 ", "completion": "w2 w3 w4 w5 w6"}, long, max_length=4)
    assert data.examples == [([1, 2, 3, 4], [IGNORED, 2, 3, 4])]
    assert (data.n_cut, data.n_left_out) == (2, 1) and data.describe().endswith("; 2 cut; 1 left out")
    with pytest.raises(DataError, match="no example has a token to learn within 4 tokens; give a larger --max-length"):
        read(long, max_length=4)


def test_a_byte_order_mark_is_no_part_of_the_first_line(read):
    assert read("\ufeff" + json.dumps({"text": "w1"})).examples == [([1, 9], [1, 9])]


def test_a_batch_is_padded_without_loss():
    batch = collate([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}], padding=7)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"text": w1}'], r"line 1 is not JSON \(Expecting value in column 10\), needed a JSON object"),
        (["{}"], "line 1 has no fields, needed messages; or prompt and completion"),
        (["[1]"], "line 1 is list, needed a JSON object"),
        ([{"text": "w1"}, {"txt": "w1"}], "line 2 has no field 'text', needed the fields of the first line"),
        ([{"text": 3}], "line 1 has a field 'text' that is int, needed text"),
        ([{"text": "w1 \ud800"}], r"line 1 holds half a character \(\\ud800\), needed Unicode text"),
        ([{"messages": [{"role": "user", "content": ["w1"]}]}], "line 1 has a message whose 'content' is list, needed"),
        ([{"messages": []}], "line 1 has a field 'messages' that is no list, or empty"),
        ([{"messages": [{"role": "user"}]}], "line 1 has a message without a field 'content'"),
        (
            [{"messages": [{"role": "cat", "content": "w1"}]}],
            "line 1 has a message of role 'cat', needed one of system",
        ),
        ([{"messages": [{"role": "user", "content": "w1"}]}], "no example has a token to learn, needed what an assist"),
        ([{"text": ""}], "no example has a token to learn, needed texts that are not empty"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(read, lines, words):
    with pytest.raises(DataError, match=words) as caught:
        read(*lines)
    assert "train.jsonl" in str(caught.value)


def test_conversations_without_a_chat_template_are_refused(read):
    with pytest.raises(DataError, match="holds conversations, needed a tokenizer with a chat template"):
        read({"messages": [{"role": "user", "content": "w1"}]}, template=False)
