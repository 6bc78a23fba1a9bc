"""Decoding images, reading every form of dataset, and what a broken one is told."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from roma.data import (
    FORMATS,
    Columns,
    RomaDataset,
    RowError,
    decode_image,
    load_dataset_rows,
    write_digits,
)
from roma.data.rows import ArrowRows
from roma.data.synthetic.digits import digit_questions

PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = encode(Image.fromarray(PIXELS))


def row(**changes: Any) -> dict[str, Any]:
    return {"images": [{"bytes": PNG}], "problem": "<image> sum ?", "answer": "3", **changes}


def dataset(*rows: dict[str, Any], **options: Any) -> RomaDataset:
    return RomaDataset(ArrowRows(pa.Table.from_pylist(list(rows))), name="toy", **options)


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) for line in rows))
    return path


# ---- images


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (4, 6), 7), 7),
        (Image.new("1", (4, 6), 1), 255),
        (Image.new("RGBA", (4, 6), (9, 9, 9, 255)), 9),
        (Image.new("RGBA", (4, 6), (0, 0, 0, 0)), 255),
        (Image.new("LA", (4, 6), (0, 0)), 255),
        (Image.fromarray(np.full((6, 4), 0x8080, dtype=np.uint16)), 128),
        (Image.fromarray(np.full((6, 4), 65535, dtype=np.int32)), 255),
    ],
)
def test_every_mode_becomes_rgb(image: Image.Image, expected: int) -> None:
    for source in (image, encode(image, "TIFF" if image.mode == "I" else "PNG")):
        pixels = decode_image(source)
        assert pixels.shape == (6, 4, 3) and pixels.dtype == np.uint8
        assert (pixels == expected).all()


def test_palette() -> None:
    image = Image.fromarray(PIXELS).quantize(256)
    assert np.array_equal(decode_image(encode(image)), np.array(image.convert("RGB")))
    image.info["transparency"] = 0
    pixels, index = decode_image(encode(image)), np.array(image)
    assert (pixels[index == 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    image, exif = Image.fromarray(PIXELS), Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(image, exif=exif))
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}  # np.rot90 turns to the left
    expected = np.fliplr(PIXELS) if orientation in (2, 4, 5, 7) else PIXELS
    if orientation in (5, 7):
        expected = np.rot90(PIXELS.transpose(1, 0, 2), 0 if orientation == 5 else 2)
    else:
        expected = np.rot90(expected, turns[orientation])
    assert np.array_equal(upright, expected)


def test_cmyk_and_animation() -> None:
    assert decode_image(encode(Image.new("CMYK", (4, 6)), "JPEG")).shape == (6, 4, 3)
    frames = [Image.new("L", (4, 6), value) for value in (10, 200)]
    animation = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(animation) == 10).all()


DAMAGED = {
    kind: encode(Image.fromarray(np.tile(PIXELS, (4, 4, 1))), kind)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
}


@given(st.sampled_from(sorted(DAMAGED)), st.integers(0, 2**32 - 1))
def test_damaged_files_decode_or_raise_value_error(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(DAMAGED[kind])
    for _ in range(rng.integers(1, 8)):
        data[rng.integers(len(data))] = rng.integers(256)
    data = data[: rng.integers(len(data) + 1)] if rng.integers(2) else data
    try:
        pixels = decode_image(bytes(data))
    except ValueError as error:
        assert "image: expected an image that Pillow can read" in str(error)
    else:
        assert pixels.ndim == 3 and pixels.shape[2] == 3


# ---- the forms


def test_parquet_jsonl_and_saved_dataset_read_the_same(tmp_path: Path) -> None:
    read = []
    for format in FORMATS:
        write_digits(tmp_path / format, train=5, val=0, test=2, seed=3, format=format)
        for split in ("train", "test"):
            data = load_dataset_rows(tmp_path / format, split=split)
            read.append([(e.id, e.problem, e.answer, e.solution) for e in data])
            pixels = [example.load_images()[0] for example in data]
            expected = [question.image for question in digit_questions(split, len(data), seed=3)]
            assert np.array_equal(pixels, expected)
    assert read[0::2] == [read[0]] * 3 and read[1::2] == [read[1]] * 3
    again = load_dataset_rows(f"{tmp_path}/parquet@test")
    assert [e.answer for e in again] == [answer for _, _, answer, _ in read[1]]
    assert len(load_dataset_rows(tmp_path / "jsonl/test.jsonl")) == 2


def test_images_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(PNG)
    path = jsonl(
        tmp_path / "x.jsonl",
        row(images=["pictures/a.png"]) | {"id": "first"},
        "\n\n",
        row(images="pictures/a.png", answer=3),
        "\n",
        row(images=[{"path": "a.png"}, "a.png"], problem="<image><image> ?", answer=0.5),
    )
    with pytest.raises(RowError, match=r"row 2: images: expected an image file, got no file at"):
        load_dataset_rows(path)
    (tmp_path / "a.png").write_bytes(PNG)
    data = load_dataset_rows(path)
    assert [example.id for example in data] == ["first", "1", "2"]
    assert [example.answer for example in data] == ["3", "3", "0.5"]
    assert [len(example.images) for example in data] == [1, 1, 2]
    for example in data:
        assert all(np.array_equal(image, PIXELS) for image in example.load_images())
    (tmp_path / "b.png").write_bytes(PNG)
    moved = jsonl(tmp_path / "pictures/y.jsonl", row(images=["b.png"]))
    assert len(load_dataset_rows(moved, image_dir=tmp_path)) == 1
    with pytest.raises(RowError, match=r"no file at .*pictures/b\.png; correct the path"):
        load_dataset_rows(moved)


def test_a_datasets_object_with_decoded_images() -> None:
    datasets = pytest.importorskip("datasets")
    table = {"images": [[{"bytes": PNG, "path": None}]], "problem": ["<image>"], "answer": ["1"]}
    images = datasets.List(datasets.Image())
    data = RomaDataset(datasets.Dataset.from_dict(table).cast_column("images", images))
    assert isinstance(data[0].images[0], Image.Image)
    assert np.array_equal(data[0].load_images()[0], PIXELS)


def test_shards_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for shard in range(2):
        table = pa.Table.from_pylist([row(answer=str(shard))])
        pq.write_table(table, tmp_path / f"data/train-{shard:05}-of-00002.parquet")
    assert [example.answer for example in load_dataset_rows(tmp_path)] == ["0", "1"]
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="split 'train': expected one file, or all shards"):
        load_dataset_rows(tmp_path)


def test_positions_and_slices() -> None:
    data = dataset(*(row(answer=str(i)) for i in range(5)))
    assert [example.answer for example in data[1:3]] == ["1", "2"]
    assert data[-1].answer == "4" and data[np.int64(2)].answer == "2"
    with pytest.raises(IndexError):
        data[5]


def test_own_column_names_and_solution() -> None:
    own = {"image": {"bytes": PNG}, "question": "<image>", "label": 4, "steps": "so 4"}
    columns = Columns(images="image", problem="question", answer="label", solution="steps")
    example = dataset(own, columns=columns)[0]
    assert (example.problem, example.answer, example.solution) == ("<image>", "4", "so 4")
    assert dataset(row())[0].solution is None


# ---- what is wrong


def test_missing_column() -> None:
    broken = {key: value for key, value in row().items() if key != "answer"} | {"answers": "3"}
    with pytest.raises(ValueError, match=r"toy: expected a column 'answer', got .*mean 'answers'"):
        dataset(broken)
    with pytest.raises(ValueError, match=r"expected a column 'image', .*mean 'images'\?"):
        dataset(row(), columns=Columns(images="image"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "problem: expected <image> 0 times, as there are images, got it 1 times"),
        ({"images": None}, "problem: expected <image> 0 times"),
        ({"problem": "<image> <video>"}, "problem: expected no <video>, got one"),
        ({"problem": "sum ?"}, "problem: expected <image> 1 times, as there are images, got it 0"),
        ({"problem": "<image><image>"}, "problem: expected <image> 1 times.* got it 2 times"),
        ({"images": [{"bytes": PNG}] * 2}, "problem: expected <image> 2 times"),
        ({"images": [{"bytes": None}]}, "image: expected bytes, a path, .* got None"),
        ({"problem": None}, "problem: expected text, got None"),
        ({"answer": "  "}, "answer: expected text or a number that is not empty, got '  '"),
        ({"answer": None}, "answer: expected text or a number that is not empty, got None"),
    ],
)
def test_a_broken_row_is_named_or_skipped(changes: dict[str, Any], message: str) -> None:
    rows = [row(), row(**changes), row(answer="5")]
    with pytest.raises(RowError, match=f"toy, row 1: {message}.*skip_broken=True"):
        dataset(*rows)
    data = dataset(*rows, skip_broken=True)
    assert [example.id for example in data] == ["0", "2"]
    ((index, reason),) = data.skipped
    assert index == 1 and reason.startswith("toy, row 1: ")


def test_an_image_that_is_none() -> None:
    rows = [row(), row(images=[{"bytes": b"hello, I am text"}]), row(images=[{"bytes": PNG[:50]}])]
    data = dataset(*rows)
    message = r"toy, row 1: images\[0\]: expected an image that Pillow can read, got 16 bytes that"
    with pytest.raises(RowError, match=message):
        data[1].load_images()
    with pytest.raises(RowError, match=r"toy, row 2: .* got 50 bytes .*truncated"):
        data[2].load_images()
    assert [index for index, _ in dataset(*rows, skip_broken=True).skipped] == [1, 2]


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    good = json.dumps(row(images=["a.png"])) + "\n"
    path = jsonl(
        tmp_path / "x.jsonl", '{"images": [\n', good, "[1, 2]\n", '{"images": ["a.png"]}\n'
    )
    with pytest.raises(RowError, match="row 0: line: expected a JSON object"):
        load_dataset_rows(path)
    data = load_dataset_rows(path, skip_broken=True)
    assert [index for index, _ in data.skipped] == [0, 2, 3] and data[0].id == "1"
    path.write_text("{\n")
    with pytest.raises(ValueError, match="expected a column 'images', got the columns"):
        load_dataset_rows(path)


def test_empty_datasets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        load_dataset_rows(jsonl(tmp_path / "x.jsonl"))
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="expected at least one row, got none"):
        load_dataset_rows(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="expected at least one usable row, got 1 broken ones"):
        dataset(row(answer=""), skip_broken=True)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="path: expected a dataset file or folder"):
        load_dataset_rows(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"path: expected a \.parquet file, .* with none"):
        load_dataset_rows(tmp_path)
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"path: expected a \.parquet or \.jsonl file.*x\.csv"):
        load_dataset_rows(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="path: expected parquet files"):
        load_dataset_rows(tmp_path / "x.parquet")
    write_digits(tmp_path / "digits", train=1, val=1, test=1)
    with pytest.raises(
        ValueError, match=r"split: expected one of .* got 'tests'; did you mean 'te"
    ):
        load_dataset_rows(tmp_path / "digits", split="tests")
    with pytest.raises(ValueError, match=r"split: expected one of .*'train'.* got None"):
        load_dataset_rows(tmp_path / "digits")
    with pytest.raises(ValueError, match=r"split: expected None, as .* is one split, got 'val'"):
        load_dataset_rows(tmp_path / "digits/val.parquet", split="val")
    write_digits(tmp_path / "digits", train=1, val=0, test=0, format="jsonl")
    with pytest.raises(ValueError, match=r"split 'train': .* got train\.jsonl, train\.parquet"):
        load_dataset_rows(tmp_path / "digits", split="test")
