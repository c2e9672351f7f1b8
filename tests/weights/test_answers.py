"""How long to wait: what the answer says, in whichever of its headers."""

import pytest

from lmd_hf.errors import SettingsError
from lmd_hf.weights.answers import client, demanded_wait


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=0;t=55, "pages";r=9;t=3', "RateLimit-Policy": '"fixed window";"api";q=5;w=300'}, 55),
        ({"Retry-After": "²"}, None),
        ({"RateLimit": "something else"}, None),
        ({"Retry-After": "2", "RateLimit": '"api";r=0;t=55'}, 2),
    ],
)  # fmt: skip
def test_the_wait_that_an_answer_demands(headers, seconds):
    assert demanded_wait(headers) == seconds


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_secret x", "hf_sécret", "", " "])
@pytest.mark.parametrize("stored", [True, False])
def test_a_token_that_no_header_can_carry_is_said_and_not_shown(monkeypatch, token, stored):
    monkeypatch.setattr("lmd_hf.weights.answers.get_token", lambda: token)
    with pytest.raises(SettingsError, match="the token is empty, or has a space") as raised:
        client(None if stored else token)
    assert "cret" not in str(raised.value)
    assert client(False).token is False
