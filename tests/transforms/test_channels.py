from __future__ import annotations

import logging

import pytest
import torch
from monai.data import MetaTensor

from segbundles.transforms import FillChannelsd, RandFillChannelsd


def image(channels, **meta):
    data = torch.arange(channels * 8).reshape(channels, 2, 2, 2).float()
    return MetaTensor(data, meta={"filename_or_obj": "p/a.nii.gz", **meta})


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        ({}, "one channel: taken as FLAIR and used for all 3"),
        ({"channels": 2, "name": "T1"}, "one channel: taken as T1 and used for all 2"),
    ],
)
def test_one_channel_is_repeated_with_a_note(arguments, note, caplog):
    given = image(1)
    out = FillChannelsd("image", **arguments)({"image": given, "label": 5})
    assert out["image"].shape == (arguments.get("channels", 3), 2, 2, 2)
    for channel in out["image"]:
        assert torch.equal(channel.as_tensor(), given[0].as_tensor())
    assert out["image"].meta["notes"] == note
    assert "notes" not in given.meta
    assert out["label"] == 5
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        ("segbundles", "WARNING", f"p/a.nii.gz has {note}.")
    ]


def test_an_earlier_note_is_kept():
    out = FillChannelsd("image")({"image": image(1, notes="cropped")})
    assert out["image"].meta["notes"] == "cropped; one channel: taken as FLAIR and used for all 3"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_right_number_passes_as_it_is(channels, caplog):
    given = image(channels)
    assert FillChannelsd("image", channels)({"image": given})["image"] is given
    assert not caplog.records


def test_plain_tensors_and_missing_keys():
    out = FillChannelsd(["image", "other"], allow_missing_keys=True)({"image": torch.ones(1, 4, 4)})
    assert out["image"].shape == (3, 4, 4)
    with pytest.raises(KeyError, match="other"):
        FillChannelsd("other")({"image": torch.ones(1, 4, 4)})


@pytest.mark.parametrize(
    ("seen", "needed", "repair"),
    [
        (2, 3, "give 3 channels, or one"),
        (4, 3, "give 3 channels, or one (if the fourth is transparency, save it as RGB)"),
        (4, 2, "give 2 channels, or one"),
    ],
)
def test_any_other_number_is_refused(seen, needed, repair, caplog):
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=r"^p/a\.nii\.gz has") as caught:
        FillChannelsd("image", needed)({"image": image(seen)})
    assert str(caught.value) == f"p/a.nii.gz has {seen} channels but must have {needed}: {repair}."
    assert len(caplog.records) == 1


class TestRandFillChannelsd:
    @pytest.mark.parametrize("source", [0, 1, 2])
    def test_always_replaces_all_but_the_source_and_leaves_the_input(self, source):
        given = image(3)
        kept = given.clone()
        out = RandFillChannelsd("image", prob=1.0, channel=source)({"image": given, "label": 5})
        for channel in out["image"]:
            assert torch.equal(channel.as_tensor(), kept[source].as_tensor())
        assert torch.equal(given.as_tensor(), kept.as_tensor())
        assert out["image"].meta["filename_or_obj"] == "p/a.nii.gz"
        assert out["label"] == 5

    def test_never_replaces_any(self):
        given = image(3)
        assert RandFillChannelsd("image", prob=0.0)({"image": given})["image"] is given

    def test_channels_are_drawn_one_by_one_the_same_for_all_keys_and_again_from_the_seed(self):
        transform = RandFillChannelsd(["image", "twin"], prob=0.5, channel=1)
        drawn = []
        for _ in range(2):
            transform.set_random_state(3)
            for _ in range(400):
                out = transform({"image": image(3), "twin": image(3)})
                same = [bool(torch.equal(c.as_tensor(), out["image"][1].as_tensor())) for c in out["image"]]
                assert torch.equal(out["image"].as_tensor(), out["twin"].as_tensor())
                drawn.append(same)
        assert drawn[:400] == drawn[400:]
        share = torch.tensor(drawn[:400]).float()
        assert share.mean(0).tolist() == pytest.approx([0.5, 1.0, 0.5], abs=0.08)
        assert (share[:, 0] * share[:, 2]).mean().item() == pytest.approx(0.25, abs=0.07)

    def test_impossible_settings(self):
        with pytest.raises(ValueError, match=r"prob must be in 0 .. 1, got 1.5"):
            RandFillChannelsd("image", prob=1.5)
        with pytest.raises(ValueError, match=r"p/a.nii.gz has 1 channel\(s\), so there is no channel 1"):
            RandFillChannelsd("image", channel=1)({"image": image(1)})


def test_neighbouring_slices_miss_the_same_sequences() -> None:
    image = torch.arange(9.0)[:, None, None].expand(9, 2, 2).clone()
    fill = RandFillChannelsd("image", prob=0.5, channel=1, channels=3).set_random_state(seed=0)
    seen = set()
    for _ in range(20):
        out = fill({"image": image})["image"][:, 0, 0].tolist()
        sources = [int(value) - 3 * (k // 3) for k, value in enumerate(out)]
        assert sources[:3] == sources[3:6] == sources[6:]
        seen.add(tuple(sources[:3]))
    assert seen == {(0, 1, 2), (1, 1, 2), (0, 1, 1), (1, 1, 1)}
