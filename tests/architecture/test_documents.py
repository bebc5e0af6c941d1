"""Documents that scripts write are as the scripts would write them."""

from pathlib import Path

from scripts import docs_decisions, docs_models, docs_rooms

ROOT = Path(__file__).parents[2]


def test_the_drawing_of_the_rooms_is_that_of_the_imports() -> None:
    text = docs_rooms.DOCUMENT.read_text(encoding="utf-8")
    assert docs_rooms.redrawn(text, ROOT) == text, "run: python -m scripts.docs_rooms"


def test_arrows_that_follow_from_others_are_left_out() -> None:
    rooms = {"cli": {"api", "search"}, "api": {"search"}, "search": {"models"}}
    assert docs_rooms.reduced(rooms) == {"cli": {"api"}, "api": {"search"}, "search": {"models"}}


def test_every_record_is_in_the_list_of_decisions() -> None:
    text = (docs_decisions.FOLDER / "README.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith("| 0")]
    wanted = [
        f"| {name[:4]} | [{title}]({name}) | {status} | "
        for name, title, status in docs_decisions.rows(docs_decisions.FOLDER)
    ]
    assert [line[: len(start)] for line, start in zip(listed, wanted, strict=True)] == wanted, (
        "run: python -m scripts.docs_decisions"
    )


def test_the_page_of_models_is_that_of_the_registry_and_the_tests() -> None:
    assert docs_models.DOCUMENT.read_text(encoding="utf-8") == docs_models.page(), "run: python -m scripts.docs_models"
