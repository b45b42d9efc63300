import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from verl.data.rows import RowKeys, read_rows, strip_answer_tags
from verl.data.sources import DataError
from verl.utils.answers import score_answer

ROWS = [
    {"problem": "how many?", "answer": "<answer>\n B\n</answer>", "videos": "a.mp4", "level": 2},
    {"problem": "which?", "answer": 3, "problem_type": "spatial", "options": ["A. x", "B. y"]},
]


def read(*sources, **keys):
    return read_rows([str(source) for source in sources], RowKeys(**keys))


def write_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_columns(rows) -> dict[str, list]:
    names = sorted({name for row in rows for name in row})
    cells = {name: [row.get(name) for row in rows] for name in names}
    return {**cells, "answer": [str(answer) for answer in cells["answer"]]}


def write_parquet(path: Path, rows=ROWS) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(as_columns(rows)), path)
    return path


def save_dataset(folder: Path, splits=None) -> Path:
    import datasets

    one = datasets.Dataset.from_dict(as_columns(ROWS))
    kept = one if splits is None else datasets.DatasetDict(dict.fromkeys(splits, one))
    kept.save_to_disk(str(folder))
    return folder


def content(rows):
    return [(r.problem, r.answer, r.problem_type, r.options, r.videos) for r in rows]


EXPECTED = [
    ("how many?", "B", "", (), ("a.mp4",)),
    ("which?", "3", "spatial", ("A. x", "B. y"), ()),
]


@pytest.mark.parametrize(
    "make",
    [
        lambda d: write_jsonl(d / "rows.jsonl"),
        lambda d: write_parquet(d / "rows.parquet"),
        lambda d: save_dataset(d / "saved"),
        lambda d: f"{save_dataset(d / 'dict', ['train', 'test'])}@test",
        lambda d: f"{write_jsonl(d / 'val.jsonl').parent}@val",
        lambda d: f"{write_parquet(d / 'train-00000-of-00001.parquet').parent}@train",
        lambda d: write_jsonl(d / "only.jsonl").parent,
        lambda d: f"{write_jsonl(d / 'one.jsonl')}@train",
        lambda d: write_jsonl(d / "lines_named.json"),
    ],
)
def test_every_kind_of_source_gives_the_same_rows(tmp_path, make):
    assert content(read(make(tmp_path))) == EXPECTED


def test_a_json_file_holds_a_list_of_rows(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    assert content(read(tmp_path / "rows.json")) == EXPECTED


def test_shards_of_a_split_are_read_in_order_and_rows_say_where_they_stand(tmp_path):
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [{"problem": "b", "answer": "2"}])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [{"problem": "a", "answer": "1"}])
    rows = read(tmp_path)
    assert [row.problem for row in rows] == ["a", "b"]
    assert rows[1].where.endswith("train-00001-of-00002.parquet row 0")


def test_other_columns_become_extra_in_json_types_and_texts_may_hold_any_line_separator(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"problem": "a\u2028b", "answer": "x", "list": [1, {"k": None}]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    (read_row,) = read(path)
    assert read_row.problem == "a\u2028b"
    assert read_row.extra == {"list": [1, {"k": None}]}
    assert read_row.where == f"{path}:1"


def test_keys_are_configurable_and_media_may_be_a_path_a_list_or_a_record(tmp_path):
    rows = [
        {"q": "1", "gold": "a", "clip": "a.mp4"},
        {"q": "2", "gold": "b", "clip": ["b.mp4", {"path": "c.mp4"}]},
        {"q": "3", "gold": "c", "clip": None},
    ]
    got = read(write_jsonl(tmp_path / "r.jsonl", rows), problem="q", answer="gold", videos="clip")
    assert [row.videos for row in got] == [("a.mp4",), ("b.mp4", "c.mp4"), ()]
    assert [row.answer for row in got] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>\n  42 apples\n\n</answer>\n", "42 apples"),
        ("<think>a or b</think>\n<answer>\nC\n</answer>\nend", "C"),
        ("<answer><answer>D</answer></answer>", "D"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<ANSWER>x < y</ANSWER>", "x < y"),
        ("<answer>B", "B"),
        ("  plain \n", "plain"),
        ("<answer> </answer>", ""),
    ],
)
def test_answer_tags_are_stripped_over_lines_and_nesting(text, answer):
    assert strip_answer_tags(text) == answer


def test_ids_survive_a_move_of_the_folder_and_differ_between_files_of_one_name(tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl")
    alone = [[row.uid for row in read(folder / "train.jsonl")] for folder in folders]
    assert alone[0] == alone[1]
    both = [row.uid for row in read(*(folder / "train.jsonl" for folder in folders))]
    assert len(set(both)) == 4


def refusal(*sources, **keys) -> str:
    with pytest.raises(DataError) as caught:
        read(*sources, **keys)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"problem": "a", "answer": "b"}\n{"problem": "a", answer}\n', "r.jsonl:2:18: bad JSON"),
        (b'{"problem": "a",\n "answer": "b"}\n', "each line of a jsonl file must be one whole obj"),
        (b"", "is empty"),
        (b"\n\n", "holds no rows"),
        (b"\xef\xbb\xbf{}", "UTF-8 byte-order mark; save it as plain UTF-8: tail -c +4"),
        ('{"problem": "a"}'.encode("utf-16"), "UTF-16 byte-order mark; save it as plain UTF-8"),
        ('{"problem": "a"}'.encode("utf-16-le"), "looks like UTF-16"),
        (b'{"problem": "a"}\n{"p\xff": 1}', "r.jsonl:2: byte 20 is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"[1]\n", "r.jsonl:1: is a list"),
        (b'{"problem": "a", "answer": "b", "score": NaN}', "r.jsonl:1: column 'score' is nan"),
        (b'{"problem": "a", "answer": "b", "s": {"x": [Infinity]}}', "column 's.x' is inf"),
        (b'{"problem": "a", "answer": ["b"]}', "column 'answer' holds a list"),
        (b'{"problem": "a", "answer": "b", "videos": ""}', "column 'videos' holds an empty text"),
    ],
)
def test_a_damaged_file_is_named_with_place_and_remedy(tmp_path, content, said):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert said in refusal(tmp_path / "r.jsonl")


def test_a_broken_json_or_parquet_file_is_named_with_place(tmp_path):
    (tmp_path / "r.json").write_text('[\n {"problem": }\n]')
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "o.json").write_text('{"problem": {}}')
    assert "r.json:2:14: bad JSON" in refusal(tmp_path / "r.json")
    assert "not a readable parquet file" in refusal(tmp_path / "r.parquet")
    assert "expected a list of objects" in refusal(tmp_path / "o.json")


def test_missing_columns_name_the_first_rows_and_the_key_to_change(tmp_path):
    rows = [{"problem": "a", "answer": "x"}, {"problem": "b"}, {"problem": "c", "answer": "  "}]
    said = refusal(write_jsonl(tmp_path / "r.jsonl", rows))
    assert "2 of 3 rows have no 'answer' (data.answer_key=answer)" in said
    assert "r.jsonl:2" in said
    assert "r.jsonl:3" in said
    rows = [{"problems": "a", "answer": "x"}]
    assert "set data.prompt_key=problems" in refusal(write_jsonl(tmp_path / "s.jsonl", rows))


def test_images_given_as_bytes_are_refused_where_they_cannot_be_kept(tmp_path):
    rows = [{"problem": "a", "answer": "b", "images": [{"bytes": b"png", "path": "0.png"}]}]
    assert "instead of a file path" in refusal(write_parquet(tmp_path / "r.parquet", rows))


def test_a_source_given_twice_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl")
    assert "given twice" in refusal(path, path)


def test_unknown_splits_list_the_ones_there_are(tmp_path):
    folder = save_dataset(tmp_path / "dict", ["train", "test"])
    assert f"write one of {folder}@test, {folder}@train" in refusal(folder)
    assert "has no split 'dev'" in refusal(f"{folder}@dev")
    file = write_jsonl(tmp_path / "r.jsonl")
    assert "a single file has one split" in refusal(f"{file}@test")


def test_only_an_explicit_hub_id_is_looked_up_and_the_error_names_both(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "no such file" in refusal("owner/name")
    assert "no such file" in refusal(f"{tmp_path}/rows.jsonl@train")
    assert asked == []
    said = refusal("owner/name@train")
    assert asked == [("owner/name", "train")]
    assert str(Path("owner/name").absolute()) in said
    assert "hub as 'owner/name'" in said


def test_a_local_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    write_jsonl(Path("owner/name/train.jsonl"))
    assert content(read("owner/name@train")) == EXPECTED


def test_rows_whose_media_column_is_not_the_configured_one_are_reported(tmp_path, caplog):
    read(write_jsonl(tmp_path / "r.jsonl", [{"problem": "a", "answer": "b", "video": "v.mp4"}]))
    assert "to use column 'video' set data.video_key=video" in caplog.text


def test_a_mapping_of_options_with_a_gap_keeps_its_letters(tmp_path):
    options = {"A": "red", "B": None, "C": "green", "D": "blue"}
    (row,) = read(write_jsonl(tmp_path / "r.jsonl", [{**ROWS[0], "options": options}]))
    assert score_answer("<answer>C</answer>", "C", row.options).strict
    assert score_answer("<answer>green</answer>", "C", row.options).correct
    assert score_answer("<answer>C</answer>", "green", row.options).correct
    assert not score_answer("<answer>C</answer>", "D", row.options).correct
    assert score_answer("<answer>B</answer>", "C", row.options).extracted is None


@pytest.mark.parametrize("letters", ["AZ", "CAD", "Aa"])
def test_a_mapping_whose_letters_cannot_be_kept_names_the_row(tmp_path, letters: str):
    options = {letter: f"thing {i}" for i, letter in enumerate(letters)}
    path = write_jsonl(tmp_path / "r.jsonl", [{**ROWS[0], "options": options}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: column 'options' names its options"):
        read(path)
