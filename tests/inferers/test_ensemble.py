from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer

from segbundles.inferers import EnsembleInferer, Member
from segbundles.meta import add_note, batch_notes, notes_of, set_notes


class Given(torch.nn.Module):
    """A network whose output is given, whatever its input."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


def run(outputs: list[torch.Tensor], logits: bool = True) -> torch.Tensor:
    first, *others = map(Given, outputs)
    members = [Member(str(k), SimpleInferer(), network) for k, network in enumerate(others)]
    return EnsembleInferer(SimpleInferer(), members, logits)(outputs[0], first)


def test_mean_of_probabilities_by_hand() -> None:
    # logits ln 4 and ln(1/9): probabilities .8 and .1, mean .45
    one = run([torch.tensor([4.0]).log().reshape(1, 1, 1), torch.tensor([1 / 9]).log().reshape(1, 1, 1)])
    assert one.sigmoid().item() == pytest.approx(0.45)
    # two classes: .8 / .2 and .1 / .9
    two = run([torch.tensor([0.8, 0.2]).log().reshape(1, 2, 1), torch.tensor([0.1, 0.9]).log().reshape(1, 2, 1)])
    torch.testing.assert_close(two.softmax(1).flatten(), torch.tensor([0.45, 0.55]))
    three = [torch.tensor(p).reshape(1, 3, 1) for p in ([0.7, 0.2, 0.1], [0.1, 0.8, 0.1])]
    expected = torch.tensor([0.4, 0.5, 0.1])
    torch.testing.assert_close(run([p.log() for p in three]).softmax(1).flatten(), expected)
    torch.testing.assert_close(run(three, logits=False).flatten(), expected)


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_equal_members_decide_like_one(channels: int, members: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-12, 1e-7, 1e-3, 1.0, 30.0, 100.0]).repeat_interleave(500)
    logits = torch.randn(1, channels, len(scale), generator=generator) * scale
    logits[..., :3] = 0.0  # ties
    found = run([logits] * members)
    assert found.isfinite().all()
    if channels == 1:
        assert torch.equal(found > 0, logits > 0)
    else:
        assert torch.equal(found.argmax(1), logits.argmax(1))
    probabilities = torch.rand(1, channels, 1000, generator=generator)
    assert torch.equal(run([probabilities] * members, logits=False), probabilities)


def test_without_members_the_inferers_own_output() -> None:
    x = torch.zeros(1, 1, 2, 2)
    output = torch.ones(1, 1, 2, 2)
    assert EnsembleInferer(SimpleInferer())(x, lambda _: output) is output


def test_notes_of_all_members_and_inputs_of_their_own() -> None:
    class Noting(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            output = MetaTensor(inputs.as_tensor().sum(1, keepdim=True)).copy_meta_from(inputs)
            set_notes(output, [f"{inputs.shape[1]} channels", ""])
            return output

    # 1 channel for the first member, 2 and 3 for the others: sums 0, 2 and 3 of ones
    x = MetaTensor(torch.ones(2, 6, 1, 1), meta={"filename_or_obj": ["a", "b"]})
    x[:, 0] = 0
    x.is_batch = True
    net = torch.nn.Identity()
    members = [Member("two", Noting(), net, channels=2), Member("three", Noting(), net, channels=3)]
    found = EnsembleInferer(Noting(), members, logits=False)(x, net)
    torch.testing.assert_close(found.as_tensor().flatten(), torch.full((2,), 5 / 3))
    assert batch_notes(found, 2) == ["1 channels; two: 2 channels; three: 3 channels", ""]
    assert found.meta["filename_or_obj"] == ["a", "b"]


def test_a_note_of_one_image_stays_a_text() -> None:
    class Noting(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            output = MetaTensor(inputs.as_tensor()).copy_meta_from(inputs)
            add_note(output, "whole volume")
            return output

    x = MetaTensor(torch.ones(1, 2, 2), meta={"filename_or_obj": "a"})[None]
    net = torch.nn.Identity()
    found = EnsembleInferer(Noting(), [Member("b", Noting(), net)], logits=False)(x, net)
    assert notes_of(found) == "whole volume; b: whole volume"
