"""Which texts are shown on a card."""

import pytest

from tweetdora.screening import unsuitable


@pytest.mark.parametrize(
    "text",
    [
        "What a class! A scunthorpe of assets, and a cockpit.",
        "@user @anonymous thanks, see http://url_removed",
        "since 2014, at 7:30, 25,000 of them; 3.5/5",
        "a @ b, me@home",
        "",
    ],
)
def test_ordinary_texts_are_shown(text):
    assert unsuitable(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("what an Idiot!", "insult"),
        ("#bitch", "insult"),
        ("mail jo.doe+x@example.org", "personal data"),
        ("@jo_doe thanks", "personal data"),
        ("see https://t.co/abc", "personal data"),
        ("www.example.org", "personal data"),
        ("call +1 (555) 123-4567", "personal data"),
        ("@jo_doe you idiot", "insult"),
    ],
)
def test_insults_and_personal_data_are_not(text, reason):
    assert unsuitable(text) == reason
    assert unsuitable("fine", text) == reason, "any of several texts"
