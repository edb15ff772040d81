from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from quantkit.numerics.ggml.row_threads import map_in_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_results_are_in_the_order_of_the_items() -> None:
    assert map_in_threads(lambda item: item * item, range(20)) == [n * n for n in range(20)]


def test_parts_run_at_the_same_time_each_with_one_thread_of_torch() -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet(_: int) -> int:
        meeting.wait()
        return torch.get_num_threads()

    assert map_in_threads(meet, range(4)) == [1, 1, 1, 1]


def test_torch_has_its_threads_afterwards_here_and_in_threads_to_come() -> None:
    def fail(item: int) -> None:
        raise ValueError(f"part {item}")

    with pytest.raises(ValueError, match="part 0"):
        map_in_threads(fail, range(4))
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [2, 2]


def test_a_single_part_stays_in_the_thread_that_asks() -> None:
    assert map_in_threads(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]
