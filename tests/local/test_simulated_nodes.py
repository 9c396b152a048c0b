"""Flower's simulation with many nodes: it searches for messages only where there can be some, and loses none."""

import random
import threading
from collections import Counter

from flwr.app import ConfigRecord, Message, RecordDict

from sim.app.server.simulated_nodes import skip_idle_nodes
from sim.local.in_process import grid_in_memory


def message_to(node: int, number: int = 0) -> Message:
    content = RecordDict({"a": ConfigRecord({"number": number})})
    return Message(content, dst_node_id=node, message_type="query", ttl=3600)


def number_of(message: Message) -> int:
    return int(message.content["a"]["number"])  # type: ignore[arg-type]  # an int of ours


def test_only_nodes_with_messages_are_searched() -> None:
    grid, nodes = grid_in_memory(500)
    searched = list[int]()
    search = grid.state.get_message_ins

    def counted(node_id: int, limit: int | None) -> list[Message]:
        searched.append(node_id)
        return search(node_id=node_id, limit=limit)

    grid.state.get_message_ins = counted  # type: ignore[method-assign, assignment]  # to count Flower's searches
    skip_idle_nodes(grid)
    some = list(nodes)[100:103]
    grid.push_messages([message_to(node) for node in [*some, some[0]]])
    passes = [[m for node in nodes for m in grid.state.get_message_ins(node_id=node, limit=1)] for _ in range(4)]
    assert [[m.metadata.dst_node_id for m in found] for found in passes] == [some, some[:1], [], []]
    assert Counter(searched) == {some[0]: 3, some[1]: 2, some[2]: 2}  # until nothing is found, then no more


def test_no_message_is_lost_while_others_are_sent() -> None:
    grid, nodes = grid_in_memory(20)
    skip_idle_nodes(grid)
    drawing, total = random.Random(0), 2000
    sent = [(drawing.choice(list(nodes)), number) for number in range(total)]
    found, over = list[tuple[int, int]](), threading.Event()

    def search() -> None:
        while not over.is_set():
            for node in nodes:
                for message in grid.state.get_message_ins(node_id=node, limit=1):
                    found.append((node, number_of(message)))
                    # few are open, so that searches are short
                    grid.state.delete_messages({message.metadata.message_id})

    searching = threading.Thread(target=search)
    searching.start()
    for node, number in sent:
        grid.push_messages([message_to(node, number)])
    for _ in range(3000):
        if len(found) == total:
            break
        over.wait(0.01)
    over.set()
    searching.join()
    assert sorted(found) == sorted(sent)
