import pytest

from verl.data.loader import PromptLoader
from verl.data.prompts import PromptBuilder
from verl.data.rows import BadSample, RowKeys, read_rows
from verl.data.sft_dataset import SFTDataset, pack, target_text
from verl.data.sources import DataError

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture
def open_dataset(write_rows, make_config, tokenizer, fmt, fake_media):
    def open_rows(*rows, **settings):
        config = make_config(write_rows(rows), **settings)
        return SFTDataset(config, tokenizer, fmt)

    return open_rows


def learnt(tokenizer, sample) -> list[str]:
    """The runs of tokens that are targets, as texts."""
    runs, last = [], 0
    for token, is_target in zip(sample.input_ids, sample.loss_mask, strict=True):
        if is_target and not last:
            runs.append("")
        if is_target:
            runs[-1] += tokenizer.decode([token])
        last = is_target
    return runs


def turns(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


ROW = {"problem": "which?", "reasoning": "It is red.", "answer": "<answer>A</answer>"}
TARGET = "<think>It is red.</think> <answer>A</answer>"


def test_only_the_answer_and_its_end_of_turn_token_are_learnt(open_dataset, tokenizer):
    sample = open_dataset(ROW).sample(0)
    head = SYSTEM + "<|im_start|>user\nwhich?<|im_end|>\n<|im_start|>assistant\n"
    assert sample.text == head + TARGET + "<|im_end|>"
    tokens = [tokenizer.decode([token]) for token in sample.input_ids]
    n_head = len(tokenizer(head)["input_ids"])
    assert tokens[n_head - 2 :] == ["t", "\n", *TARGET, "<|im_end|>"]
    assert sample.loss_mask == [0] * n_head + [1] * (len(TARGET) + 1)


def test_training_sees_the_prompt_that_generation_starts_from(
    open_dataset, write_rows, make_config, tokenizer, fmt
):
    sample = open_dataset(ROW).sample(0)
    config = make_config(write_rows([ROW]))
    (row,) = read_rows(config.train_files, RowKeys())
    prompt = PromptBuilder(config, tokenizer, fmt).build(row)
    ids = tokenizer(prompt.text)["input_ids"]
    assert sample.input_ids[: len(ids)] == ids
    assert sum(sample.loss_mask[: len(ids)]) == 0
    assert all(sample.loss_mask[len(ids) :])


def test_visual_tokens_are_expanded_and_never_learnt(open_dataset, tokenizer, write_video):
    row = {**ROW, "problem": "<video> which?", "videos": write_video("a.mp4", "2 4 4")}
    sample = open_dataset(row).sample(0)
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert sample.input_ids.count(pad) == sample.media[0].n_tokens == 8
    masks = zip(sample.input_ids, sample.loss_mask, strict=True)
    assert not any(is_target for token, is_target in masks if token == pad)
    assert learnt(tokenizer, sample) == [TARGET + "<|im_end|>"]


def test_every_assistant_turn_of_a_conversation_is_learnt(open_dataset, tokenizer, write_video):
    row = {
        "messages": turns("first <video>?", "one", "then <video>?", "two"),
        "videos": [write_video("a.mp4", "1 2 4"), write_video("b.mp4", "3 4 4")],
    }
    sample = open_dataset(row).sample(0)
    assert learnt(tokenizer, sample) == ["one<|im_end|>", "two<|im_end|>"]
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert sample.input_ids.count(pad) == 2 + 12
    assert tokenizer.decode(sample.input_ids).replace("<|video_pad|>", "") == (
        sample.text.replace("<|video_pad|>", "")
    )
    assert sample.text.endswith("two<|im_end|>")


def test_messages_may_hold_parts_and_their_own_system_turn(open_dataset, tokenizer, write_video):
    parts = [{"type": "video"}, {"type": "text", "text": "why?"}]
    messages = [{"role": "system", "content": "Own."}, *turns(parts, "because ")]
    row = {"messages": messages, "videos": write_video("a.mp4")}
    sample = open_dataset(row, system_prompt="Configured.").sample(0)
    assert sample.text.startswith("<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\n<|vision")
    assert learnt(tokenizer, sample) == ["because<|im_end|>"]
    row = {"messages": turns("why?", "because")}
    sample = open_dataset(row, system_prompt="Configured.").sample(0)
    assert sample.text.startswith("<|im_start|>system\nConfigured.<|im_end|>")


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({}, TARGET),
        ({"response": " as it is "}, "as it is"),
        (
            {"reasoning": " <think>x</think>\n<answer>B</answer>"},
            "<think>x</think>\n<answer>B</answer>",
        ),
        ({"reasoning": "a <think> tag"}, "<think>a <think> tag</think> <answer>A</answer>"),
        ({"reasoning": "an <answer> tag"}, "<think>an <answer> tag</think> <answer>A</answer>"),
        ({"reasoning": "<think>x"}, "<think>x</think> <answer>A</answer>"),
        ({"reasoning": "x</think>"}, "<think>x</think> <answer>A</answer>"),
        ({"reasoning": "<think>x</think>"}, "<think>x</think> <answer>A</answer>"),
    ],
)
def test_the_target_is_the_response_or_reasoning_and_answer_with_tags(write_rows, columns, target):
    (row,) = read_rows([write_rows([{**ROW, **columns}])], RowKeys())
    assert target_text(row) == target


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": turns("only a question")}, "no_target"),
        ({"messages": [{"role": "assistant", "content": "unasked"}]}, "no_target"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "bad_message"),
        ({"messages": turns([{"type": "sound"}], "x")}, "bad_message"),
        ({"messages": turns("<video>?", "x")}, "marker_mismatch"),
        ({"messages": turns("a", "b", "<video>?"), "videos": "c.mp4"}, "no_target"),
        ({**ROW, "reasoning": "one </think> two"}, "bad_reasoning"),
        ({**ROW, "reasoning": "<think>a</think> b</think>"}, "bad_reasoning"),
        ({**ROW, "response": "the end <|im_end|> or not"}, "reserved_text"),
    ],
)
def test_a_row_without_a_sound_target_has_a_named_reason(open_dataset, row, reason):
    with pytest.raises(BadSample) as caught:
        open_dataset(row).sample(0)
    assert caught.value.reason == reason


def test_an_answer_that_is_no_option_is_not_taught(open_dataset):
    row = {**ROW, "options": ["red", "blue"]}
    with pytest.raises(DataError, match=r"'C' is none of the options \(A\. red; B\. blue\)"):
        open_dataset(row, {**row, "answer": "C"})
    assert open_dataset(row, {**row, "answer": "blue"}).sample(1)
    assert open_dataset({**row, "answer": "C", "response": "as it is"}).sample(0)
    kept = open_dataset(row, {**row, "answer": "C"}, on_bad_sample="skip", max_bad_fraction=0.5)
    assert [kept.is_quarantined(i) for i in range(2)] == [False, True]


def test_rows_without_any_target_are_found_before_training(open_dataset):
    with pytest.raises(DataError, match=r"1 of 2 rows have no 'reasoning'.*data\.reasoning_key"):
        open_dataset(ROW, {"problem": "q", "answer": "A"})


def test_a_template_that_rewrites_earlier_answers_is_refused(open_dataset, tokenizer, monkeypatch):
    rewriting = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "{{ message['content'] if loop.last else 'cut' }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", rewriting)
    with pytest.raises(BadSample, match="renders turn 1 differently") as caught:
        open_dataset({"messages": turns("a", "b", "c", "d")}).sample(0)
    assert caught.value.reason == "chat_template"


def test_a_template_without_an_end_of_turn_token_is_refused(open_dataset, tokenizer, monkeypatch):
    endless = tokenizer.chat_template.replace("<|im_end|>", "")
    monkeypatch.setattr(tokenizer, "chat_template", endless)
    with pytest.raises(DataError, match="would not learn to stop"):
        open_dataset(ROW).sample(0)


def test_tokens_that_join_prompt_and_answer_are_refused(open_dataset, tokenizer, monkeypatch):
    joining = tokenizer.chat_template.replace(
        "{{ message['content'] }}", "\n{{ message['content'] }}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", joining)
    with pytest.raises(BadSample) as caught:
        open_dataset(ROW).sample(0)
    assert caught.value.reason == "token_boundary"


def test_prompt_and_response_each_have_their_limit(open_dataset, write_video):
    n_response = len(TARGET) + 1
    assert open_dataset(ROW, max_response_length=n_response).sample(0)
    with pytest.raises(BadSample, match=f"{n_response} tokens; data.max_response_length") as caught:
        open_dataset(ROW, max_response_length=n_response - 1).sample(0)
    assert caught.value.reason == "response_too_long"
    row = {**ROW, "videos": write_video("a.mp4", "50 4 4")}
    with pytest.raises(BadSample, match="200 of them visual") as caught:
        open_dataset(row, max_prompt_length=200).sample(0)
    assert caught.value.reason == "prompt_too_long"


def test_the_loader_drops_over_long_rows_with_a_count(open_dataset):
    rows = [{**ROW, "reasoning": "x" * n} for n in (5, 900, 6, 7)]
    dataset = open_dataset(*rows, max_response_length=100)
    loader = PromptLoader(dataset, 2, shuffle=False, seed=1, num_workers=2)
    lengths = [[sum(sample.loss_mask) for sample in batch] for batch in loader]
    assert len(lengths) == 1
    assert lengths[0][1] == lengths[0][0] + 1
    assert dataset.summary().startswith("1 response_too_long (first ")


def test_packing_keeps_every_sample_once_within_the_limit():
    lengths = [7, 3, 5, 5, 2, 8, 1, 9]
    groups = pack(lengths, 10)
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert all(sum(lengths[i] for i in group) <= 10 for group in groups)
    assert len(groups) == 4  # 40 tokens in groups of 10: the optimum.


def test_packing_is_first_fit_decreasing_and_breaks_ties_by_position():
    assert pack([4, 4, 4, 4], 8) == [[0, 1], [2, 3]]
    assert pack([2, 6, 3, 5], 8) == [[0, 1], [2, 3]]
    assert pack([], 8) == []


def test_a_sample_longer_than_the_limit_still_runs_alone():
    assert pack([3, 20, 4], 10) == [[1], [0, 2]]
