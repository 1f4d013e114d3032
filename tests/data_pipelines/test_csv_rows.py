"""Text tables as spreadsheets, databases and hands write them: the same cells, a counted repair, a named row, or one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.converters.csv_rows import CsvRows, unlike
from data_pipelines.decoding import BadSampleError
from umm_zoo.errors import UserError

PLAIN = "image,caption\na.jpg,A dog\nb.jpg,A cat\n"
EXPECTED = [{"image": "a.jpg", "caption": "A dog"}, {"image": "b.jpg", "caption": "A cat"}]


def rows_of(folder: Path, content: bytes | str, **options: object) -> CsvRows:
    path = folder / "table.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return CsvRows(path, **options)  # type: ignore[arg-type]


def cells(rows: CsvRows) -> list[object]:
    found: list[object] = []
    for number in range(len(rows)):
        try:
            found.append(list(rows[number].values()))
        except BadSampleError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(
    "content",
    [
        PLAIN,
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace(",", " | "),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\n\n \n"),
        PLAIN.rstrip("\n"),
        "sep=;\n" + PLAIN.replace(",", ";"),
        b"\xef\xbb\xbf" + PLAIN.encode(),
        b"\xef\xbb\xbfsep=,\r\n" + PLAIN.encode(),
        PLAIN.encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.encode("utf-16-le"),
        PLAIN.encode("utf-32"),
        '"image","caption"\n"a.jpg","A dog"\n"b.jpg","A cat"\n',
        "image, caption \na.jpg, A dog\nb.jpg, A cat\n",
        'image, caption\na.jpg, "A dog"\nb.jpg, "A cat"\n',
        "image,caption\na.jpg,A dog,,\nb.jpg,A cat,\n",
    ],
)
def test_the_same_table_in_many_writings(tmp_path, content):
    rows = rows_of(tmp_path, content)
    assert [{name: str(cell).strip() for name, cell in rows[number].items()} for number in range(len(rows))] == EXPECTED
    assert rows.repairs == {} and rows[1] == rows[1]


@pytest.mark.parametrize(
    ("line", "cell", "repair"),
    [
        ('a.jpg,"A dog, and a cat"', "A dog, and a cat", False),
        ('a.jpg,"A ""big"" dog"', 'A "big" dog', False),
        ('a.jpg,"Two\nlines, and ""more"""', 'Two\nlines, and "more"', False),
        ('a.jpg,"Said \\"hi\\", went"', 'Said "hi", went', False),
        ('a.jpg,A 5" dog', 'A 5" dog', False),
        ('a.jpg,"A dog" barks', '"A dog" barks', True),
        ('a.jpg,"A dog', '"A dog', True),
        ("a.jpg,caf\u00e9 \U0001f415", "caf\u00e9 \U0001f415", False),
        ("a.jpg,A\0dog", "A\0dog", False),
        ("a.jpg,  3.5", "3.5", False),
        ("a.jpg,NaN", None, False),
        ("a.jpg,null", None, False),
        ("a.jpg,", None, False),
        ("a.jpg", None, True),
        ("a.jpg,None", "None", False),
    ],
)
def test_cells_and_quotes_cost_no_row_beside(tmp_path, line, cell, repair):
    rows = rows_of(tmp_path, f'image,caption\nz.jpg,first\n{line}\nb.jpg,A cat\nc.jpg,"A, cow"\n')
    assert cells(rows) == [["z.jpg", "first"], ["a.jpg", cell], ["b.jpg", "A cat"], ["c.jpg", "A, cow"]]
    assert list(rows.repairs) == ([1] if repair else [])


def test_an_unclosed_quote_swallows_nothing_even_where_a_later_one_closes_it(tmp_path):
    lines = [f"{number}.jpg,{text}" for number, text in enumerate(["one", '"two', "three", '"four', "five", '"six"', "seven"])]
    rows = rows_of(tmp_path, "\n".join(["image,caption", *lines]))
    assert [row[1] for row in cells(rows)] == ["one", '"two', "three", '"four', "five", "six", "seven"]


def test_a_row_of_too_many_cells_is_named_and_counted(tmp_path):
    rows = rows_of(tmp_path, "image,caption\na.jpg,A dog, running\nb.jpg,A cat\n")
    assert cells(rows) == [
        "row of too many cells: 3 cells for 2 columns; a text with a ',' in it needs quotes around it",
        ["b.jpg", "A cat"],
    ]


def test_commas_in_the_texts_do_not_hide_another_delimiter(tmp_path):
    rows = rows_of(tmp_path, 'image;caption\na.jpg;one, two, three\nb.jpg;one, two\nc.jpg;"one; two"\n')
    assert [row[1] for row in cells(rows)] == ["one, two, three", "one, two", "one; two"]


def test_other_encodings_are_named_or_read(tmp_path):
    content = "image,caption\na.jpg,caf\u00e9\nb.jpg,plain\n".encode("cp1252")
    with pytest.raises(
        UserError, match=r"found 1 lines that are not UTF-8, such as b'a.jpg,caf\\xe9', expected UTF-8, or an --encoding"
    ):
        rows_of(tmp_path, content)
    assert cells(rows_of(tmp_path, content, encoding="cp1252")) == [["a.jpg", "caf\u00e9"], ["b.jpg", "plain"]]
    first, second = cells(rows_of(tmp_path, content, encoding="utf-8"))
    assert str(first).startswith("text that is not UTF-8") and second == ["b.jpg", "plain"]
    with pytest.raises(UserError, match="--encoding: found 'klingon'"):
        rows_of(tmp_path, content, encoding="klingon")
    with pytest.raises(UserError, match="cannot be read as utf-16"):
        rows_of(tmp_path, PLAIN.encode("utf-16")[:-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("image,caption\n", "a header and no row"),
        ("a.jpg,A dog\nb.jpg,A cat\n", "its first line names an image, 'a.jpg', expected a header; --columns"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, content)


def test_columns_without_a_name_or_with_the_same(tmp_path):
    rows = rows_of(tmp_path, ",image,caption,caption\n0,a.jpg,A dog,A hound\n")
    assert rows[0] == {"column 1": "0", "image": "a.jpg", "caption": "A dog", "caption 2": "A hound"}
    assert unlike(["a", "a", "a 2"]) == ["a in column 1", "a in column 2", "a 2 in column 3"]
    assert rows_of(tmp_path, "a.jpg\tA dog\n", columns=["image", "caption"])[0] == {"image": "a.jpg", "caption": "A dog"}


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", ","])
def test_other_delimiters_in_every_text_do_not_win(tmp_path, delimiter):
    other = ";" if delimiter == "," else ","
    text = "".join(f"{number}.jpg{delimiter}one{other} two\n" for number in range(3))
    for header, columns in (("", ["image", "caption"]), (f"image{delimiter}caption\n", None)):
        rows = rows_of(tmp_path, header + text, columns=columns)
        assert rows[2] == {"image": "2.jpg", "caption": f"one{other} two"}
