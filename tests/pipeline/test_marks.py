"""Marks: what files of them may hold, what errors say, and which prompts they keep."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.marks import MarkEntry, marks_of, read_mark_list, read_marks, require_marked_shards
from pipeline.errors import SampleFailure, UserError
from pipeline.prompts.sample_prompts import SamplePrompts, with_files_read
from tests.helpers.corpus import demo_job

SHARD = "file:///data/0.tar"
HEADER = "shard,key,prompt_index,prompt,mark\n"


@pytest.fixture
def read(tmp_path):
    def run(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return read_mark_list(str(path))

    return run


def entry(mark, prompt_index=0, key="a", prompt=None):
    return MarkEntry(shard=SHARD, key=key, prompt_index=prompt_index, prompt=prompt, mark=mark)


def test_csv_and_json_hold_the_same_marks(read):
    text = 'a "quoted", long\nprompt'
    expected = (entry("good", 3, "a,b", text), entry("bad"))
    quoted = text.replace('"', '""')
    assert read("marks.csv", f'{HEADER}{SHARD},"a,b",3,"{quoted}",good\n{SHARD},a,0,,bad\n') == expected
    assert read("marks.json", json.dumps([each.model_dump() for each in expected])) == expected


def test_files_that_a_spreadsheet_saved_are_read(read):
    lines = f"note;mark;prompt_index;key;shard\r\nsee later; GOOD ;3;a;{SHARD}\r\n;;1;a;{SHARD}\r\n"
    assert read("marks.CSV", "\ufeff" + lines) == (entry("good", 3),)


@pytest.mark.parametrize("key", ["=1+1", "'=1+1", "-x", "@x", "'quoted'", "+"])
def test_keys_that_a_spreadsheet_takes_for_formulas_come_back_as_they_were(read, key):
    guarded = f"'{key}" if key.lstrip("'")[:1] in "=+-@" else key
    assert read("marks.csv", f"{HEADER}{SHARD},{guarded},0,,bad\n") == (entry("bad", key=key),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("marks.txt", "", "expected a file of marks named .csv or .json, found .txt"),
        ("marks.csv", "", "column.s. shard, key, prompt_index, mark not found"),
        ("marks.csv", "shard,key,mark\n", "prompt_index not found; the first line names 'shard,key,mark'"),
        ("marks.csv", f"{HEADER}{SHARD},a,0,,great\n", "line 2: mark: .*'good' or 'bad', found 'great'"),
        ("marks.csv", f"{HEADER}{SHARD},a,-1,,good\n{SHARD},a,x,,bad\n", "(?s)2 problem.*line 2: .*line 3"),
        ("marks.csv", f'{HEADER}{SHARD},"a', "line 2: unexpected end of data"),
        ("marks.json", "{}", "expected a list of marks, found {}"),
        ("marks.json", "[3]", "entry 1: "),
        ("marks.json", "[" * 100_000, "nested too deeply"),
        ("marks.json", "[", "Expecting value"),
        ("marks.json", json.dumps([{"mark": "bad"}]), "entry 1: shard: "),
    ],
)  # fmt: skip
def test_an_invalid_file_is_an_error_that_names_the_place(read, name, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read(name, text)
    assert name in str(raised.value)
    assert len(str(raised.value).splitlines()) < 15


def test_many_problems_fit_on_one_screen(read):
    with pytest.raises(UserError, match=r"50 problem.s.(.|\n)*and 40 more") as raised:
        read("marks.csv", HEADER + f"{SHARD},a,x,,good\n" * 50)
    assert len(str(raised.value).splitlines()) == 12


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"marks\.csv: cannot be read: No such file"):
        read_marks(str(tmp_path / "marks.csv"))


TOKENS = [
    *"\",;'\t\r\n\0{}[]:=",
    "\ufeff",
    "\u202e",
    "good",
    "bad",
    "mark",
    "shard",
    "9" * 5000,
    "1e9",
    "null",
    "-1",
]


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["csv", "json"]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 9), st.sampled_from(TOKENS)), max_size=8),
)
def test_a_damaged_file_is_read_or_refused_on_one_screen(tmp_path_factory, form, changes):
    entries = [entry("good", 3, "a,b", "a dog"), entry("bad", 0, "c")]
    text = json.dumps([each.model_dump() for each in entries], indent=1)
    if form == "csv":
        text = f'{HEADER}{SHARD},"a,b",3,a dog,good\n{SHARD},c,0,,bad\n'
    for place, length, token in changes:
        text = text[:place] + token + text[place + length :]
    path = tmp_path_factory.mktemp("marks") / f"marks.{form}"
    path.write_bytes(text.encode())
    try:
        marks = marks_of(read_mark_list(str(path)), "not-bad")
    except UserError as error:
        assert len(str(error)) < 3000
        assert len(str(error).splitlines()) < 15
    else:
        assert all(each.mark == "bad" for each in marks.acting.values())


def test_a_row_with_both_marks_is_refused():
    with pytest.raises(UserError, match=r"prompt 0 of sample a in .* is marked both good and bad"):
        marks_of([entry("good"), entry("bad")], "good")
    assert marks_of([entry("good"), entry("good")], "good").keeps(SHARD, "a", 0)


@pytest.mark.parametrize(("keep", "kept"), [("good", [True, False, False]), ("not-bad", [True, False, True])])
def test_unmarked_rows_are_kept_unless_only_good_ones_are(keep, kept):
    marks = marks_of([entry("good", 0), entry("bad", 1)], keep)
    assert [marks.keeps(SHARD, "a", index) for index in range(3)] == kept
    assert [marks.keeps(place, "a", 1) for place in (SHARD, "file:///data/1.tar")] == [
        False,
        keep == "not-bad",
    ]


def test_a_mark_of_another_prompt_is_an_error_and_a_cut_prompt_is_not():
    marks = marks_of([entry("bad", prompt="a dog on …")], "not-bad")
    assert not marks.keeps(SHARD, "a", 0, "a dog on grass")
    with pytest.raises(UserError, match="is 'a cat', but was marked bad as 'a dog on …'"):
        marks.keeps(SHARD, "a", 0, "a cat")


def job(**prompts):
    document = {"source": "captions", **prompts}
    return demo_job(["0.tar"], "out", input={"caption": "json:captions"}, prompts=document)


FIELDS = {"json": json.dumps({"captions": ["a dog", "a cat", "grass"]}).encode()}


@pytest.mark.parametrize(("keep", "kept"), [("good", ["a dog"]), ("not-bad", ["a dog", "grass"])])
def test_a_job_explains_the_prompts_that_its_marks_keep(tmp_path, keep, kept):
    path = tmp_path / "marks.csv"
    path.write_text(f"{HEADER}{SHARD},a,0,a dog,good\n{SHARD},a,1,a cat,bad\n")
    prompts = SamplePrompts(job(marks=str(path), keep_marked=keep))
    found = prompts.of(FIELDS, shard=SHARD, key="a").prompts
    assert [prompt.text for prompt in found] == kept
    assert [prompt.index for prompt in found] == [["a dog", "a cat", "grass"].index(text) for text in kept]
    unmarked = prompts.of(FIELDS, shard=SHARD, key="b").prompts
    assert len(unmarked) == (0 if keep == "good" else 3)


def test_marks_of_other_prompts_fail_the_sample():
    marks = [{"shard": SHARD, "key": "a", "prompt_index": 1, "prompt": "a cow", "mark": "bad"}]
    with pytest.raises(SampleFailure, match="marked bad as 'a cow'") as raised:
        SamplePrompts(job(marks=marks)).of(FIELDS, shard=SHARD, key="a")
    assert (raised.value.stage, raised.value.kind) == ("caption", "other_prompt_marked")


def test_classes_are_kept_by_marks_too(tmp_path):
    marks = [{"shard": SHARD, "key": "a", "prompt_index": 1, "mark": "bad"}]
    prompts = SamplePrompts(job(source="classes", classes=["dog", "cat", "cow"], marks=marks))
    assert [each.text for each in prompts.of({}, shard=SHARD, key="a").prompts] == ["dog", "cow"]
    assert prompts.of({}, shard=SHARD, key="b").prompts is prompts.every_class


def test_the_configuration_of_a_job_holds_the_content_of_its_marks(tmp_path):
    (tmp_path / "marks.json").write_text(json.dumps([entry("bad").model_dump()]))
    read = with_files_read(job(marks=str(tmp_path / "marks.json")).prompts)
    assert read.marks == (entry("bad"),)


def test_marks_of_no_shard_of_the_job_are_refused():
    require_marked_shards([entry("bad")], {SHARD, "s3://b/1.tar"})
    require_marked_shards([], {"s3://b/1.tar"})
    with pytest.raises(UserError, match=r"none of the 1 mark.*0\.tar; in the job: s3://b/1\.tar"):
        require_marked_shards([entry("bad")], {"s3://b/1.tar"})
