"""Drawing tokens: shares as temperature and top-p say, and no influence between samples of a batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_nvlm.errors import UserError
from megatron_nvlm.inference.sampling import GREEDY, ChosenToken, Sampling, TokenChooser, draw


@given(
    logits=st.lists(st.floats(-8, 8), min_size=1, max_size=12),
    temperature=st.floats(0.1, 4),
    top_p=st.floats(0.05, 1),
)
def test_shares_of_the_draws(logits: list[float], temperature: float, top_p: float) -> None:
    """Evenly spread numbers draw each token as often as its probability among those that top-p leaves."""
    probabilities = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
    order = probabilities.sort(descending=True, stable=True).indices.tolist()
    expected, before = torch.zeros(len(logits), dtype=torch.float64), 0.0
    for token in order:
        if before >= top_p - 1e-12:
            break
        expected[token] = probabilities[token]
        before += float(probabilities[token])
    expected /= expected.sum()
    count = 4000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(torch.tensor(logits).expand(count, -1), Sampling(temperature, top_p), uniform)
    shares = torch.bincount(drawn, minlength=len(logits)) / count
    if all(abs(float(part) - top_p) > 1e-6 for part in probabilities[order].cumsum(0)):  # else rounding decides
        torch.testing.assert_close(shares, expected, atol=2 / count + 1e-5, rtol=0, check_dtype=False)


def test_a_sample_draws_the_same_beside_any_others() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, seed=7)
    together, alone = TokenChooser([sampling] * 3, ["a", "b", "c"]), TokenChooser([sampling], ["b"])
    for _ in range(20):
        assert together.choose(logits, [0, 1, 2])[1] == alone.choose(logits[1:2], [0])[0]
    assert len({TokenChooser([Sampling(1.0, seed=seed)], ["b"]).choose(logits[:1], [0])[0] for seed in range(9)}) > 1


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert TokenChooser([GREEDY], ["a"]).choose(torch.tensor([[0.0, 2.0, 2.0]]), [0]) == [ChosenToken(1)]


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 2}])
def test_settings_that_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match="it must be"):
        Sampling(**settings)
