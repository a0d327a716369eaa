"""Durations and sizes in words, and a bar that yields what it is given."""

import pytest

from vitscale.base.progress import bytes_in_words, in_words, progress, seconds_of


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-3, "0s"),
        (0, "0s"),
        (9.4, "9s"),
        (59.6, "1m00s"),
        (432, "7m12s"),
        (3599.4, "59m59s"),
        (7500, "2h05m"),
        (86_399, "23h59m"),
        (3 * 86_400 + 4 * 3600 + 59, "3d04h"),
    ],
)
def test_durations_have_two_units_at_most(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(
    ("words", "seconds"),
    [(0, 0), (600, 600), ("600", 600), ("90s", 90), (" 3h50m ", 13_800), ("1d12h", 129_600), ("7m12s", 432), ("2d", 172_800)],
)
def test_words_are_seconds_again(words, seconds):
    assert seconds_of(words) == seconds


@pytest.mark.parametrize("words", [-1, "", "h", "3h 50m", "50m3h", "1.5h", "ten", "3w"])
def test_what_is_no_time_is_refused_with_examples(words):
    with pytest.raises(ValueError, match='expected a time such as 600, "90s", "3h50m"'):
        seconds_of(words)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_449_000, "3.4 MB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (256_000_000_000, "256.0 GB"),
        (5_000_000_000_000_000, "5000.0 TB"),
    ],
)
def test_sizes_have_decimal_units_and_less_than_a_thousand_of_them(count, words):
    assert bytes_in_words(count) == words


def test_the_bar_yields_the_items_in_order_and_shows_what_and_how_many(capsys):
    assert list(progress(iter("abc"), total=3, what="reading", unit="img")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "3/3" in shown
    assert "img/s" in shown
