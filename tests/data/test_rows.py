"""Data as it is: large files, text alone, public columns, templates of prompts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma.data import Columns, Example, RomaDataset, RowError, load_dataset_rows
from roma.data.rows import PRESENT, ArrowRows, JsonRows, ParquetRows

BYTES = b"pixels"
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Listed(list[dict[str, Any]]):
    """Rows without a scan of their own: each is read whole."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def table(cells: list[Any], kind: Any, **columns: list[Any]) -> pa.Table:
    marks = [
        "<image>" * (len(cell) if isinstance(cell, list) else cell is not None) for cell in cells
    ]
    given = {
        "images": pa.array(cells, kind),
        "problem": marks,
        "answer": [str(i) for i in range(len(cells))],
        **columns,
    }
    return pa.table(given)


def described(data: RomaDataset) -> list[Any]:
    return [(e.id, e.images, e.problem, e.answer, e.question) for e in data]


def forms(made: pa.Table, folder: Path, **options: Any) -> list[ArrowRows | ParquetRows | Listed]:
    """The same rows as parquet in two files of small groups, as a table, and as plain rows."""
    half, files = made.num_rows // 2, [folder / "a.parquet", folder / "b.parquet"]
    pq.write_table(made.slice(0, half), files[0], row_group_size=2, **options)
    pq.write_table(made.slice(half), files[1], row_group_size=3, **options)
    return [ParquetRows(files), ArrowRows(made), Listed(made.to_pylist())]


A, B = {"bytes": BYTES, "path": "a.png"}, {"bytes": BYTES, "path": None}
CELLS: dict[str, tuple[list[Any], Any]] = {
    "hub": ([[A], [B], [A, B], [], None, [B], [A]], pa.list_(STRUCT)),
    "hub, all": ([[A], [B], [A, B], [A], [B], [B], [A]], pa.list_(STRUCT)),
    "hub, large": ([[A], [B], [A, B], [], None, [B], [A]], pa.large_list(STRUCT)),
    "one": ([A, B, None, A, B, A, A], STRUCT),
    "bytes": ([[BYTES], [], None, [BYTES] * 2, [BYTES], [BYTES], []], pa.list_(pa.binary())),
    "large bytes": ([BYTES, None, BYTES, BYTES, BYTES, BYTES, BYTES], pa.large_binary()),
}


@pytest.mark.parametrize("name", sorted(CELLS))
@pytest.mark.parametrize("statistics", [True, False])
def test_every_form_reads_the_same(name: str, statistics: bool, tmp_path: Path) -> None:
    cells, kind = CELLS[name]
    rows = forms(table(cells, kind), tmp_path, write_statistics=statistics)
    first, *others = [described(RomaDataset(own)) for own in rows]
    assert [len(images) for _, images, *_ in first] == [
        len(c) if isinstance(c, list) else int(c is not None) for c in cells
    ]
    assert {image for _, images, *_ in first for image in images} == {BYTES}
    assert others == [first, first]


LOST = {"bytes": None, "path": None}


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([[A], [B], [], [LOST], None, [A]], pa.list_(STRUCT)),
        ([[A], [B], [A], [LOST], [B], [A]], pa.list_(STRUCT)),
        ([A, B, A, LOST, A, B], STRUCT),
        ([[A], [B], [], [None], None, [A]], pa.list_(STRUCT)),
        ([[BYTES], [], [BYTES], [None], [BYTES], []], pa.list_(pa.binary())),
    ],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_a_missing_image_is_found_before_the_first_step(
    cells: list[Any], kind: Any, statistics: bool, tmp_path: Path
) -> None:
    for rows in forms(table(cells, kind), tmp_path, write_statistics=statistics):
        with pytest.raises(RowError, match=r"toy, row 3: image: expected bytes, a path"):
            RomaDataset(rows, name="toy")


def test_checking_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of a file where all are there, nor of one with questions of text alone."""
    read: list[list[str]] = []
    whole = pq.ParquetFile.iter_batches

    def iter_batches(self: Any, *args: Any, columns: list[str], **options: Any) -> Any:
        read.append(columns)
        return whole(self, *args, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    path = tmp_path / "x.parquet"
    for name in ("hub", "hub, all", "one"):
        cells, kind = CELLS[name]
        extra = {"notes": ["x"] * len(cells), "id": [f"i{i}" for i in range(len(cells))]}
        pq.write_table(table(cells, kind, **extra), path, row_group_size=2)
        read.clear()
        data = RomaDataset(ParquetRows([path]))
        leaf = "images.path" if kind is STRUCT else "images.list.element.path"
        assert {column for columns in read for column in columns} == {
            "problem",
            "answer",
            "id",
            leaf,
        }
        assert data[0].images == (BYTES,) and data[0].id == "i0"


def test_a_present_image_is_not_a_path(tmp_path: Path) -> None:
    """The hub's rows have bytes and the name of the file that they came from."""
    pq.write_table(table([[A]], pa.list_(STRUCT)), tmp_path / "x.parquet")
    (row,) = ParquetRows([tmp_path / "x.parquet"]).only(["images"], "images").scan()
    assert row == {"images": [{"bytes": PRESENT, "path": "a.png"}]}


def test_the_last_row_groups_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    whole = pq.ParquetFile.read_row_group

    def read_row_group(self: Any, group: int, **options: Any) -> Any:
        groups.append(group)
        return whole(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    cells = [[{"bytes": bytes([i]) * 1000, "path": None}] for i in range(8)]
    pq.write_table(table(cells, pa.list_(STRUCT)), tmp_path / "x.parquet", row_group_size=2)
    rows = ParquetRows([tmp_path / "x.parquet"], cache_bytes=5000)  # two groups of about 2000
    for index in (0, 1, 2, 0, 3, 4, 0, 2, -1):
        if index < 0:
            with pytest.raises(IndexError):
                rows[index]
        else:
            assert rows[index]["images"][0]["bytes"] == bytes([index]) * 1000
    assert groups == [0, 1, 2, 0, 1]
    groups.clear()
    one = ParquetRows([tmp_path / "x.parquet"], cache_bytes=0)
    assert [one[i]["answer"] for i in (0, 1, 2)] == ["0", "1", "2"] and groups == [0, 1]


def test_a_narrowed_table_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    made = table([[A], [B]], pa.list_(STRUCT), other=["x", "y"])
    pq.write_table(made, tmp_path / "x.parquet")
    for rows in (ArrowRows(made), ParquetRows([tmp_path / "x.parquet"])):
        assert RomaDataset(rows)[0].answer == "0"
        assert rows[1]["other"] == "y" and rows.column_names[-1] == "other"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    files = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    pq.write_table(pa.table({"a": ["x"]}), files[0])
    pq.write_table(pa.table({"a": [1]}), files[1])
    with pytest.raises(
        ValueError, match=r"same columns, got .*b\.parquet with a: int64, and .*a: s"
    ):
        ParquetRows(files)
    made = table([[A]] * 4, pa.list_(STRUCT))
    pq.write_table(made, files[0], compression="snappy")
    data = bytearray(files[0].read_bytes())
    footer = pq.read_metadata(files[0]).row_group(0).column(2)
    data[footer.data_page_offset : footer.data_page_offset + 12] = b"\xff" * 12
    files[0].write_bytes(data)
    with pytest.raises(ValueError, match=r"parquet files that can be read, got .*a\.parquet"):
        RomaDataset(ParquetRows([files[0]]))


def test_lines_are_read_where_they_stand(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(b'{"a": 1}\n\n  \n{"a": "\xc3\xbc"}')
    second.write_bytes(b'\r\n{"b": 3}\r\n[]\n')
    rows = JsonRows([first, second])
    assert len(rows) == 4 and rows.column_names == ["a", "b"]
    assert [rows[i] for i in (2, 0, 1)] == [{"b": 3}, {"a": 1}, {"a": "ü"}]
    with pytest.raises(ValueError, match="line: expected a JSON object, got list"):
        rows[3]


SCRIPT = Path(__file__).parents[1] / "support" / "many_rows.py"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data() -> None:
    """Of 160 MiB of images, a cache of 4 MiB: checked, passed through, drawn at random.

    What may grow: the cache, a row group and its Python objects while it is read, and what the
    allocator keeps of both: ten times the cache is ample, and a quarter of the file.
    """
    made = subprocess.run(
        [sys.executable, str(SCRIPT), "160000", str(4 * 2**20)], capture_output=True, text=True
    )
    assert not made.returncode, made.stderr
    found = json.loads(made.stdout)
    assert found["file_mib"] > 160 and max(found["grown_mib"]) < 40


# ---- what stands in the rows


def test_questions_of_text_alone(tmp_path: Path) -> None:
    lines = [
        {"images": [], "problem": "3 + 5 ?", "answer": "8"},
        {"problem": "1 + 1 ?", "answer": "2", "videos": []},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    data = load_dataset_rows(path)
    assert [example.images for example in data] == [(), ()]
    assert data[0].load_images() == [] and data[1].problem == "1 + 1 ?"


@pytest.mark.parametrize("name", ["videos", "video"])
def test_videos_are_refused_by_name(name: str) -> None:
    made = table([[A], [A]], pa.list_(STRUCT), **{name: [[], ["a.mp4"]]})
    for rows in (ArrowRows(made), Listed(made.to_pylist())):
        with pytest.raises(RowError, match=rf"row 1: {name}: expected no video, got one; .*images"):
            RomaDataset(rows)


HUB = pa.list_(STRUCT)
PUBLIC: dict[str, Callable[[], pa.Table]] = {
    "geometry3k": lambda: pa.table(
        {"images": pa.array([[A]], HUB), "problem": ["<image>Find x."], "answer": ["3"]}
    ),
    "MMRL30k": lambda: pa.table(
        {"images": pa.array([[A]], HUB), "problem": ["<image>Find x."], "answer": ["3"]}
    ),
    "ViRL39K": lambda: pa.table(
        {
            "question": ["<image>Find x."],
            "answer": [r"\boxed{3}"],
            "PassRate_32BTrained": [0.5],
            "PassRate_7BBase": [-1.0],
            "category": ["(GradeSchool) Geometric"],
            "source": ["Processed"],
            "qid": ["Processed-1"],
            "image": [["images/a.png"]],
        }
    ),
    "MMK12": lambda: pa.table(
        {
            "id": ["7"],
            "question": ["<image>Find x."],
            "answer": ["3"],
            "subject": ["math"],
            "image": pa.array([A], STRUCT),
        }
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_datasets_need_no_configuration(name: str, tmp_path: Path) -> None:
    """Columns as their cards, and the programs that read them, have them."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(BYTES)
    pq.write_table(PUBLIC[name](), tmp_path / "x.parquet")
    data = load_dataset_rows(tmp_path / "x.parquet")
    (example,) = data
    assert example.problem == "<image>Find x." and "3" in example.answer
    assert example.images in ((BYTES,), (tmp_path / "images/a.png",))
    ids = {"ViRL39K": "Processed-1", "MMK12": "7"}
    assert example.id == ids.get(name, "0")
    if name == "ViRL39K":
        assert data.columns == Columns(images="image", problem="question", id="qid")


def test_a_name_of_ones_own_is_not_replaced() -> None:
    made = table([[A]], pa.list_(STRUCT)).rename_columns(["image", "question", "answer"])
    with pytest.raises(ValueError, match="expected a column 'picture'"):
        RomaDataset(ArrowRows(made), columns=Columns(images="picture"))
    both = made.append_column("problem", pa.array(["<image> p"]))
    assert RomaDataset(ArrowRows(both))[0].problem == "<image> p"


# ---- templates


def test_a_template_makes_the_prompt(tmp_path: Path) -> None:
    template = tmp_path / "math.jinja"
    template.write_text(
        "\n{{ content | trim }} Think in <think> </think>, answer in \\boxed{}.\n\n"
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table([[A], [A, B], []], pa.list_(STRUCT)), path)
    data = load_dataset_rows(path, format_prompt=template)
    end = " Think in <think> </think>, answer in \\boxed{}."
    assert [example.problem for example in data] == ["<image>" + end, "<image><image>" + end, end]
    assert [example.question for example in data] == ["<image>", "<image><image>", ""]
    assert Example("0", (), "3 ?", "3").question == "3 ?"


def test_a_template_may_place_the_image(tmp_path: Path) -> None:
    template = tmp_path / "math.jinja"
    template.write_text("<image>{{ content }}")
    made = table([[A]], pa.list_(STRUCT)).set_column(1, "problem", pa.array(["sum ?"]))
    pq.write_table(made, tmp_path / "x.parquet")
    with pytest.raises(RowError, match="expected <image> 1 times"):
        load_dataset_rows(tmp_path / "x.parquet")
    assert load_dataset_rows(tmp_path / "x.parquet", format_prompt=template)[0].problem == (
        "<image>sum ?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ content ", r"expected a jinja template of `content`, got .*math\.jinja"),
        ("{{ content }} {{ question }}", "'question' is undefined"),
        ("Think first.", r"expected {{ content }} in it, got .*math\.jinja without"),
        ("{{ content.__class__.mro() }}", "expected a jinja template"),
    ],
)
def test_a_bad_template(text: str, message: str, tmp_path: Path) -> None:
    template = tmp_path / "math.jinja"
    template.write_text(text)
    pq.write_table(table([[A]], pa.list_(STRUCT)), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=rf"data\.format_prompt: .*{message}"):
        load_dataset_rows(tmp_path / "x.parquet", format_prompt=template)
    with pytest.raises(FileNotFoundError, match=r"data\.format_prompt: expected a jinja file"):
        load_dataset_rows(tmp_path / "x.parquet", format_prompt="none.jinja")
