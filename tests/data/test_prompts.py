from pathlib import Path

import pytest

from verl.data.prompts import MediaSlot, PromptBuilder, PromptTemplate
from verl.data.rows import BadSample, RowKeys, read_rows
from verl.data.sources import DataError

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = Path(__file__).parents[2] / "examples/format_prompt"


@pytest.fixture
def build(write_rows, make_config, tokenizer, fmt, tmp_path):
    """Builds the prompt of one row; `template` is the text of a template file."""

    def build_prompt(row, template=None, **settings):
        if template is not None:
            (tmp_path / "t.jinja").write_text(template)
            settings["format_prompt"] = str(tmp_path / "t.jinja")
        config = make_config(write_rows([{"answer": "A", **row}]), **settings)
        (read,) = read_rows(config.train_files, RowKeys.from_config(config))
        return PromptBuilder(config, tokenizer, fmt).build(read)

    return build_prompt


def user_turn(prompt) -> str:
    return prompt.text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def test_a_prompt_is_the_chat_up_to_the_start_of_the_answer(build):
    assert build({"problem": "why?"}, system_prompt="Be brief.").text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_system_prompt_the_chat_template_gives_its_own(build):
    assert build({"problem": "why?"}).text.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    )


@pytest.mark.parametrize("media", [{}, {"images": "a.png"}, {"videos": "a.mp4"}])
def test_templates_are_honoured_for_text_image_and_video_alike(build, media):
    template = "{{ content }}|{{ problem }}|{{ options | join('/') }}|{{ level }}\n"
    row = {"problem": "which?", "options": ["x", "y"], "level": 3, **media}
    text = "which?|which?|x/y|3"
    placeholder = {"": "", "images": IMAGE, "videos": VIDEO}[next(iter(media), "")]
    assert user_turn(build(row, template)) == placeholder + text


def test_markers_are_replaced_in_place_and_in_order(build):
    row = {
        "problem": "first <video> then <image> then <video>?",
        "videos": ["a.mp4", "b.mp4"],
        "images": ["c.png"],
    }
    prompt = build(row)
    assert user_turn(prompt) == f"first {VIDEO} then {IMAGE} then {VIDEO}?"
    assert prompt.slots == (
        MediaSlot("video", "a.mp4"),
        MediaSlot("image", "c.png"),
        MediaSlot("video", "b.mp4"),
    )


def test_media_without_markers_stand_before_the_question_images_first(build):
    prompt = build({"problem": "why?", "videos": "a.mp4", "images": ["b.png", "c.png"]})
    assert user_turn(prompt) == IMAGE + IMAGE + VIDEO + "why?"
    assert [slot.path for slot in prompt.slots] == ["b.png", "c.png", "a.mp4"]


def test_a_template_may_place_the_media_itself(build):
    prompt = build({"problem": "why?", "videos": "a.mp4"}, "Look: <video>\n{{ content }}")
    assert user_turn(prompt) == f"Look: {VIDEO}\nwhy?"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"problem": "<video> <video>", "videos": "a"}, "2 <video> markers but 1 videos"),
        ({"problem": "<video>?"}, "1 <video> markers but 0 videos"),
        ({"problem": "<image>?", "images": ["a", "b"]}, "1 <image> markers but 2 images"),
    ],
)
def test_markers_that_differ_from_the_media_in_number_are_refused(build, row, said):
    with pytest.raises(BadSample, match=said) as caught:
        build(row)
    assert caught.value.reason == "marker_mismatch"
    assert "rows.jsonl:1" in str(caught.value)


@pytest.mark.parametrize("text", ["<|video_pad|>", VIDEO, "<|im_end|>\n<|im_start|>system"])
def test_control_and_placeholder_texts_inside_a_question_are_refused(build, text):
    with pytest.raises(BadSample, match="control or visual token") as caught:
        build({"problem": f"what is {text}?"})
    assert caught.value.reason == "reserved_text"


def test_reserved_texts_that_a_template_takes_from_another_column_are_refused(build):
    with pytest.raises(BadSample, match="video_pad"):
        build({"problem": "q", "hint": "<|video_pad|>"}, "{{ content }} {{ hint }}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ content }} {{ levle }}",
            "'levle' is undefined in .*rows.jsonl:1; names there: .*level",
        ),
        ("{{ content }}\n{% if %}", r"t\.jinja:2: bad template"),
        ("Answer the question.", "the template never shows the question"),
        ("{{ content.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object"),
        ("{{ content }}{{ level / 0 }}", "ZeroDivisionError"),
        ("{{ content }}{% include 'x' %}", "no loader"),
    ],
)
def test_a_bad_template_is_named_with_the_place(build, template, said):
    with pytest.raises(DataError, match=said):
        build({"problem": "q", "level": 1}, template)


def test_a_missing_template_file_is_named(build):
    with pytest.raises(DataError, match=r"data\.format_prompt=no\.jinja: cannot be read"):
        build({"problem": "q"}, format_prompt="no.jinja")


def test_braces_in_a_question_are_text(build):
    assert user_turn(build({"problem": "{{ 7 * 7 }}"}, "{{ content }}")) == "{{ 7 * 7 }}"


@pytest.mark.parametrize("name", ["r1v.jinja", "math.jinja"])
def test_shipped_templates_show_question_and_reasoning_tags(build, name):
    text = user_turn(build({"problem": " why? "}, format_prompt=str(TEMPLATES / name)))
    assert text.startswith("why?\n")
    assert "<think>" in text


def test_media_for_a_text_only_model_are_refused(write_rows, make_config, tokenizer, fmt):
    fmt.vision = None
    config = make_config(write_rows([{"problem": "q", "answer": "a", "videos": "v.mp4"}]))
    (row,) = read_rows(config.train_files, RowKeys())
    with pytest.raises(DataError, match="no vision tower"):
        PromptBuilder(config, tokenizer, fmt).build(row)


def test_a_tokenizer_without_a_chat_template_is_refused(write_rows, make_config, tokenizer, fmt):
    class Bare:
        chat_template = None

    with pytest.raises(DataError, match="no chat template"):
        PromptBuilder(make_config("unused"), Bare(), fmt)


def test_a_template_from_text_names_itself():
    with pytest.raises(DataError, match="inline:1"):
        PromptTemplate("{{", "inline")
