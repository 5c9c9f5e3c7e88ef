"""What is said of errors."""

import re

from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ImageUnacceptable, printable


@given(st.text(st.characters()))
def test_messages_hold_nothing_a_terminal_would_act_upon(text: str) -> None:
    error = ImageUnacceptable(f"image {text}", text)
    for said in (error.message, error.hint, str(error)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", said)
        said.encode()
    assert printable(error.message) == error.message


def test_letters_of_any_script_stay_as_they_are() -> None:
    for text in ("a b\n\tc", "Größe", "画像", "🖥", "é"):
        assert printable(text) == text
