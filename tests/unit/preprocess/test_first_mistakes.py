"""Mistakes of a first day: the message says what to write."""

from __future__ import annotations

import pytest

from pipeline.errors import ConfigError, SettingError
from pipeline.preprocess.fetch.uri import missing_hint
from pipeline.preprocess.messages.columns import template_columns
from pipeline.preprocess.video.timing import num_sampled_frames


@pytest.mark.parametrize("template", ['Answer as JSON: {"caption": "..."}', "Answer as {", "Answer as JSON: {}"])
def test_a_template_with_braces_is_told_to_double_them(template: str) -> None:
    with pytest.raises(ConfigError, match=r"twice: \{\{ \}\}$"):
        template_columns(template)


@pytest.mark.parametrize("total", [0, 1])
def test_num_frames_of_a_video_with_one_frame_gets_no_impossible_advice(total: int) -> None:
    with pytest.raises(SettingError, match=rf"has {total} frames?, .* set fps") as caught:
        num_sampled_frames(total, 1.0, fps=None, num_frames=4, min_frames=4, max_frames=768)
    assert "between" not in str(caught.value)


def test_a_uri_with_one_slash_is_told_to_have_two() -> None:
    assert missing_hint("s3:/photos/a.jpg").endswith("as in s3://photos/a.jpg")
    assert missing_hint("HTTPS:/host/a.jpg").endswith("as in HTTPS://host/a.jpg")
    assert not missing_hint("c:/a.jpg")
    assert not missing_hint("s3://photos/a.jpg")
