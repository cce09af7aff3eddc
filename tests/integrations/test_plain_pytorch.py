from tests.integrations.examples import losses_of


def test_example() -> None:
    losses = losses_of("plain_pytorch.py")
    assert losses[-1] < losses[0]
