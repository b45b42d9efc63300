import pytest

from verl.data.dataset import PromptDataset, frame_sampling
from verl.data.rows import BadSample
from verl.data.sources import DataError
from verl.data.video import FrameSampling


@pytest.fixture
def open_dataset(write_rows, make_config, tokenizer, fmt, fake_media):
    def open_rows(rows, **settings):
        rows = [{"answer": "A", "problem": f"question {i}", **row} for i, row in enumerate(rows)]
        return PromptDataset(make_config(write_rows(rows), **settings), tokenizer, fmt)

    return open_rows


def test_a_sample_holds_expanded_ids_and_everything_a_reward_needs(
    open_dataset, write_video, tokenizer
):
    row = {
        "problem": "<video> which?",
        "answer": "<answer>\nB\n</answer>",
        "videos": write_video("a.mp4", "2 4 4"),
        "options": ["A. x", "B. y"],
        "problem_type": "spatial",
        "level": 3,
    }
    sample = open_dataset([row]).sample(0)
    assert (sample.question, sample.answer) == ("<video> which?", "B")
    assert (sample.problem_type, sample.options) == ("spatial", ("A. x", "B. y"))
    assert sample.extra == {"level": 3}
    assert [item.grid_thw for item in sample.media] == [(2, 4, 4)]
    one = "<|video_pad|>"
    assert tokenizer.decode(sample.prompt_ids) == sample.prompt_text.replace(one, one * 8)


def test_relative_media_start_at_the_configured_folder_or_the_data_file(
    open_dataset, write_video, tmp_path
):
    (tmp_path / "clips").mkdir()
    write_video("clips/a.mp4", "2 2 2")
    beside = open_dataset([{"videos": "clips/a.mp4"}]).sample(0)
    below = open_dataset([{"videos": "a.mp4"}], video_dir=str(tmp_path / "clips")).sample(0)
    assert beside.media[0].ref.path == below.media[0].ref.path == str(tmp_path / "clips/a.mp4")


def test_a_file_shared_by_rows_is_measured_once(open_dataset, write_video, fake_media):
    video = write_video("a.mp4")
    dataset = open_dataset([{"videos": video}, {"videos": [video, video]}])
    assert [len(dataset.sample(i).media) for i in (0, 1, 1)] == [1, 2, 2]
    assert fake_media == ["a.mp4"]


def test_the_length_of_a_prompt_counts_visual_tokens(open_dataset, write_video):
    dataset = open_dataset([{"videos": write_video("a.mp4", "50 4 4")}], max_prompt_length=200)
    with pytest.raises(BadSample, match=r"\d+ tokens, 200 of them visual") as caught:
        dataset.sample(0)
    assert caught.value.reason == "prompt_too_long"


def test_a_prompt_of_exactly_the_limit_is_kept(open_dataset):
    n_tokens = len(open_dataset([{}]).sample(0).prompt_ids)
    assert open_dataset([{}], max_prompt_length=n_tokens).sample(0)
    with pytest.raises(BadSample, match=f"max_prompt_length={n_tokens - 1}"):
        open_dataset([{}], max_prompt_length=n_tokens - 1).sample(0)


def bad_sample(dataset, index) -> BadSample:
    with pytest.raises(BadSample) as caught:
        dataset.sample(index)
    return caught.value


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent.mp4", "missing"),
        ("empty.mp4", "empty"),
        ("page.mp4", "not_media"),
        ("../outside.mp4", "outside_media_dir"),
        ("http://host/a.mp4", "remote_address"),
    ],
)
def test_bad_media_name_reason_row_path_and_remedy(open_dataset, tmp_path, path, reason):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<html>")
    dataset = open_dataset([{"videos": path}])
    bad = bad_sample(dataset, 0)
    assert bad.reason == reason
    assert "rows.jsonl:1" in str(bad)
    assert path.rpartition("/")[2] in bad.path
    with pytest.raises(DataError, match=r"repair the row, or .* data\.on_bad_sample=skip"):
        dataset.reject(bad)


def test_skipping_keeps_a_list_of_what_was_left_out(open_dataset):
    dataset = open_dataset(
        [{}, {"videos": "gone.mp4"}, {}], on_bad_sample="skip", max_bad_fraction=0.5
    )
    dataset.reject(bad_sample(dataset, 1))
    (entry,) = dataset.quarantine
    assert (entry.uid, entry.reason) == (dataset.rows[1].uid, "missing")
    assert entry.where.endswith("rows.jsonl:2")
    assert entry.path.endswith("gone.mp4")
    assert [dataset.is_quarantined(i) for i in range(3)] == [False, True, False]


def test_more_bad_rows_than_the_ceiling_stop_with_a_summary_by_reason(open_dataset):
    rows = [{"videos": f"{i}.mp4"} for i in range(2)] + [{"problem": "<video>"}] + [{}] * 7
    dataset = open_dataset(rows, on_bad_sample="skip", max_bad_fraction=0.2)
    for i in (0, 1):
        dataset.reject(bad_sample(dataset, i))
    with pytest.raises(DataError) as caught:
        dataset.reject(bad_sample(dataset, 2))
    said = str(caught.value)
    assert "3 of 10 rows cannot be used, more than data.max_bad_fraction=0.2" in said
    assert "2 missing (first" in said
    assert "1 marker_mismatch (first" in said


def test_over_long_prompts_are_dropped_without_counting_as_bad(open_dataset):
    dataset = open_dataset([{"problem": "x" * 500}, {}], max_prompt_length=200, max_bad_fraction=0)
    dataset.reject(bad_sample(dataset, 0))
    assert dataset.summary().startswith("1 prompt_too_long")


def test_over_long_prompts_are_an_error_when_they_are_not_to_be_dropped(open_dataset):
    dataset = open_dataset(
        [{"problem": "x" * 500}],
        max_prompt_length=200,
        filter_overlong_prompts=False,
        on_bad_sample="skip",
    )
    with pytest.raises(DataError, match=r"data\.filter_overlong_prompts=true"):
        dataset.reject(bad_sample(dataset, 0))


def test_the_quarantine_survives_a_resume(open_dataset):
    settings = {"on_bad_sample": "skip", "max_bad_fraction": 1.0}
    dataset, resumed = (open_dataset([{"videos": "x.mp4"}, {}], **settings) for _ in range(2))
    dataset.reject(bad_sample(dataset, 0))
    resumed.load_state_dict(dataset.state_dict())
    assert resumed.quarantine == dataset.quarantine
    assert resumed.is_quarantined(0)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"answer": "E", "options": ["red", "blue"]},
            "'E' is none of the options (A. red; B. blue)",
        ),
        ({"answer": "green", "options": ["red", "blue"]}, "'green' is none of the options"),
        ({"answer": "A, B", "options": ["red", "blue"]}, "'A, B' is none of the options"),
        ({"answer": "<answer>D</answer>", "options": {"A": "x", "B": "y"}}, "'D' is none"),
        ({"answer": "2", "options": ["A", "B"]}, "'2' is none of the options (A; B)"),
        ({"answer": "C", "problem": "Which?\nA. red\nB. blue"}, "'C' is none of the options"),
        ({"answer": "C", "options": [f"thing {i}" for i in range(30)]}, "'C' is none"),
    ],
)
def test_a_gold_answer_that_is_no_option_stops_before_the_first_sample(open_dataset, columns, said):
    with pytest.raises(DataError) as caught:
        open_dataset([{}, columns])
    assert "rows.jsonl:2: answer_not_offered: the answer " + said in str(caught.value)
    assert "data.on_bad_sample=skip" in str(caught.value)
    dataset = open_dataset([{}, columns], on_bad_sample="skip", max_bad_fraction=0.5)
    assert [dataset.is_quarantined(i) for i in range(2)] == [False, True]
    dataset.load_state_dict([])
    assert dataset.is_quarantined(1)


@pytest.mark.parametrize(
    "columns",
    [
        {"answer": "b", "options": ["red", "blue"]},
        {"answer": "(B)", "options": ["A. red", "B. blue"]},
        {"answer": "Blue.", "options": ["red", "blue"]},
        {"answer": "B. blue", "options": ["red", "blue"]},
        {"answer": "红色。", "options": ["红色", "蓝色"]},
        {"answer": "thing 28", "options": [f"thing {i}" for i in range(30)]},
        {"answer": "Caesar", "problem": "At (A) Rome or (B) Gaul, who came?"},
        {"answer": "C", "problem": "Which vitamin?"},
        {"answer": "anything", "options": []},
    ],
)
def test_a_gold_answer_is_a_letter_or_the_words_of_an_option(open_dataset, columns):
    assert open_dataset([columns]).quarantine == []


def test_no_file_at_all_is_an_error(make_config, tokenizer, fmt):
    with pytest.raises(DataError, match="no file is named"):
        PromptDataset(make_config("unused"), tokenizer, fmt, files=[])


def test_a_pixel_budget_upside_down_is_refused_at_once(open_dataset):
    with pytest.raises(ValueError, match="min_pixels must not exceed max_pixels"):
        open_dataset([{}], video_min_pixels=9999, video_max_pixels=99)


def test_frames_by_rate_win_over_frames_by_number(make_config):
    by_number = frame_sampling(make_config("x", num_video_frames=6))
    by_rate = frame_sampling(make_config("x", num_video_frames=6, fps=2.0, max_video_frames=3))
    assert by_number == FrameSampling(num_frames=6)
    assert by_rate == FrameSampling(fps=2.0, max_frames=3, min_frames=3)
