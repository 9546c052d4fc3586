"""Ids of messages."""

from fedhpc.federation.message_ids import Sequences


def test_messages_of_the_same_round_client_and_verb_are_numbered() -> None:
    sequences = Sequences()
    assert [sequences.next(1, 0, "train") for _ in range(3)] == [0, 1, 2]
    assert sequences.next(1, 1, "train") == sequences.next(1, 0, "evaluate") == 0
    assert [sequences.next(0, 0, "query") for _ in range(2)] == [0, 1]


def test_rounds_that_are_over_are_forgotten_and_messages_of_no_round_are_not() -> None:
    sequences = Sequences()
    for server_round in range(1, 101):
        for client_id in range(10):
            sequences.next(server_round, client_id, "train")
            sequences.next(0, client_id, "query")
    assert len(sequences._next) <= 10 * 2 + 10
    assert sequences.next(0, 3, "query") == 100
    assert sequences.next(99, 3, "train") == 1  # the round before may still be evaluated


def test_an_app_that_goes_back_to_an_earlier_round_uses_no_number_again() -> None:
    sequences = Sequences()
    used = {(r, sequences.next(r, 0, "train")) for r in (1, 2, 3, 4)}
    again = {(r, sequences.next(r, 0, "train")) for r in (1, 2, 3, 4)}
    assert not used & again


def test_what_is_captured_numbers_messages_of_no_round_on() -> None:
    before, after = Sequences(), Sequences()
    before.next(0, 0, "query")
    before.next(5, 0, "train")
    after.restore(before.capture())
    assert after.next(0, 0, "query") == 1
    assert after.next(6, 0, "train") == 0
