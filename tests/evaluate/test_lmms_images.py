"""Images of lmms-eval's messages, without lmms-eval: keys, forms, refusals."""

import base64
import http.server
import io
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from roma.evaluate.conditions import Cell
from roma.evaluate.lmms_eval.images import (
    Degrading,
    Documents,
    Origin,
    cell_of,
    digest_of,
    read_pixels,
    read_table,
    require_images,
)
from roma.views import CORRUPTIONS, degrade, seed_for

NOISE = Cell("seen", "gaussian_noise", 2)
PICTURES = [np.full((24, 40, 3), 40 + 20 * i, np.uint8) for i in range(4)]
TASKS = {"a": {"test": [{"images": [0, 1]}, {"images": [2]}]}, "b": {"test": [{"images": [2]}]}}


def messages(doc, **rounds):
    """A system message of plain text, then images and text in turn."""
    content = [{"type": "text", "text": "look"}]
    content += [{"type": "image", "url": Image.fromarray(PICTURES[i])} for i in doc["images"]]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    return (chat, False, ["so"], None) if rounds else chat


def degrading(task, id, cell=NOISE, seed=0, **given):
    origin = Origin(task, "test", id)
    functions = {
        Origin(name, "test", i): messages
        for name, splits in TASKS.items()
        for i in range(len(splits["test"]))
    }
    given = {"own": messages, "functions": functions} | given
    return Degrading(origin=origin, cell=cell, seed=seed, corruptions=CORRUPTIONS, **given)


def shown(chat):
    return [np.asarray(part["url"]) for part in chat[1]["content"] if part["type"] == "image"]


def expected(picture, task, id, position, seed=0):
    own = seed_for(seed, task, id, position, "gaussian_noise", 2)
    return degrade(PICTURES[picture], "gaussian_noise", level=2, seed=own)


def test_the_key_of_an_image_is_its_document_and_its_place():
    documents = Documents(TASKS)
    first, second = shown(degrading("a", 0)(documents["a"]["test"][0]))
    np.testing.assert_array_equal(first, expected(0, "a", 0, 0))
    np.testing.assert_array_equal(second, expected(1, "a", 0, 1))
    (here,) = shown(degrading("a", 1)(documents["a"]["test"][1]))
    (there,) = shown(degrading("b", 0)(documents["b"]["test"][0]))  # the same picture
    (other,) = shown(degrading("b", 0, seed=1)(documents["b"]["test"][0]))
    assert not np.array_equal(here, there) and not np.array_equal(there, other)


def test_what_is_no_image_stays_as_it_is_and_nothing_is_changed_in_place():
    document = Documents(TASKS)["a"]["test"][0]
    before = messages(document)
    made = degrading("a", 0, own=lambda doc: before)(document)
    assert made[0] == {"role": "system", "content": "be brief"}
    assert made[1]["content"][0] == {"type": "text", "text": "look"}
    np.testing.assert_array_equal(shown(before)[0], PICTURES[0])


def test_a_request_that_is_handed_anothers_document_takes_the_others_function_and_key():
    def wrong(doc):
        raise AssertionError("the first request's function was used for another's document")

    document = Documents(TASKS)["b"]["test"][0]
    (view,) = shown(degrading("a", 0, own=wrong)(document))
    np.testing.assert_array_equal(view, expected(2, "b", 0, 0))


def test_rounds_keep_what_comes_with_their_messages():
    document = Documents(TASKS)["a"]["test"][0]
    made = degrading("a", 0)(document, round_idx=1, previous_output=["x"])
    assert made[1:] == (False, ["so"], None)
    np.testing.assert_array_equal(shown(made[0])[0], expected(0, "a", 0, 0))
    ended = degrading("a", 0, own=lambda doc, **_: (None, True, [], None))(document, round_idx=2)
    assert ended == (None, True, [], None)


def test_threads_do_not_change_a_pixel():
    documents = Documents(TASKS)
    calls = [("a", 0), ("a", 1), ("b", 0)] * 8

    def one(call):
        task, id = call
        return shown(degrading(task, id)(documents[task]["test"][id]))

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(one, calls))
    for call, views in zip(calls, made, strict=True):
        for view, alone in zip(views, one(call), strict=True):
            np.testing.assert_array_equal(view, alone)


def test_a_resize_comes_before_the_noise():
    document = Documents(TASKS)["a"]["test"][1]
    (view,) = shown(degrading("a", 1, resize=lambda image: image[::2, ::2])(document))
    own = seed_for(0, "a", 1, 0, "gaussian_noise", 2)
    small = np.ascontiguousarray(PICTURES[2][::2, ::2])
    np.testing.assert_array_equal(view, degrade(small, "gaussian_noise", level=2, seed=own))


def test_a_document_that_does_not_say_where_it_is_from_is_refused():
    with pytest.raises(ValueError, match="documents from task_dict, got another of a, document 0"):
        degrading("a", 0)({"images": [0]})


# -------------------------------------------------------------------------------- forms of images


def _file(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


PIXELS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def test_every_form_of_an_image_is_read(tmp_path):
    content = _file(Image.fromarray(PIXELS))
    path = tmp_path / "a b.png"
    path.write_bytes(content)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        forms = [
            Image.fromarray(PIXELS),
            content,
            path,
            str(path),
            f"file://{path}",
            f"data:image/png;base64,{base64.b64encode(content).decode()}",
            {"bytes": content, "path": None},
            {"bytes": None, "path": str(path)},
            f"http://localhost:{server.server_port}/a.png",
        ]
        for form in forms:
            np.testing.assert_array_equal(read_pixels(form, "image"), PIXELS)
        server.shutdown()


def test_gray_palette_and_transparent_images_become_rgb():
    gray = PIXELS[..., 0]
    np.testing.assert_array_equal(
        read_pixels(Image.fromarray(gray), "image"), np.stack([gray] * 3, -1)
    )
    palette = Image.fromarray(PIXELS).convert("P")
    np.testing.assert_array_equal(read_pixels(palette, "image"), np.asarray(palette.convert("RGB")))
    seen = np.where(gray[..., None] > 60, 255, 0).astype(np.uint8)  # or not at all: no rounding
    clear = Image.fromarray(np.concatenate([PIXELS, seen], -1))
    np.testing.assert_array_equal(
        read_pixels(clear, "image"), np.where(seen > 0, PIXELS, np.uint8(255))
    )


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        (3.5, TypeError, "image 0 of a, document 7: expected an image, got a float"),
        ("gone.png", ValueError, "image 0 of a, document 7: expected an image file, got no file"),
        (
            b"nothing",
            ValueError,
            "image 0 of a, document 7: expected an image that Pillow can read",
        ),
    ],
)
def test_what_is_no_image_is_named_with_its_document(source, error, said):
    with pytest.raises(error, match=re.escape(said)):
        read_pixels(source, "image 0 of a, document 7")


# ---------------------------------------------------------------------------------------- refusals


def test_a_task_has_images_if_one_document_has():
    text = [{"role": "user", "content": [{"type": "text", "text": "2 + 2"}]}]
    asked = []

    def chats(having):
        for i in range(5):
            asked.append(i)
            yield messages(TASKS["b"]["test"][0]) if i == having else text

    require_images("sums", chats(2))
    assert asked == [0, 1, 2]  # no more than it needs
    with pytest.raises(ValueError, match="sums: expected documents with images, got none with one"):
        require_images("sums", chats(None))
    film = [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}]
    with pytest.raises(
        ValueError, match="films, document 0: expected images and text, got content"
    ):
        require_images("films", [film])


@pytest.mark.parametrize(
    ("corruption", "level", "said"),
    [
        ("gausian_blur", 2, "did you mean 'gaussian_blur'?"),
        ("gaussian_blur", None, "level: expected 1 to 5, a level of gaussian_blur, got none"),
        (None, 2, "corruption: expected one beside the level, got none"),
        ("gaussian_blur", 6, "level: expected 1 to 5, a level of gaussian_blur, got 6"),
        ("gaussian_blur", 0, "got 0"),
        ("gaussian_blur", 1.5, "got 1.5"),
        ("gaussian_blur", True, "got True"),
        ("gaussian_blur", "three", "got 'three'"),
        ("pgd", 1, "got 'pgd'; measure it with `roma eval --pools adversarial`"),
    ],
)
def test_a_cell_that_is_not_there_is_refused_in_one_line(corruption, level, said):
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        cell_of(corruption, level)
    assert "\n" not in str(raised.value)


def test_a_cell_knows_its_pool():
    assert cell_of(None, None) == Cell()
    assert cell_of("gaussian_blur", 5) == Cell(
        CORRUPTIONS["gaussian_blur"].pool, "gaussian_blur", 5
    )


def test_a_table_by_name_carries_what_its_file_says(tmp_path):
    path = tmp_path / "levels.yaml"
    path.write_text("gaussian_blur: {levels: [1, 2]}\n")
    first = digest_of(path)
    assert len(read_table(f"{path}@{first}")["gaussian_blur"].levels) == 2
    assert read_table(path) == read_table(f"{path}@{first}")  # a Path is trusted
    path.write_text("gaussian_blur: {levels: [1, 2, 3]}\n")
    second = digest_of(path)
    for given in (f"{path}@{first}", str(path)):
        with pytest.raises(ValueError, match=re.escape(f"expected {path}@{second}, got {given}")):
            read_table(given)
    assert read_table(None) is CORRUPTIONS
    with pytest.raises(FileNotFoundError, match="no file"):
        read_table(str(tmp_path / "gone.yaml"))
