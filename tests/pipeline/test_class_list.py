"""Classes files: what they may hold, and what is said of what they may not."""

from functools import partial

import pytest
import yaml

from pipeline.config.classes import ClassEntry, class_entries, read_class_list
from pipeline.errors import UserError
from tests.helpers.object_servers import FolderHandler, serving


@pytest.fixture
def read(tmp_path):
    def run(name, text):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return read_class_list(str(path))

    return run


def test_line_i_of_a_text_file_names_class_i(read):
    entries = read("classes.txt", "dog\nhot dog \r\n\tZaunkönig\n\n")
    assert [(entry.class_id, entry.name) for entry in entries] == [
        (1, "dog"),
        (2, "hot dog"),
        (3, "Zaunkönig"),
    ]
    assert read("marked #2?.TXT", "\ufeffdog") == entries[:1]


def test_a_list_on_a_web_server_is_read_and_no_secret_of_its_url_is_reported(tmp_path, only_loopback):
    (tmp_path / "classes.yaml").write_text("- dog\n- cat")
    (tmp_path / "wrong.yaml").write_text("- dog\n- dog")
    with serving(partial(FolderHandler, directory=str(tmp_path))) as port:
        entries = read_class_list(f"http://127.0.0.1:{port}/classes.yaml?X-Amz-Signature=hunter2")
        with pytest.raises(UserError, match="entry 2") as raised:
            read_class_list(f"http://user:hunter2@127.0.0.1:{port}/wrong.yaml?X-Amz-Signature=hunter2")
    assert [entry.name for entry in entries] == ["dog", "cat"]
    assert "hunter2" not in str(raised.value)


def test_a_yaml_list_holds_names_or_mappings(read):
    document = [
        "dog",
        {"name": "cat", "id": 7, "synonyms": ["kitty"], "plurals": ["kits"], "templates": ["a {} at home"]},
        {"name": "cow"},
    ]
    assert read("classes.yaml", yaml.safe_dump(document)) == (
        ClassEntry(class_id=1, name="dog"),
        ClassEntry(
            class_id=7, name="cat", synonyms=("kitty",), plurals=("kits",), templates=("a {} at home",)
        ),
        ClassEntry(class_id=3, name="cow"),
    )


def test_what_a_job_wrote_down_is_read_as_the_same_classes():
    entries = class_entries(["dog", {"name": "cat", "id": 32767, "synonyms": ["kitty"]}])
    assert class_entries([entry.model_dump(mode="json") for entry in entries]) == entries


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "dog\n\ncat", ["line 2: name", "at least 1 character"]),
        ("c.txt", "dog\ncat\nDog", ["line 3: name 'Dog' is also that of line 1"]),
        ("c.txt", "\n\n", ["names no class"]),
        ("c.txt", "dog\n" * 100, ["99 problem(s)", "line 2:", "and 89 more"]),
        ("c.yaml", "- dog\n- {name: cat, id: 1}", ["entry 2: id 1 is also that of entry 1"]),
        ("c.yaml", "- {name: cat, id: 0}", ["entry 1: id: ", "greater than or equal to 1, got 0"]),
        ("c.yaml", "- {name: cat, id: 32768}", ["entry 1: id: ", "less than or equal to 32767, got 32768"]),
        ("c.yaml", "- {name: cat, id: '3'}", ["entry 1: id: ", "got '3'"]),
        ("c.yaml", "- {name: no}", ["entry 1: name: ", "valid string, got False"]),
        (
            "c.yaml",
            "- {name: cat, synonym: [kitty]}",
            ["entry 1: synonym: unknown key; known: id, name, syn"],
        ),
        ("c.yaml", "- {name: cat, synonyms: kitty}", ["entry 1: synonyms: ", "got 'kitty'"]),
        ("c.yaml", "- {name: cat, templates: [a photo]}", ["entry 1: templates.0: expected a text with {}"]),
        ("c.yaml", "- dog\n- 3", ["entry 2: expected a name or a mapping, got 3"]),
        ("c.yaml", "dog: 1", ["expected a list of classes, got dict"]),
        ("c.yaml", "- [", ["is not valid YAML", "line 1"]),
        ("c.csv", "dog", ["expected a classes file named .txt, .yaml or .yml, got .csv"]),
    ],
)
def test_a_wrong_entry_is_named_with_its_file_and_place(read, name, text, message):
    with pytest.raises(UserError) as raised:
        read(name, text)
    assert name in str(raised.value)
    for part in message:
        assert part in str(raised.value)


def test_a_file_that_is_not_there_or_not_text_is_an_input_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        read_class_list(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"latin\.txt: is not text in UTF-8: .* at byte 3"):
        read_class_list(str(tmp_path / "latin.txt"))
